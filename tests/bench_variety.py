"""How various are the samples of a run? `python tests/bench_variety.py RUN [RUN…] [--weights alexnet.pth] [--n 100]`.

RUN is a run's folder, or one of its checkpoints: those of one long run show what its length gives.

In the features of AlexNet, which no discriminator here trains with, patches enlarged to 128 px: n samples of each class against the class's training
patches, precision to nearest distance by `manifold_metrics`, repeats against as many reals, effective dimensions of w,
the frame at the border, and the Fréchet distance to the test patches over that of the training patches. Printed are a
table per class and the means. `--halves` measures one half of the training patches against the other instead of samples.
"""
import argparse, json, tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from histogan.checkpoint import load_generator
from histogan.config import load_config
from histogan.data import load_manifest, open_data, resize, to_float, to_uint8
from histogan.features import ALEXNET, FeatureCache, alexnet_extractor, features, find_weights
from histogan.log import sample
from histogan.metrics import class_gaps, manifold_metrics
from histogan.reals import split_of
from histogan.selection import TAIL, effective_dimensions, frame, frechet

PX = 128  # side of what AlexNet sees: its last maps are 7×7 then, and 3×3 at 64 px

def enlarged(x): return x if x.shape[1] >= PX else np.stack([resize(i, PX) for i in x])

def as_float(x): return to_float(torch.from_numpy(x).permute(0, 3, 1, 2))

def repeats(ex, fake, real, seed=1):
    "Share of the fakes that are nearer to another one than all but 5 % of as many reals are."
    k = min(len(fake), len(real))
    pick = np.random.default_rng(seed).permutation(len(real))[:k]
    return float((class_gaps(ex, fake[:k]) < class_gaps(ex, real[pick]).quantile(TAIL)).float().mean())

def one_class(cache, ex, fake, real):
    edge = frame(as_float(fake)) / frame(as_float(real))
    fake, real = enlarged(fake), enlarged(real)
    f, r = features(cache, ex, fake), features(cache, ex, real)
    return dict(repeats=repeats(ex, fake, real), **manifold_metrics(f, r), frame=edge), f, r

def halved(x, seed=0):
    i = np.random.default_rng(seed).permutation(len(x))
    return x[i[::2]], x[i[1::2]]

def home(run):
    "The run that a folder or a checkpoint belongs to."
    return Path(run) if Path(run).is_dir() else Path(run).parent.parent

def figures(run, cache, ex, n, seed, halves=False):
    G, run = load_generator(run), home(run)
    cfg = load_config(run)
    listed = load_manifest(run/'artifacts'/'manifest.csv', cfg.data.folder, test_root=cfg.data.test_root)
    data = open_data(cfg.data, manifest=listed)
    train, test = (split_of(data, s)[0] for s in ('train', 'test'))
    rows, fakes, reals = [], [], []
    for c, name in enumerate(G.classes):
        real = train.x[train.y == name]
        if halves: fake, real = halved(real)
        else: fake = to_uint8(sample(G, torch.full((n,), c), seed=seed + c)).permute(0, 2, 3, 1).numpy()
        row, f, r = one_class(cache, ex, fake[:n], real)
        z = G.draw_z(256, torch.Generator().manual_seed(seed))
        with torch.no_grad(): w = G.styles(z, torch.full((256,), c))[1]
        rows.append(dict(label=name, n=len(real), w_dims=effective_dimensions(w)) | row)
        fakes.append(f[:n])
        reals.append(r[:n])
    beside = features(cache, ex, enlarged(test.x))
    to_test = lambda x: frechet(np.concatenate(x), beside)
    return pd.DataFrame(rows), to_test(fakes) / to_test(reals)

def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('runs', nargs='+')
    ap.add_argument('--weights', default='', help="AlexNet's weights; default: where torch keeps them")
    ap.add_argument('--n', type=int, default=100, help='samples of each class')
    ap.add_argument('--seed', type=int, default=5)
    ap.add_argument('--halves', action='store_true', help='reals against reals')
    a = ap.parse_args()
    ex = alexnet_extractor(a.weights or find_weights(ALEXNET))
    with tempfile.TemporaryDirectory() as scratch: each(a, FeatureCache(scratch), ex)

def each(a, cache, ex):
    for run in a.runs:
        d, ratio = figures(run, cache, ex, a.n, a.seed, a.halves)
        mean = d.drop(columns=['label', 'n']).mean().round(3).to_dict()
        print(run, json.dumps(mean | {'FD to test, over that of reals': round(ratio, 2)}))
        print(d.round(2).to_string(index=False))

if __name__ == '__main__': main()
