"""What each mechanism changes in a short run: `python tests/bench_mechanisms.py [--steps 400] [--out table.csv]`.

The recipe (`poc`) at 32 px with an eighth of its channels, on the phantom, from one seed: once as it is, then once per mechanism
with only that one switched off, and once with smoothing's shifted scale read at its equilibrium. The freezes of ADA and of the
gate are shortened from 500 to 50 steps so that they could act. One row per run: medians over its last quarter, and samples of G
itself, not of its average, at the end.
"""
import argparse, tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from histogan.config import PRESETS
from histogan.core import write_table
from histogan.data import load_manifest, open_data, to_float
from histogan.log import sample
from histogan.selection import open_chooser
from histogan.train import train

def base(out, steps):
    "The recipe, narrow and short."
    c = PRESETS['poc']
    return replace(c, out=str(out), encoder='random:1', data=replace(c.data, root='phantom', image_size=32, batch_size=16, test_frac=0.),
                   phantom=replace(c.phantom, per_class=120), g=replace(c.g, fmap_base=64, fmap_min=16, z_dim=64, w_dim=64, n_layers=4),
                   d=replace(c.d, d_base_ch=24), ada=replace(c.ada, ada_freeze_until=50), gate=replace(c.gate, alpha_freeze_until=50),
                   optim=replace(c.optim, total_steps_estimate=0), run=replace(c.run, steps=steps, n_eval=270))

def variants(c):
    "Name -> configuration with one thing changed."
    loss, off = c.loss, lambda **kw: replace(c, loss=replace(c.loss, **kw))
    return {'as it is': c, 'without R1': off(r1_gamma=0.), 'without drift': off(drift_eps=0.), 'without label smoothing': off(adversarial='logistic'),
            'without colour statistics': off(lambda_stats=0.), 'without perceptual': off(lambda_perceptual=0.), 'without saturation penalty': off(lambda_saturation=0.),
            'without feature matching': off(lambda_feature_matching=0.), 'without mixing term': off(use_mixing_reg=False),
            'without style mixing': replace(c, g=replace(c.g, use_style_mixing=False)), 'without ADA': replace(c, ada=replace(c.ada, enabled=False)),
            'without gate (alpha 0)': replace(c, gate=replace(c.gate, alpha_max=0.)),
            'straight-through clamp': replace(c, g=replace(c.g, output_clamp='straight_through')),
            'accuracy read at equilibrium': replace(c, ada=replace(c.ada, acc_threshold='equilibrium'))}

def measure(cfg):
    "One run; what it came to."
    rows = []
    s = train(cfg, hook=lambda s, row, verdicts: rows.append(row))
    data = open_data(cfg.data, manifest=load_manifest(Path(cfg.out, 'artifacts', 'manifest.csv'), cfg.data.folder))
    last = rows[-len(rows)//4:]
    mid = lambda k: float(np.median([r[k] for r in last if r.get(k) is not None]))
    y = torch.arange(len(s.classes)).repeat_interleave(12)
    s.G_ema.load_state_dict(s.G.state_dict())  # so short a run has hardly moved an average of half-life 22,000 images
    fake, real = sample(s.G_ema, y), to_float(torch.cat([x for x, _, _ in data.loader_real_eval]))
    spread = lambda x: torch.pdist(x.flatten(1)).mean().item()
    per_class = np.mean([spread(f) for f in fake.split(12)])
    reals = data.dataset('val')
    within = np.mean([spread(real[torch.as_tensor(reals.labels == c)][:12].cpu()) for c in range(len(s.classes))])
    chooser = open_chooser(data, metric='fd', n=s.cfg.run.n_eval)
    fd = chooser.consider(s.step, lambda y: sample(s.G_ema, y)).card['value']
    return dict(acc_ema=mid('acc_ema'), ada_p=s.ada.p, alpha=s.gate.alpha, d_grad=mid('d_grad_norm'), g_grad=mid('g_grad_norm'),
                saturated=float((fake.abs() >= 0.895).float().mean()), diversity=float(per_class/within), fd=fd)

def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--steps', type=int, default=400)
    ap.add_argument('--out', default='', help='CSV to write')
    a = ap.parse_args()
    table = []
    with tempfile.TemporaryDirectory() as d:
        for k, (name, cfg) in enumerate(variants(base(Path(d)/'0', a.steps)).items()):
            table.append(dict(run=name) | measure(replace(cfg, out=str(Path(d)/str(k)))))
            print(' | '.join(f'{v:.3g}' if isinstance(v, float) else str(v) for v in table[-1].values()), flush=True)
    if a.out: write_table(a.out, pd.DataFrame(table))

if __name__ == '__main__': main()
