"What a step costs where no GPU is at hand: questions to the device after a resume, and operations whose order CUDA does not fix."
import copy

import pytest
import torch

from histogan import blocks
from histogan.device import count_syncs, nondeterministic, set_arithmetic
from histogan.encoder import load_encoder
from histogan.plain import CLASSES, batch_of, bench_config, plain_step, twins
from histogan.state import build, load_state_dict, state_dict
from histogan.step import settle, take_step, train_step

def config(preset, fmap_base=0, **run): return bench_config(preset, 16, 4, fmap_base or 64*(preset == 'poc'), **run)

def started(preset, **run):
    cfg = config(preset, **run)
    s = build(cfg, [str(k) for k in range(CLASSES)], load_encoder(cfg.encoder), 1000)
    return s, *batch_of(cfg)

@pytest.mark.parametrize('fused', [True, False])
@pytest.mark.parametrize('preset', ['modern', 'poc'])
def test_adam_asks_nothing_after_a_resume(preset, fused):
    "186 questions a step, were its counters left where a file put them, or Adam taken parameter by parameter as an earlier version wrote it."
    s, x, y = started(preset, log_every=10)
    take_step(s, x, y)
    settle(s)
    saved = copy.deepcopy(state_dict(s))
    for opt in ('opt_G', 'opt_D'):
        for group in saved[opt]['param_groups']: group['fused'] = fused
    again, x, y = started(preset, log_every=10)
    load_state_dict(again, saved)
    def ten():
        for _ in range(10): take_step(again, x, y)
        settle(again)
    assert count_syncs(ten).total() == 1
    for opt in (again.opt_G, again.opt_D):
        assert all(v['step'].device == p.device and v['step'] == 11 for p, v in opt.state.items())

@pytest.mark.parametrize('preset', ['modern', 'poc'])
def test_a_fixed_order_where_it_is_asked_for(preset):
    "No operation of a step is on PyTorch's list of those without one on CUDA; without the option some are, so the list is read."
    try:
        s, x, y = started(preset, deterministic=True)
        train_step(s, x, y)
        assert not nondeterministic(lambda: train_step(s, x, y))
    finally: set_arithmetic()
    s, x, y = started(preset)
    train_step(s, x, y)
    assert 'upsample_bilinear2d_backward' in nondeterministic(lambda: train_step(s, x, y))

@pytest.mark.parametrize('preset, steps, passes', [('modern', 3, 1), ('poc', 1, 2)])
def test_wide_layers_take_the_short_way_and_change_no_loss(preset, steps, passes, monkeypatch):
    "Losses are those of the plain form, whose convolutions are written out; later steps of `poc` part by themselves, whichever way they go."
    cfg, way, used = config(preset, 128), blocks.winograd, []
    ours, plain = twins(cfg, 'off')
    x, y = batch_of(cfg)
    monkeypatch.setattr(blocks, 'winograd', lambda *of: (used.append(of), way(*of))[1])
    for k in range(steps):
        row, _ = train_step(ours, x, y)
        assert (row['d_loss'], row['g_loss']) == pytest.approx(plain_step(plain, x, y), rel=1e-5, abs=1e-5)
    assert len(used) == 4*steps*passes  # each block has two, four of them of 128 channels
