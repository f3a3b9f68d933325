"""How large is each term of G's loss in a run? `python tests/bench_terms.py [--steps 60] [--out nbs/terms.csv]`.

The original recipe (`poc`), narrowed as `histogan.ablate` narrows it, at 32 px on the phantom, with an untrained encoder for the
perceptual term. Every tenth step: each term as it is, before its weight. `thresholds` draws their medians.
"""
import argparse, csv, tempfile
from pathlib import Path

from histogan.ablate import D_WIDTH, override, recipe
from histogan.config import modern
from histogan.step import train_step
from histogan.train import batches, open_run

TERMS = ('g_adv', 'g_stats', 'g_perceptual', 'g_saturation', 'g_feature_matching', 'g_mixing')

def trace(cfg):
    "One run, every tenth step."
    s, data, _ = open_run(cfg)
    steps = batches(data)
    for _ in range(s.total):
        x, y, *_ = next(steps)
        row, _ = train_step(s, x, y)
        if s.step % 10 == 0: yield dict(step=s.step) | {k: float(f'{row[k]:.4g}') for k in TERMS}

def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--steps', type=int, default=60)
    ap.add_argument('--out', default='nbs/terms.csv')
    a = ap.parse_args()
    with tempfile.TemporaryDirectory() as d:
        base = override(modern(32), {'data.root': 'phantom', 'run.steps': a.steps, 'd.d_base_ch': D_WIDTH, 'encoder': 'random:0',
                                     'phantom.per_class': 40, 'run.amp': 'off', 'out': str(Path(d, 'run'))})
        rows = list(trace(recipe(base)))
    with open(a.out, 'w', newline='') as f:
        w = csv.DictWriter(f, list(rows[0]), lineterminator='\n')
        w.writeheader()
        w.writerows(rows)

if __name__ == '__main__': main()
