"The held-out classifier on files: its cache, a damaged cache, groups that stay whole, and data sets that are too small for one."
from collections import Counter

import numpy as np
import pytest
import torch

from histogan.data import DataConfig, open_data, to_uint8
from histogan.encoder import CNNConfig, own_cnn
from histogan.classifier import FEWEST, fit_held_out, held_out_for, references
from histogan.splits import split_by_group
from histogan.core import InputError
from histogan.phantom import make_phantom

torch.set_num_threads(1)
QUICK = CNNConfig(widths=(8, 8), steps=5, batch_size=8, seed=99)

def patches(n, classes=3, size=16, seed=0):
    "n random patches of each class, two classes of them never alike."
    images = np.random.default_rng(seed).integers(0, 256, (n * classes, size, size, 3), np.uint8)
    return images, np.arange(n * classes) % classes

def weights(classifier): return [p.clone() for p in classifier.net.state_dict().values()]

def same(a, b): return all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))

def test_a_cached_classifier_is_read_and_not_trained(tmp_path, monkeypatch):
    images, labels = patches(12)
    first = fit_held_out(images, labels, 3, cache_dir=tmp_path, cfg=QUICK, progress=False)
    assert len(list((tmp_path/'classifier').glob('*.safetensors'))) == 1
    def never(*a, **kw): raise AssertionError('was trained again')
    monkeypatch.setattr('histogan.small_cnn.train_cnn', never)
    again = fit_held_out(images, labels, 3, cache_dir=tmp_path, cfg=QUICK, progress=False)
    assert same(first, again) and first.accuracy == again.accuracy
    for change in (dict(images=255 - images), dict(groups=np.arange(36) // 4), dict(cfg=CNNConfig(widths=(8, 8), steps=6, seed=99))):
        with pytest.raises(AssertionError, match='trained again'):
            fit_held_out(**dict(images=images, labels=labels, num_classes=3, cache_dir=tmp_path, cfg=QUICK, progress=False) | change)

@pytest.mark.parametrize('damage', [lambda b: b[:len(b)//2], lambda b: b'', lambda b: b'not weights at all' * 40])
def test_a_damaged_cache_is_replaced(tmp_path, damage):
    images, labels = patches(12)
    first = fit_held_out(images, labels, 3, cache_dir=tmp_path, cfg=QUICK, progress=False)
    file, = (tmp_path/'classifier').glob('*.safetensors')
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert same(first, fit_held_out(images, labels, 3, cache_dir=tmp_path, cfg=QUICK, progress=False))
    assert file.read_bytes() == whole and list((tmp_path/'classifier').glob('*.safetensors')) == [file]

@pytest.mark.parametrize('seed', range(20))
def test_groups_are_never_torn_and_halves_are_near_even(seed):
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, rng.integers(6, 40), 600)                   # of unequal sizes, over all classes
    labels = np.where(rng.random(600) < .5, groups % 4, rng.integers(0, 4, 600))
    part, torn = split_by_group(labels, groups, seed=seed)
    train = part == 0
    assert not torn and not set(groups[train]) & set(groups[~train])
    share = [train[labels == c].mean() for c in range(4)]
    assert all(.25 <= s <= .75 for s in share), share  # below half of its share a class is split singly, and `torn` says so
    a, b = references(labels, groups, ~train, 4, seed=seed)
    assert Counter(labels[a]) == Counter(labels[b]) and not set(a) & set(b) and not train[np.r_[a, b]].any()
    for c in range(4): assert len(set(groups[a][labels[a] == c]) & set(groups[b][labels[b] == c])) <= 1

def test_one_large_group_is_split_singly(capsys):
    images, labels = patches(20)
    groups = np.where(labels == 1, 7, np.arange(60) // 6)
    groups[np.flatnonzero(labels == 1)[:2]] = 8                          # 18 of 20 in one family: no half without the other
    classifier = fit_held_out(images, labels, 3, groups, cfg=QUICK, progress=False)
    said = capsys.readouterr().err
    assert said.count('\n') == 1 and 'numbers 1' in said and 'flatters' in said
    part, torn = split_by_group(labels, groups, seed=99, fewest=FEWEST)
    assert torn == [1] and (part[labels == 1] == 0).sum() == 10 and classifier.n_train == (part == 0).sum()

def test_a_classifier_from_a_folder_sees_no_training_patch(tmp_path, monkeypatch):
    root = make_phantom(tmp_path/'p', 60, 16, slides=30)
    data = open_data(DataConfig(root=str(root), image_size=16, batch_size=2, val_frac=.3, test_frac=0., group_regex=r'-(s\d+)-'), progress=False)
    taught, real = {}, own_cnn
    monkeypatch.setattr('histogan.classifier.own_cnn', lambda given, *a, **kw: taught.update(images=given[0]) or real(given, *a, **kw))
    classifier = held_out_for(data, cache_dir=tmp_path, progress=False, cfg=QUICK)
    pixels = lambda split: {x.tobytes() for x in data.dataset(split).pixels(np.arange(len(data.dataset(split))))}
    assert classifier.n_train == len(taught['images']) == len(data.dataset('val')) and {x.tobytes() for x in taught['images']} == pixels('val')
    first, second = ({to_uint8(t).permute(1, 2, 0).numpy().tobytes() for t in x} for x, _ in classifier.reals)
    assert first <= pixels('train') and second <= pixels('train') and not first & second
    assert len(classifier.reals[0][0]) == len(classifier.reals[1][0]) and classifier(classifier.reals[0][0])[1].shape[1] == 8

def test_too_few_patches_give_no_classifier_and_one_line(tmp_path, capsys):
    root = make_phantom(tmp_path/'p', 20, 16, slides=10)
    data = open_data(DataConfig(root=str(root), image_size=16, batch_size=2, test_frac=0.), progress=False)
    capsys.readouterr()
    assert held_out_for(data, progress=False, cfg=QUICK) is None
    said = capsys.readouterr().err
    assert said.count('\n') == 1 and 'ADI 5' in said and '--data.val-frac' in said

def test_a_run_keeps_its_classifier_in_a_file(tmp_path, monkeypatch):
    images, labels = patches(12)
    file = tmp_path/'run'/'artifacts'/'classifier.safetensors'
    first = fit_held_out(images, labels, 3, cfg=QUICK, progress=False, file=file)
    monkeypatch.setattr('histogan.small_cnn.train_cnn', lambda *a, **kw: pytest.fail('was trained again'))
    again = fit_held_out(images, labels, 3, cfg=CNNConfig(widths=(8, 8), steps=9, seed=1), progress=False, file=file)  # other options: the file decides
    assert same(first, again) and first.key == again.key and len(first.key) == 16
    with pytest.raises(InputError, match='trained on 3 classes'): fit_held_out(*patches(12, 4), 4, cfg=QUICK, progress=False, file=file)

def test_given_reals_are_the_reals(tmp_path):
    (images, labels), (other, y) = patches(12), patches(9, seed=5)
    classifier = fit_held_out(images, labels, 3, cfg=QUICK, progress=False, reals=[(other[:12], y[:12]), (other[12:24], y[12:24])])
    assert classifier.n_train == 36 and [r.tolist() for _, r in classifier.reals] == [y[:12].tolist(), y[12:24].tolist()]
    assert np.array_equal(to_uint8(classifier.reals[0][0]).permute(0, 2, 3, 1).numpy(), other[:12])
