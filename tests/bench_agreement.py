"""Does a finished run draw what it is asked for? `python tests/bench_agreement.py outputs/demo [--real ROOT]`.

A judge, a small classifier trained on patches that share no slide and no seed with the run's own (or, with --real, on half of
the folders' families), names 50 samples of `G_ema` per class. Printed: its accuracy on patches it has not seen; agreement =
share of samples it gives the class that was asked for, per class and overall; diversity = mean distance between samples of a
class over that between reals of it, in the judge's features and in pixels; layout = mean correlation of the low-pass luminance
of two samples of a class; fd = Fréchet distance in the judge's features, beside that between two sets of reals.
"""
import argparse, json, tempfile
from pathlib import Path

import numpy as np
import torch

from histogan.checkpoint import load_generator
from histogan.config import load_config
from histogan.data import DataConfig, open_data, to_float
from histogan.encoder import CNNConfig, train_cnn
from histogan.losses import pair_statistics
from histogan.phantom import make_phantom
from histogan.train import frechet, sample

def pixels(data, split):
    "(N, R, R, 3) uint8 and labels of one split."
    d = data.dataset(split)
    return d.pixels(np.arange(len(d))), d.labels

def judged_data(cfg, real, scratch):
    "Patches for the judge, split by slide or family: train for it, val and test to be compared with."
    if real: return open_data(DataConfig(root=real, image_size=cfg.data.image_size, val_frac=.3, test_frac=.3, seed=7, batch_size=2), progress=False)
    root = make_phantom(Path(scratch)/'judge', 500, cfg.data.image_size, seed=cfg.phantom.seed + 12345, slides=48, workers=2)
    return open_data(DataConfig(root=str(root), image_size=cfg.data.image_size, val_frac=.25, test_frac=.25, group_regex=r'-(s\d+)-', batch_size=2), progress=False)

@torch.no_grad()
def features(judge, x):
    parts = [judge.encode(p)[0] for p in x.split(64)]
    return torch.cat(parts)

def spread(f): return torch.pdist(f.flatten(1)).mean().item()

def layout(x):
    "Mean correlation of the layouts of two images."
    l = pair_statistics(x)['layout']
    c = l@l.T
    return ((c.sum() - c.diagonal().sum())/(len(l)*(len(l) - 1))).item()

@torch.no_grad()
def judgement(G, judge, sets, n, seed):
    "Every figure of the docstring, for one generator."
    (val, yv), (test, yt) = sets
    out, fakes, per = {}, [], []
    for c, name in enumerate(G.classes):
        fake = sample(G, torch.full((n,), c), seed=seed*1000 + c)
        real = to_float(torch.from_numpy(val[yv == c][:n]).permute(0, 3, 1, 2))
        f, r = features(judge, fake), features(judge, real)
        fakes.append(f)
        per.append(dict(name=name, agreement=(judge.classify(f).argmax(1) == c).float().mean().item(), features=spread(f)/spread(r),
                        pixels=spread(fake)/spread(real), layout=layout(fake), layout_real=layout(real)))
    reals = [features(judge, to_float(torch.from_numpy(x).permute(0, 3, 1, 2))).numpy() for x in (val, test)]
    mean = lambda k: float(np.mean([p[k] for p in per]))
    return dict(agreement=mean('agreement'), worst=min(p['agreement'] for p in per), diversity_features=mean('features'), diversity_pixels=mean('pixels'),
                layout=max(p['layout'] for p in per), fd=frechet(torch.cat(fakes).numpy(), reals[0]), fd_real=frechet(reals[1], reals[0]), classes=per)

def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('run')
    ap.add_argument('--real', default='', help='judge by the patches of this folder instead of the phantom')
    ap.add_argument('--n', type=int, default=50, help='samples of each class')
    ap.add_argument('--seed', type=int, default=1)
    ap.add_argument('--json', default='', help='file for all figures')
    a = ap.parse_args()
    cfg, G = load_config(a.run), load_generator(Path(a.run)/'artifacts'/'generator')
    with tempfile.TemporaryDirectory() as d:
        data = judged_data(cfg, a.real, d)
        judge, _ = train_cnn(*pixels(data, 'train'), len(data.classes), CNNConfig(steps=1200, seed=99))
        x, y = pixels(data, 'test')
        with torch.no_grad(): right = (judge(to_float(torch.from_numpy(x).permute(0, 3, 1, 2))).argmax(1).numpy() == y).mean()
        result = dict(judge=float(right)) | judgement(G, judge, (pixels(data, 'val'), (x, y)), a.n, a.seed)
    for k, v in result.items():
        if k != 'classes': print(f'{k}: {v:.3f}')
    for p in result['classes']: print(' '.join(f'{k}={v:.2f}' if isinstance(v, float) else f'{v:14}' for k, v in p.items()))
    if a.json: Path(a.json).write_text(json.dumps(result, indent=1))

if __name__ == '__main__': main()
