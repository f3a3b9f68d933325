"""The first hour on a machine with a GPU, in slices of at most nine minutes: `python tests/gpu_hour.py SLICE [--out DIR] [--toy] [--real FOLDER]`.

checks                what differs on CUDA: half precisions, compiling, the same bits again, a resume to the bit, patches kept on the device
bench                 a step of `poc` and of `modern` at 256 px, batch 8 and 32: plain float32, ours in float32, bf16 and, where there is the option, compiled;
                      share of the measured matmul peak, peak memory, kernels that take most of the time
phantom-S, phantom-M  `modern` at 256 px on phantom patches at two marks of the dial: a grid of samples, the held-out classifier's figures, and precision,
                      recall, density and coverage in features that D has never seen
real-S, real-M        the same on a folder of patches given with --real

A slice writes DIR/SLICE.json after each part and goes on where it stopped: the same command again does what is left. A part that would not end in time is
left to the next call, a training saves a minute before the time is up. What cannot be done is
written down with its reason. Nothing is fetched. With --toy everything runs in a minute on a CPU.
"""
import argparse
import json
import signal
import sys
import time
import traceback
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch

from histogan.bench import BenchArgs, compared, machine, peak_bytes, race
from histogan.checkpoint import checkpoints, load_generator
from histogan.config import PRESETS, RunConfig, load_config, modern, pick_device, turned
from histogan.core import Stopped, write_file, write_json
from histogan.data import load_manifest
from histogan.encoder import load_encoder
from histogan.images import read_rgb, resize
from histogan.log import grid_image, sample
from histogan.metrics import manifold_metrics
from histogan.plain import CLASSES, batch_of, bench_config, plain_state, plain_step
from histogan.state import build, load_state_dict, state_dict
from histogan.step import train_step
from histogan.train import train

MINUTES = 8.5  # of nine: the rest is for starting
HAS = {f.name for f in fields(RunConfig)}

class Skip(Exception):
    "A part that this machine or this version cannot do; its words are the reason."

def need(option):
    if option not in HAS: raise Skip(f'there is no option run.{option}')

def need_cuda():
    if not torch.cuda.is_available(): raise Skip('there is no CUDA device')

def config(a, preset, batch=8, **run):
    "A preset at 256 px, or at the toy's size."
    cfg = bench_config(preset, 16 if a.toy else 256, 4 if a.toy else batch, **run)
    return replace(cfg, g=replace(cfg.g, channels=(), fmap_base=64)) if a.toy and preset == 'poc' else cfg

def ours(cfg):
    "A state, and a function that does a step and gives its row."
    device = pick_device(cfg)
    s = build(cfg, [str(k) for k in range(CLASSES)], load_encoder(cfg.encoder, device=str(device)), 1000)
    x, y = batch_of(cfg, s.device)
    return s, lambda: train_step(s, x, y)[0]

def losses(cfg, steps=4):
    "Losses of some steps; the log is read at each."
    _, step = ours(replace(cfg, run=replace(cfg.run, log_every=1)) if 'log_every' in HAS else cfg)
    return [[float(row[k]) for k in ('d_loss', 'g_loss')] for row in (step() for _ in range(steps))]

def weights(s): return torch.cat([p.detach().float().flatten().cpu() for net in (s.G, s.D, s.G_ema) for p in net.parameters()])

# slice (a)

def check_half(a, amp, preset):
    if amp == 'fp16': need_cuda()
    full, half = losses(config(a, preset)), losses(config(a, preset, amp=amp))
    assert np.isfinite(half).all(), f'not finite: {half}'
    far = float(np.abs(np.array(half[0]) - full[0]).max())
    assert far < .1, f'the first losses differ by {far}'
    return dict(losses=half, float32=full, first_differs_by=far)

def check_compile(a, preset):
    need('compile')
    eager, compiled = losses(config(a, preset)), losses(config(a, preset, compile=True))
    far = float(np.abs(np.array(compiled[0]) - eager[0]).max())
    assert far < 1e-2, f'the first losses differ by {far}'
    return dict(losses=compiled, eager=eager, first_differs_by=far)

