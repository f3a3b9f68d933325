"""What do half and double of a constant do? `python tests/bench_constants.py [--steps 150] [--seeds 2] [--out nbs/constants.csv]`.

`modern` at 32 px on the phantom, cut to a short run, once as it is and once with each constant halved and doubled, for each seed. Each
row is one run: samples of the EMA generator by the held-out classifier of `histogan.ablate`, 40 of each class. `thresholds` draws them.
"""
import argparse, tempfile
from pathlib import Path

import pandas as pd

from histogan.ablate import figures, held_out, measure, override, train_row
from histogan.config import modern
from histogan.core import write_table

CONSTANTS = ('loss.adv_weight', 'optim.grad_clip', 'd.head_ch', 'd.head_in', 'g.z_dim', 'g.w_dim', 'optim.warmup', 'optim.lr_final_ratio')

def scaled(factor):
    "A constant times a factor; a count stays one."
    return lambda v: type(v)(v * factor)

def one(base, out, classifier, changes, n):
    "The figures of one run."
    s, seconds, stopped = train_row(override(base, changes | {'out': str(out)}))
    found, _ = measure(s, classifier, n)
    return figures(found | dict(steps=s.step, seconds=seconds))

def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--steps', type=int, default=150)
    ap.add_argument('--seeds', type=int, default=2)
    ap.add_argument('--out', default='nbs/constants.csv')
    a, rows = ap.parse_args(), []
    with tempfile.TemporaryDirectory() as d:
        base = override(modern(32, pair_weight=0.5), {'data.root': 'phantom', 'phantom.per_class': 60, 'run.steps': a.steps, 'run.amp': 'off'})
        classifier = held_out(base, Path(d, 'cache'), 60, 150)
        for seed in range(a.seeds):
            for name, factor in [('', 1.)] + [(c, f) for c in CONSTANTS for f in (.5, 2.)]:
                changes = {'run.seed': seed} | ({name: scaled(factor)} if name else {})
                found = one(base, Path(d, f'run{len(rows)}'), classifier, changes, 40)
                kept = {k: float(f'{found[k]:.4g}') for k in ('accuracy', 'features', 'pixels', 'layout', 'fd')}
                rows.append(dict(constant=name, factor=factor, seed=seed) | kept)
                write_table(a.out, pd.DataFrame(rows))

if __name__ == '__main__': main()
