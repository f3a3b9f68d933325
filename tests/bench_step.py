"""How much faster a training step is than the same recipe written plainly: `python tests/bench_step.py [--preset demo]`.

Both run in one process, in turns, on the same batches, from the same weights; the medians and their ratio are printed.
Plainly written means: every sample's own convolution kernel in a grouped convolution; G runs once for the D step and again
for the G step; the encoder looks at the batch again whenever one of its features is needed; feature matching makes a D pass of
its own; D computes gradients of its weights in the G step.
"""
import argparse
import statistics
import time
from dataclasses import replace

import torch
from torch.nn import functional as F

import histogan.generator as generator
from histogan.config import PRESETS
from histogan.data import to_float
from histogan.encoder import load_encoder
from histogan.losses import d_adversarial, d_weights, drift, feature_matching, g_adversarial, layouts, pair_distance, pair_statistics, r1_due, weighted_sum
from histogan.step import build, optimizer_step, r1_of, train_step, weights_of_g

def grouped(conv, x, w, scales=None):
    "The modulated convolution with one kernel per sample, built and convolved in groups."
    n, c, h, wd = x.shape
    s = 1 + conv.style(w)  # (N, C)
    kernel = conv.weight[None]*s[:, None, :, None, None]  # (N, O, C, k, k)
    if conv.demodulate: kernel = kernel*conv.gain*(kernel.square().sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt()
    k, o = kernel.shape[-1], kernel.shape[1]
    y = F.conv2d(x.reshape(1, n*c, h, wd), kernel.reshape(n*o, c, k, k), padding=k//2, groups=n).reshape(n, o, h, wd)
    return y + conv.bias[:, None, None]

def plain_step(s, x, y):
    "One D and one G step in which nothing is shared."
    c = s.cfg.loss
    s.step += 1
    x = to_float(x)
    look = lambda im: s.encoder.encode(im) if s.encoder is not None and (s.cfg.heads or s.gate.alpha > 0) else None
    fresh = lambda: s.G(torch.randn(len(y), s.cfg.g.z_dim), y, torch.randn(len(y), s.cfg.g.z_dim) if s.cfg.g.use_style_mixing else None)
    with torch.no_grad(): fake, seen = fresh(), look(x)
    real_out, fake_out = s.D(x, y, s.gate.alpha, seen), s.D(fake, y, s.gate.alpha, look(fake))
    terms = dict(adv=torch.stack([d_adversarial(c)(r, f) for r, f in zip(real_out.logits, fake_out.logits)]).mean())
    if c.drift_eps: terms['drift'] = drift(real_out.logits[0])
    if r1_due(c, s.step): terms['r1'] = r1_of(s, x, y)
    loss, log = weighted_sum(terms, d_weights(c, s.step))
    optimizer_step(s, s.opt_D, loss, log)
    fake = fresh()
    with torch.no_grad(): real_out = s.D(x, y, s.gate.alpha, look(x))
    fake_out = s.D(fake, y, s.gate.alpha, look(fake))
    terms = dict(adv=torch.stack([g_adversarial(c)(f, r) for f, r in zip(fake_out.logits, real_out.logits)]).mean())
    if s.cfg.d.pixel and c.lambda_feature_matching: terms['feature_matching'] = feature_matching(s.D(fake, y, s.gate.alpha, look(fake)).feat, real_out.feat)
    if c.pair_weight:
        with torch.no_grad(): s.pair.update(pair_distance(pair_statistics(x, s.encoder.encode(x).maps)), y)
        terms['pair'] = s.pair.penalty(pair_distance(pair_statistics(fake, s.encoder.encode(fake).maps)), y)
    if c.layout_weight:
        terms['layout'] = s.layout.penalty(layouts(fake), y)
        s.layout.update(layouts(x), layouts(fake.detach()), y)
    loss, log = weighted_sum(terms, {k: w for k, w in weights_of_g(s).items() if k in terms})
    optimizer_step(s, s.opt_G, loss, log)

def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--preset', default='demo')
    ap.add_argument('--size', type=int, default=64, help='side of the images, px')
    ap.add_argument('--batch', type=int, default=16)
    ap.add_argument('--rounds', type=int, default=8, help='timed steps of each form')
    a = ap.parse_args()
    cfg = PRESETS[a.preset]
    cfg = replace(cfg, encoder='random:0' if cfg.heads else 'none', data=replace(cfg.data, image_size=a.size, batch_size=a.batch),
                  ada=replace(cfg.ada, enabled=False), run=replace(cfg.run, amp='off'), loss=replace(cfg.loss, lambda_stats=0., lambda_saturation=0., use_mixing_reg=False))
    encoder = load_encoder(cfg.encoder)
    fast, plain = (build(cfg, [str(k) for k in range(9)], encoder, 1000) for _ in range(2))
    y = torch.arange(a.batch//2).repeat_interleave(2) % 9
    x = torch.randint(0, 256, (a.batch, 3, a.size, a.size), dtype=torch.uint8)
    ours = generator.ModulatedConv2d.forward
    def timed(form):
        generator.ModulatedConv2d.forward = grouped if form == 'plain' else ours
        start = time.perf_counter()
        plain_step(plain, x, y) if form == 'plain' else train_step(fast, x, y)
        return time.perf_counter() - start
    times = dict(fast=[], plain=[])
    for k in range(a.rounds + 1):
        for form in times: times[form] += [timed(form)]*(k > 0)  # the first of each warms up
    generator.ModulatedConv2d.forward = ours
    med = {k: statistics.median(v) for k, v in times.items()}
    print(f"{a.preset}, {a.size} px, batch {a.batch}, {torch.get_num_threads()} threads: {med['fast']:.3f} s a step, plainly written {med['plain']:.3f} s, ratio {med['plain']/med['fast']:.2f}")

if __name__ == '__main__': main()
