"""Does a finished run draw what it is asked for? `python tests/bench_accuracy.py outputs/demo [--classifier other_half.csv]`.

A held-out classifier that shares no slide and no seed with the run (on a phantom of its own; with --classifier, on the patches of
a manifest, for example the one `halves.py` wrote) evaluates samples of the best model. Printed are the figures of
`42_selection`, overall and per class, beside what the classifier makes of reals it has not seen. These reals are training
patches of the run and nothing else: its manifest also lists test patches, which come from other patients.
"""
import argparse, json, tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from histogan.checkpoint import load_generator
from histogan.config import load_config
from histogan.data import inspect, load_manifest, scan
from histogan.encoder import CNNConfig
from histogan.selection import SelectionConfig, quality, score, shortfalls
from histogan.classifier import fit_held_out, references
from histogan.phantom import make_phantom
from histogan.train import sample

CNN = CNNConfig(steps=1200, seed=99)

def pixels(df, size):
    "(N, R, R, 3) uint8 and class indices of a manifest."
    return inspect(df, size, cache_mb=4096, progress=False).images, pd.Categorical(df.label, sorted(set(df.label))).codes.astype(np.int64)

def of_phantom(cfg, scratch):
    "A classifier from slides that no run is trained on."
    df = scan(make_phantom(Path(scratch)/'classifier', 500, cfg.data.image_size, seed=cfg.phantom.seed + 12345, slides=48, workers=2), r'-(s\d+)-')
    x, y = pixels(df, cfg.data.image_size)
    return fit_held_out(x, y, y.max() + 1, df.group.to_numpy(), cfg=CNN)

def of_manifest(size, reals, path):
    "A classifier from one half of the patches; its reals are the training patches of the generator, the other half."
    mine, theirs = load_manifest(path), load_manifest(reals)
    x, y = pixels(mine[mine.split != 'test'], size)
    rx, ry = pixels(theirs[theirs.split == 'train'], size)  # not its val and test rows
    sets = references(ry, np.arange(len(ry)), np.ones(len(ry), bool), y.max() + 1)
    return fit_held_out(x, y, y.max() + 1, cfg=CNN, reals=[(rx[i], ry[i]) for i in sets])

def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('run', type=Path)
    ap.add_argument('--classifier', default='', help='manifest of patches that teach the classifier, in place of the phantom')
    ap.add_argument('--reals', type=Path, help='manifest of the patches it was trained on; needed for an exported generator')
    ap.add_argument('--n', type=int, default=100, help='samples of each class')
    ap.add_argument('--seed', type=int, default=1)
    ap.add_argument('--json', default='', help='file for all figures')
    a = ap.parse_args()
    G, reals = load_generator(a.run), a.reals or a.run/'artifacts'/'manifest.csv'
    with tempfile.TemporaryDirectory() as d:
        classifier = of_manifest(G.cfg.img_res, reals, a.classifier) if a.classifier else of_phantom(load_config(a.run), d)
    y = torch.arange(len(G.classes)).repeat_interleave(a.n)
    q, g = quality(classifier, (sample(G, y, seed=a.seed), y), classifier.reals), SelectionConfig()
    mean = lambda v: sum(v)/len(v)
    print(f'classifier on reals it has not seen {q.accuracy_real:.3f}; best model of step {G.card.get("step")}')
    print(f'accuracy {mean(q.accuracy):.3f}, worst class {min(q.accuracy):.2f}; diversity {mean(q.features):.2f} in features, {mean(q.pixels):.2f} in pixels; '
          f'layout {max(q.layout):.2f}; repeats {mean(q.repeats):.2f}, worst class {max(q.repeats):.2f}; FD {q.fd:.2f}, between reals {q.fd_real:.2f}, ratio {q.fd/q.fd_real:.1f}; score {score(g, q):.2f}')
    print('thresholds missed:', ', '.join(k for k, v in shortfalls(g, q).items() if v) or 'none')
    for k, name in enumerate(G.classes): print(f'{name:16} accuracy {q.accuracy[k]:.2f}, diversity {q.features[k]:.2f} {q.pixels[k]:.2f}, layout {q.layout[k]:.2f}, repeats {q.repeats[k]:.2f}')
    if a.json: Path(a.json).write_text(json.dumps(asdict(q) | dict(classes=G.classes), indent=1))

if __name__ == '__main__': main()