def check_bits(a, preset):
    "Two runs of the same steps, and a third that is saved and loaded in the middle."
    if torch.cuda.is_available(): need('deterministic')
    cfg = config(a, preset, **dict(deterministic=True) if 'deterministic' in HAS else {})
    found = []
    for cut in (0, 0, 3):
        s, step = ours(cfg)
        for k in range(6):
            if cut and k == cut:
                saved = state_dict(s)
                s, step = ours(cfg)
                load_state_dict(s, json_free(saved))
            step()
        found.append(weights(s))
    same = dict(again=bool(torch.equal(found[0], found[1])), resumed=bool(torch.equal(found[0], found[2])))
    assert all(same.values()), f'not the same bits: {same}'
    return same

def json_free(saved):
    "A checkpoint as it comes back from a file."
    import io
    file = io.BytesIO()
    torch.save(saved, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)

def check_data(a):
    "A run whose patches lie on the device has the losses of one that reads them from memory."
    from histogan.data import DataConfig
    if 'on_device' not in {f.name for f in fields(DataConfig)}: raise Skip('there is no option data.on_device')
    base, found = PRESETS['smoke'], {}
    for how in ('on', 'off'):
        rows, out = [], Path(a.out, f'data-{how}')
        run = replace(base.run, steps=6, best_metric='none', **dict(log_every=1) if 'log_every' in HAS else {})
        cfg = replace(base, out=str(out), run=run, data=replace(base.data, on_device=how))
        train(cfg, resume=(out/'config.json').exists(), hook=lambda s, row, verdicts: rows.append([row['d_loss'], row['g_loss']]))
        found[how] = rows
    assert len(found['on']) == len(found['off']) and np.allclose(found['on'], found['off'], rtol=1e-3), found
    return found

def checks(a):
    parts = {f'{amp} {preset}': lambda amp=amp, preset=preset: check_half(a, amp, preset) for preset in ('modern', 'poc') for amp in ('bf16', 'fp16')}
    parts |= {f'{name} {preset}': lambda check=check, preset=preset: check(a, preset) for preset in ('modern', 'poc') for name, check in (('compile', check_compile), ('bits', check_bits))}
    return parts | {'data on the device': lambda: check_data(a)}

# slice (b)

def timed(a, preset, batch):
    "One cell of the table: every form in turns, and what each makes of the machine."
    from torch.utils.flop_counter import FlopCounterMode
    cfg = config(a, preset, batch)
    device = pick_device(cfg)
    kinds = dict(float32={}, bf16=dict(amp='bf16')) | (dict(compiled=dict(amp='bf16', compile=True)) if 'compile' in HAS else {})
    forms = {name: ours(config(a, preset, batch, **how))[1] for name, how in kinds.items()}
    plain = plain_state(cfg, [str(k) for k in range(CLASSES)], load_encoder(cfg.encoder, device=str(device)))
    x, y = batch_of(cfg, device)
    forms['plain'] = lambda: plain_step(plain, x, y)
    wait = torch.cuda.synchronize if device.type == 'cuda' else lambda: None
    for form in forms.values(): form()
    with FlopCounterMode(display=False) as counted: forms['float32']()
    peak, found = matmul_peak(a, device), race(forms, 1 if a.toy else 20, wait)
    out = dict(gflop_per_image=counted.get_total_flops() / len(y) / 1e9, peak_tflops=peak, forms={})
    if 'compile' not in HAS: out['compiled'] = 'skipped: there is no option run.compile'
    for name, t in found.items():
        row, speed = compared(name, t, found['plain']), counted.get_total_flops() / np.median(t) / 1e12
        of = peak['float32' if name in ('float32', 'plain') else 'bf16']
        out['forms'][name] = row._asdict() | dict(images_per_second=len(y) / row.ours, share_of_peak=speed / of, peak_mib=peak_bytes(forms[name], device.type) / 2**20)
    return out

def matmul_peak(a, device):
    "TFLOP/s of a large product of matrices, in float32 and in bf16."
    n, found = 256 if a.toy else 8192 if device.type == 'cuda' else 1024, {}
    for name, kind in (('float32', torch.float32), ('bf16', torch.bfloat16)):
        m = torch.randn(n, n, device=device, dtype=kind)
        t = race(dict(m=lambda: m @ m), 5, torch.cuda.synchronize if device.type == 'cuda' else lambda: None)['m']
        found[name] = float(2*n**3/np.median(t)/1e12)
    return found

