"`--scale M` and `L`, trained: losses stay finite, G draws something, and a run that lost its last checkpoint comes to the same bits again."
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from conftest import run_cli
from histogan.checkpoint import checkpoint_path, load_checkpoint
from histogan.config import PRESETS, load_config, turned

STEPS, BATCH = 24, 8  # a batch of the dial's own would take minutes

def train(*options):
    done = run_cli(['histogan.train', *options])
    assert done.rc == 0, done.err
    return done

@pytest.mark.parametrize('scale', ['M', 'L'])
def test_a_mark_trains_and_goes_on(scale, tmp_path):
    whole, cut = tmp_path/'whole', tmp_path/'cut'
    train('--preset', 'smoke', '--scale', scale, '--run.steps', STEPS, '--data.batch-size', BATCH, '--run.save-every', 12, '--run.sample-every', 12, '--run.keep', 0, '--run.best-metric', 'none', '--out', whole)
    cfg, want = load_config(whole), turned(PRESETS['smoke'], scale)
    assert cfg.scale == scale and cfg.g.channels == want.g.channels != PRESETS['smoke'].g.channels
    assert (cfg.d.head_ch, cfg.g.z_dim, cfg.optim.lr_g) == (want.d.head_ch, want.g.z_dim, want.optim.lr_g)
    rows = pd.read_csv(whole/'metrics_gan.csv')
    assert len(rows) == STEPS and np.isfinite(rows[['d_loss', 'g_loss', 'd_grad_norm', 'g_grad_norm']]).all(axis=None) and rows.nonfinite_total.iloc[-1] == 0
    assert rows.n_img.iloc[-1] == STEPS*BATCH and rows.fake_mean_abs.iloc[-1] > 0
    shutil.copytree(whole, cut)
    checkpoint_path(cut, STEPS).unlink()
    train('--resume', cut)
    assert (whole/'metrics_gan.csv').read_bytes() == (cut/'metrics_gan.csv').read_bytes()
    ends = [load_checkpoint(checkpoint_path(run, STEPS))['G_ema'] for run in (whole, cut)]
    assert all(torch.equal(a, ends[1][k]) for k, a in ends[0].items())
    first = load_checkpoint(checkpoint_path(whole, STEPS//2))['G_ema']
    assert not all(torch.equal(a, ends[0][k]) for k, a in first.items())  # and it did go on learning
