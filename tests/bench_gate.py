"""Does the encoder come into play? `python tests/bench_gate.py [--steps 1200] [--out nbs/gate_trace.csv]`.

The recipe (`poc`), narrowed as `histogan.ablate` narrows it, at 32 px on the phantom, with `--encoder cnn`: as it is, with the
accuracy read at smoothing's equilibrium, with the logistic loss, and with the logistic loss and a gate at 0.40 / 0.30 in place of
0.78 / 0.70. Every tenth step: the smoothed accuracy, alpha, the perceptual loss, and how far the duet logit of reals lies above
that of fakes.
"""
import argparse, tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from histogan.ablate import D_WIDTH, override, recipe
from histogan.config import on_phantom
from histogan.core import write_table
from histogan.data import load_manifest, open_data
from histogan.reals import split_of
from histogan.step import draw_fakes, prepare_batch
from histogan.train import train

RUNS = {'as it is': {}, 'equilibrium': {'ada.acc_threshold': 'equilibrium'}, 'logistic': {'loss.adversarial': 'logistic'},
        'logistic, gate at 0.40': {'loss.adversarial': 'logistic', 'gate.acc_gate_hi': .4, 'gate.acc_gate_lo': .3}}

@torch.no_grad()
def duet_gap(s, x, y):
    "Mean duet logit of a batch of reals minus that of as many fakes."
    x, y = prepare_batch(s, x, y)
    fakes = draw_fakes(s, y, True)
    real, fake = (s.D.duet(v.float()).mean() for v in (s.encoder(x), fakes.encoded.vector))
    return (real - fake).item()

def some_reals(cfg, classes):
    "Two training patches of each class, and their labels."
    listed = load_manifest(Path(cfg.out, 'artifacts', 'manifest.csv'), cfg.data.folder)
    p, _ = split_of(open_data(cfg.data, manifest=listed), 'train', 2)
    return torch.as_tensor(np.asarray(p.x)).permute(0, 3, 1, 2), torch.tensor([classes.index(c) for c in p.y])

def trace(cfg):
    "One run, every tenth step."
    rows, reals = [], []
    def note(s, row, verdicts):
        if s.step % 10: return
        if not reals: reals.extend(some_reals(cfg, s.classes))
        rows.append(dict(step=s.step, acc_ema=row['acc_ema'], alpha=row['alpha'], perceptual=row['g_perceptual'], duet_gap=duet_gap(s, *reals)))
    train(cfg, hook=note)
    return rows

def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--steps', type=int, default=1200)
    ap.add_argument('--out', default='gate_trace.csv')
    a = ap.parse_args()
    base = override(on_phantom(32), {'run.steps': a.steps, 'run.best_metric': 'none', 'd.d_base_ch': D_WIDTH})
    rows = []
    with tempfile.TemporaryDirectory() as d:
        for k, (name, changes) in enumerate(RUNS.items()):
            rows += [dict(run=name) | {k: v if k == 'step' else f'{v:.4g}' for k, v in r.items()} for r in trace(override(recipe(base), changes | {'out': str(Path(d)/str(k))}))]
            print(name, rows[-1], flush=True)
    write_table(a.out, pd.DataFrame(rows))

if __name__ == '__main__': main()