def profile(a, preset):
    "The kernels of a step in bf16 that take most of the time."
    from torch.profiler import ProfilerActivity, profile as recorded
    s, step = ours(config(a, preset, 32, amp='bf16'))
    for _ in range(1 if a.toy else 3): step()
    cuda = s.device.type == 'cuda'
    with recorded(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA]*cuda]) as p: step()
    by = 'self_device_time_total' if cuda else 'self_cpu_time_total'
    rows = sorted(p.key_averages(), key=lambda e: -getattr(e, by))[:25]
    return [dict(name=e.key[:80], calls=e.count, microseconds=getattr(e, by)) for e in rows]

def bench(a):
    parts = {f'{preset}, batch {n}': lambda preset=preset, n=n: timed(a, preset, n) for preset in ('poc', 'modern') for n in (8, 32)}
    return parts | {f'profile of {preset}': lambda preset=preset: profile(a, preset) for preset in ('poc', 'modern')}

# slice (c)

def run_config(a, scale, root):
    "`modern` at a mark of the dial."
    if a.toy: base = replace(PRESETS['smoke'], run=replace(PRESETS['smoke'].run, steps=4, sample_every=4, save_every=2, best_metric='none'))
    else: base = turned(modern(256), scale)
    if a.toy and scale != 'S': base = replace(turned(base, scale), run=base.run)
    cfg = replace(base, out=str(Path(a.out, f'run-{a.slice}')), data=replace(base.data, root=root))
    if a.toy: return cfg
    return replace(cfg, phantom=replace(cfg.phantom, per_class=500), run=replace(cfg.run, save_every=500, sample_every=500, amp='bf16' if torch.cuda.is_available() else 'off'))

def trained(a, scale, root, deadline):
    "Train until the time is up; the next call goes on."
    cfg, rows = run_config(a, scale, root), []
    folder, resume = Path(cfg.out), Path(cfg.out, 'config.json').exists()
    if resume: cfg = replace(load_config(folder), out=str(folder))
    began, ended, asked = time.monotonic(), 'trained to its end', []
    def hook(s, row, verdicts):
        "Asks the run to save and end a minute before the time is up, whatever opening it took."
        rows.append((s.step, time.monotonic()))
        if time.monotonic() > deadline - 60 and not asked: asked.append(signal.raise_signal(signal.SIGINT))
    try: train(cfg, resume=resume, hook=hook)
    except Stopped as e:
        if e.code != 130: raise
        ended = str(e)
    (first, t0), (last, t1) = rows[0] if rows else (0, began), rows[-1] if rows else (0, began)
    speed = cfg.data.batch_size*(last - first)/(t1 - t0) if t1 > t0 else None
    return dict(ended=ended, last_step=last, images_per_second=speed, scale=cfg.scale, batch=cfg.data.batch_size, finished=last >= cfg.run.steps > 0 or ended == 'trained to its end')

def judged(a):
    "The newest samples: a grid, and their features beside those of reals that were held back."
    folder = Path(a.out, f'run-{a.slice}')
    G = load_generator(checkpoints(folder)[-1], 'cuda' if torch.cuda.is_available() else 'cpu')
    size, n = load_config(folder).data.image_size, 4 if a.toy else 100
    df = load_manifest(folder/'artifacts'/'manifest.csv')
    held = df[df.split != 'train'] if (df.split != 'train').sum() >= 3*n else df
    per = [g.head(n) for _, g in held.groupby('label')]
    real = np.stack([resize(read_rgb(p), size) for g in per for p in g.path])
    y = torch.tensor([G.classes.index(g.label.iloc[0]) for g in per for _ in range(len(g))], device=next(G.parameters()).device)
    fake = sample(G, y, seed=1)
    grid = sample(G, torch.arange(len(G.classes), device=y.device).repeat_interleave(8), seed=2)
    write_file(Path(a.out, f'{a.slice}.jpg'), lambda f: grid_image(grid, G.classes).save(f, 'JPEG', quality=88))
    never = load_encoder('random:7', device=str(y.device))  # D's encoder has other weights
    x = torch.from_numpy(real).permute(0, 3, 1, 2).float()/127.5 - 1
    with torch.no_grad(): f, r = (np.concatenate([never.encode(p.to(y.device))[0].cpu().numpy() for p in t.split(64)]) for t in (fake, x))
    return dict(manifold_metrics(f, r), fakes=len(f), reals=len(r), held_back=bool(len(held) < len(df)))

