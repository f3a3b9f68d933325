"The judge on files: its cache, a damaged cache, families that stay whole, and data sets that are too small for one."
from collections import Counter

import numpy as np
import pytest
import torch

from histogan.data import DataConfig, open_data, to_uint8
from histogan.encoder import CNNConfig, own_cnn
from histogan.classifier import split_by_group, halves, held_out_for, fit_held_out, references
from histogan.phantom import make_phantom

torch.set_num_threads(1)
QUICK = CNNConfig(widths=(8, 8), steps=5, batch_size=8, seed=99)

def patches(n, classes=3, size=16, seed=0):
    "n random patches of each class, two classes of them never alike."
    images = np.random.default_rng(seed).integers(0, 256, (n * classes, size, size, 3), np.uint8)
    return images, np.arange(n * classes) % classes

def weights(judge): return [p.clone() for p in judge.net.state_dict().values()]

def same(a, b): return all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))

def test_a_cached_judge_is_read_and_not_trained(tmp_path, monkeypatch):
    images, labels = patches(12)
    first = fit_held_out(images, labels, 3, cache_dir=tmp_path, cfg=QUICK, progress=False)
    assert len(list((tmp_path/'judge').iterdir())) == 1
    def never(*a, **kw): raise AssertionError('was trained again')
    monkeypatch.setattr('histogan.encoder.train_cnn', never)
    again = fit_held_out(images, labels, 3, cache_dir=tmp_path, cfg=QUICK, progress=False)
    assert same(first, again) and first.accuracy == again.accuracy
    for change in (dict(images=255 - images), dict(families=np.arange(36) // 4), dict(cfg=CNNConfig(widths=(8, 8), steps=6, seed=99))):
        with pytest.raises(AssertionError, match='trained again'):
            fit_held_out(**dict(images=images, labels=labels, num_classes=3, cache_dir=tmp_path, cfg=QUICK, progress=False) | change)

@pytest.mark.parametrize('damage', [lambda b: b[:len(b)//2], lambda b: b'', lambda b: b'not weights at all' * 40])
def test_a_damaged_cache_is_replaced(tmp_path, damage):
    images, labels = patches(12)
    first = fit_held_out(images, labels, 3, cache_dir=tmp_path, cfg=QUICK, progress=False)
    file, = (tmp_path/'judge').iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert same(first, fit_held_out(images, labels, 3, cache_dir=tmp_path, cfg=QUICK, progress=False))
    assert file.read_bytes() == whole and list((tmp_path/'judge').iterdir()) == [file]

@pytest.mark.parametrize('seed', range(20))
def test_families_are_never_torn_and_halves_are_near_even(seed):
    rng = np.random.default_rng(seed)
    families = rng.integers(0, rng.integers(6, 40), 600)                   # of unequal sizes, over all classes
    labels = np.where(rng.random(600) < .5, families % 4, rng.integers(0, 4, 600))
    train = split_by_group(labels, families, 4, seed)
    assert not set(families[train]) & set(families[~train])
    share = [train[labels == c].mean() for c in range(4)]
    assert all(.2 < s < .8 for s in share), share
    a, b = references(labels, families, ~train, 4, seed=seed)
    assert Counter(labels[a]) == Counter(labels[b]) and not set(a) & set(b) and not train[np.r_[a, b]].any()
    for c in range(4): assert len(set(families[a][labels[a] == c]) & set(families[b][labels[b] == c])) <= 1

def test_one_large_family_is_dealt_singly(capsys):
    images, labels = patches(20)
    families = np.where(labels == 1, 7, np.arange(60) // 6)
    families[np.flatnonzero(labels == 1)[:2]] = 8                          # 18 of 20 in one family: no half without the other
    judge = fit_held_out(images, labels, 3, families, cfg=QUICK, progress=False)
    said = capsys.readouterr().err
    assert said.count('\n') == 1 and 'numbers 1' in said and 'flatters' in said
    train, torn = halves(labels, families, 3, 99)
    assert torn.tolist() == [1] and train[labels == 1].sum() == 10 and judge.n_train == train.sum()

def test_a_judge_from_a_folder_sees_no_training_patch(tmp_path, monkeypatch):
    root = make_phantom(tmp_path/'p', 60, 16, slides=30)
    data = open_data(DataConfig(root=str(root), image_size=16, batch_size=2, val_frac=.3, test_frac=0., group_regex=r'-(s\d+)-'), progress=False)
    taught, real = {}, own_cnn
    monkeypatch.setattr('histogan.classifier.own_cnn', lambda given, *a, **kw: taught.update(images=given[0]) or real(given, *a, **kw))
    judge = held_out_for(data, cache_dir=tmp_path, progress=False, cfg=QUICK)
    pixels = lambda split: {x.tobytes() for x in data.dataset(split).pixels(np.arange(len(data.dataset(split))))}
    assert judge.n_train == len(taught['images']) == len(data.dataset('val')) and {x.tobytes() for x in taught['images']} == pixels('val')
    first, second = ({to_uint8(t).permute(1, 2, 0).numpy().tobytes() for t in x} for x, _ in judge.reals)
    assert first <= pixels('train') and second <= pixels('train') and not first & second
    assert len(judge.reals[0][0]) == len(judge.reals[1][0]) and judge(judge.reals[0][0])[1].shape[1] == 8

def test_too_few_patches_give_no_judge_and_one_line(tmp_path, capsys):
    root = make_phantom(tmp_path/'p', 20, 16, slides=10)
    data = open_data(DataConfig(root=str(root), image_size=16, batch_size=2, test_frac=0.), progress=False)
    capsys.readouterr()
    assert held_out_for(data, progress=False, cfg=QUICK) is None
    said = capsys.readouterr().err
    assert said.count('\n') == 1 and 'ADI 5' in said and '--data.val-frac' in said
