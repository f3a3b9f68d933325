"Choosing a checkpoint: repeats over seeds, equal numbers, and what a chooser writes down."
import json

import numpy as np
import pytest
import torch

from histogan.classifier import pooled_maps
from histogan.core import InputError
from histogan.data import DataConfig, open_data, to_float
from histogan.encoder import CNNConfig, own_cnn, random_encoder
from histogan.phantom import make_phantom, render, stain_for
from histogan.selection import Chooser, Quality, SelectionConfig, open_chooser, pose_distances, quality, repeats, score, shortfalls

torch.set_num_threads(1)
NAMES, N = ('DEB', 'LYM', 'TUM'), 50

def drawn(seed, same=0, size=32):
    "50 patches of each class; `same` of eight are one tissue in stains and poses of their own."
    number = lambda i: 0 if i % 8 < same else i
    x = np.stack([render(c, seed + 1000*k + number(i), size, stain_for(seed + i)) for k, c in enumerate(NAMES) for i in range(N)])
    x = to_float(torch.from_numpy(x).permute(0, 3, 1, 2))
    return torch.stack([im.rot90(i % 4, (1, 2)).flip(2) if i % 3 else im.rot90(i % 4, (1, 2)) for i, im in enumerate(x)])

@torch.no_grad()
def of_classes(x, spatial): return [pose_distances(p, spatial) for p in x.split(N)]

def spaces(seed):
    "Feature maps of a network that was never trained, and of one that was."
    images = ((drawn(seed + 900_000) + 1)*127.5).round().byte().permute(0, 2, 3, 1).numpy()
    trained = own_cnn((images, np.arange(3).repeat(N)), 3, None, CNNConfig(steps=60, seed=seed), progress=False)
    for encoder in (random_encoder(seed).calibrate(images), trained): yield lambda x: pooled_maps(encoder.encode(x, False).maps)

@pytest.mark.parametrize('seed', [0, 1, 2])
def test_three_of_eight_alike_fail_and_honest_samples_pass(seed):
    cfg, sets = SelectionConfig(), [drawn(10_000*seed + s) for s in (0, 300_000)]
    honest, again = drawn(10_000*seed + 600_000), drawn(10_000*seed + 600_000, same=3)
    for spatial in spaces(seed):
        (a, b, h, r) = (of_classes(x, spatial) for x in (*sets, honest, again))
        h, r = ([repeats(*t) for t in zip(s, a, b)] for s in (h, r))
        assert np.mean(h) < cfg.max_repeats - .05 and np.mean(r) > cfg.max_repeats + .1, (h, r)
        assert max(h) < cfg.max_class_repeats and min(r) > cfg.max_class_repeats, (h, r)

class Gaussian:
    "Patches are features already."
    def __call__(self, x): return torch.nn.functional.one_hot((x[:, 0, 0, 0] > 0).long(), 2).float(), x.flatten(1)
    spatial = staticmethod(lambda x: x.flatten(1))

@pytest.mark.parametrize('times', [1, 2, 4])
def test_a_perfect_generator_is_as_far_away_as_reals(times):
    "Fakes, however many, are compared in parts as large as the sets of reals."
    rng, y = np.random.default_rng(times), torch.arange(100) % 2
    def cloud(y): return torch.tensor(rng.normal(size=(len(y), 3, 4, 4)), dtype=torch.float32)
    found = [quality(Gaussian(), (cloud(y.repeat(times)), y.repeat(times)), [(cloud(y), y), (cloud(y), y)]) for _ in range(12)]
    ratio = [q.fd/q.fd_real for q in found]
    assert abs(np.mean(ratio) - 1) < 4*np.std(ratio)/12**.5 + .02 and np.std(ratio) < .2
    assert abs(np.mean([q.repeats for q in found]) - .05) < .03

def test_an_old_card_has_no_repeats():
    old = Quality([1., 1.], 1., [1., 1.], [1., 1.], [0., 0.], 2., 1.)
    assert score(SelectionConfig(), old) == 2 and shortfalls(SelectionConfig(), old)['repeats'] == 0

def test_a_chooser_of_a_folder(tmp_path):
    root = make_phantom(tmp_path/'p', 60, 16, slides=30)
    data = open_data(DataConfig(root=str(root), image_size=16, batch_size=2, val_frac=.3, test_frac=0., group_regex=r'-(s\d+)-'), progress=False)
    file = tmp_path/'run'/'artifacts'/'classifier.safetensors'
    chooser = open_chooser(data, n=30, file=file, progress=False)
    assert chooser.metric == 'selection' and file.is_file()
    asked = []
    def draw(y):
        asked.append(y)
        return chooser.real[1].x[torch.arange(len(y)) % len(chooser.real[1].x)]
    answer = chooser.consider(5, draw)
    assert answer.best and chooser.best_step == 5 and json.loads(json.dumps(answer.card))['metric'] == 'selection' and answer.event['quality']
    counts = [torch.bincount(t, minlength=9) for t in (asked[0], chooser.real[0].y)]
    assert (counts[0] % counts[1] == 0).all()  # in the reals' composition, whole times
    again = open_chooser(data, n=30, file=file, progress=False).load_state_dict(json.loads(json.dumps(chooser.state_dict())))
    assert (again.best, again.best_step) == (chooser.best, 5)
    other = open_chooser(data, n=30, file=tmp_path/'other.safetensors', progress=False)
    state = chooser.state_dict() | dict(classifier='0123456789abcdef')
    with pytest.raises(InputError, match='0123456789abcdef'): other.load_state_dict(state)
    for metric in ('fd', 'none'):
        c = open_chooser(data, metric=metric, n=30, progress=False)
        assert c.load_state_dict(chooser.state_dict()).best_step is None  # scores of another kind
        assert c.consider(1, draw).best and c.consider(2, draw).best  # the newer of two that tie
        if metric == 'fd': assert len(c.y) == 60 and len(c.real) in map(len, (data.dataset('val'), data.dataset('train')))