def quality_rows(a):
    "What the run's own selection said of its checkpoints: the held-out classifier's figures."
    events = Path(a.out, f'run-{a.slice}', 'events.jsonl')
    found = sorted(Path(a.out, f'run-{a.slice}').rglob('*event*')) if not events.exists() else [events]
    lines = [json.loads(s) for p in found if p.suffix in ('.jsonl', '.json') for s in p.read_text().splitlines() if s.startswith('{')]
    return [e for e in lines if e.get('guard') == 'selection'][-20:]

def training(a, deadline):
    kind, scale = a.slice.split('-')
    if kind == 'real' and not a.real: return {'train': _no_folder}
    root = a.real if kind == 'real' else 'phantom'
    return dict(train=lambda: trained(a, scale, root, deadline), judge=lambda: judged(a), quality=lambda: quality_rows(a))

def _no_folder(): raise Skip('no folder of patches was given with --real')

# a slice

SLICES = ('checks', 'bench', 'phantom-S', 'phantom-M', 'real-S', 'real-M')

def attempt(part):
    "What a part gave, or why it gave nothing."
    try: return dict(ok=True, found=part())
    except Skip as e: return dict(ok=None, skipped=str(e))
    except Exception as e:  # one part that fails must not cost the others their hour
        return dict(ok=False, failed=f'{type(e).__name__}: {e}'[:2000], where=traceback.format_exc()[-2000:])

def again(part):
    "Is a part of an earlier call to be done once more? A training that stopped is, and so is what looks at it."
    return not part['ok'] or isinstance(part['found'], dict) and part['found'].get('finished') is False

def lasts(table, name):
    "Seconds that a part will take: what it took before, or the longest of the others."
    took = {k: p['seconds'] for k, p in table['parts'].items()}
    return took.get(name, max(took.values(), default=0))

def main(argv=None):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('slice', choices=SLICES)
    ap.add_argument('--out', default='gpu_hour', help='folder for JSON, pictures and runs')
    ap.add_argument('--toy', action='store_true', help='sizes for a CPU')
    ap.add_argument('--real', default='', help='folder of patches, a folder per class')
    ap.add_argument('--minutes', type=float, default=MINUTES, help='no part begins that would not end by then; the first of a call does')
    a = ap.parse_args(argv)
    deadline, file = time.monotonic() + 60*a.minutes, Path(a.out, f'{a.slice}.json')
    file.parent.mkdir(parents=True, exist_ok=True)
    table = json.loads(file.read_text()) if file.exists() else dict(parts={})
    table['made'] = machine(BenchArgs())
    parts = checks(a) if a.slice == 'checks' else bench(a) if a.slice == 'bench' else training(a, deadline)
    trains, begun = 'train' in parts, False
    for name, part in parts.items():
        was = table['parts'].get(name)
        if was and not again(was) and not (trains and name != 'train' and table.get('went_on')): continue
        if not trains and time.monotonic() + (lasts(table, name) if begun else 0) > deadline: break
        began, begun = time.monotonic(), True
        table['parts'][name] = attempt(part) | dict(seconds=round(time.monotonic() - began, 1))
        table['went_on'] = trains  # what looks at a training is done again after it
        write_json(file, table)
        done = table['parts'][name]
        print(f"{name}: {'done' if done['ok'] else done.get('skipped') or done.get('failed')} ({done['seconds']} s)", flush=True)
        if trains and name == 'train' and not done['ok']: break
    table['went_on'] = False
    table['left'] = [name for name in parts if name not in table['parts'] or again(table['parts'][name])]
    write_json(file, table)
    print(f"{file}: {len(parts) - len(table['left'])} of {len(parts)} parts done", flush=True)
    return 0

if __name__ == '__main__': sys.exit(main())
