"""How large is each term of G's loss in a run? `python tests/bench_terms.py [--steps 60] [--out nbs/terms.csv]`.

The original recipe (`poc`), narrowed as `histogan.ablate` narrows it, at 32 px on the phantom, with an untrained encoder for the
perceptual term. Every tenth step: each term as it is, before its weight. `thresholds` draws their medians.
"""
import argparse, tempfile
from pathlib import Path

import pandas as pd

from histogan.ablate import D_WIDTH, override, recipe
from histogan.config import on_phantom
from histogan.core import write_table
from histogan.train import train

TERMS = ('g_adv', 'g_stats', 'g_perceptual', 'g_saturation', 'g_feature_matching', 'g_mixing')

def trace(cfg):
    "One run, every tenth step."
    rows = []
    def note(s, row, verdicts):
        if s.step % 10 == 0: rows.append(dict(step=s.step) | {k: float(f'{row[k]:.4g}') for k in TERMS})
    train(cfg, hook=note)
    return rows

def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--steps', type=int, default=60)
    ap.add_argument('--out', default='nbs/terms.csv')
    a = ap.parse_args()
    with tempfile.TemporaryDirectory() as d:
        base = override(on_phantom(32), {'run.steps': a.steps, 'd.d_base_ch': D_WIDTH, 'encoder': 'random:0',
                                     'phantom.per_class': 40, 'run.amp': 'off', 'out': str(Path(d, 'run'))})
        rows = trace(recipe(base))
    write_table(a.out, pd.DataFrame(rows))

if __name__ == '__main__': main()
