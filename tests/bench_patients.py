"""How close honest patches of the training patients seem: `python tests/bench_patients.py FOLDER`, the folder that holds `histo5_128` and its MANIFEST.csv.

Training set: half of the tiles of the bone tumour patients in `train`. In place of fakes: 100 patches per class of the other tiles
of the same patients. Held-out reals: the patient in `test`. 64 px, layout of an untrained network. Prints the share of the
"fakes" in the lowest twentieth of the held-out reals, by absolute and by relative distance.
"""
import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from histogan.copying import NEXT, layout_extractor, nearest, pixel_extractor, relative, tails
from histogan.data import read_rgb, resize
from histogan.encoder import random_encoder
from histogan.features import to_batch
from histogan.selection import poses

def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('folder', type=Path)
    a = ap.parse_args()
    df = pd.read_csv(a.folder/'histo5_128'/'MANIFEST.csv')
    bone = df[df.label.str.startswith('bone')]
    train, tiles = bone[bone.split == 'train'], bone[bone.split == 'train'].source_path.unique()
    mine = train.source_path.isin(np.random.default_rng(0).permutation(tiles)[:len(tiles)//2])
    sets = dict(train=train[mine], honest=train[~mine].groupby('label').head(100), held=bone[bone.split == 'test'])
    x = {k: np.stack([resize(read_rgb(a.folder/p), 64) for p in d.path]) for k, d in sets.items()}
    print({k: len(v) for k, v in x.items()})
    for ex in (pixel_extractor(), layout_extractor(random_encoder(0).calibrate(x['train']), 'untrained')):
        encode = lambda p: torch.cat([ex.encode(b) for b in p.split(64)]).numpy()
        known = encode(to_batch(x['train']))
        dist = {k: nearest([encode(t) for t in poses(to_batch(x[k]))], known, 1 + NEXT)[0] for k in ('honest', 'held')}
        for name, f in dict(absolute=lambda d: d[:, 0], relative=relative).items():
            t = tails(f(dist['honest']), f(dist['held']))
            print(ex.name, name, *(f'{k}: {v.share:.1%} (p = {v.p:.0e}, flagged {v.flagged})' for k, v in t.items()), sep='; ')

if __name__ == '__main__':
    with torch.no_grad(): main()
