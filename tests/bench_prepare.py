"""Preparing and reading a dataset, measured: `python tests/bench_prepare.py [speed] [copies] [memory]` (all three without a word).

speed   patches of 224 px per second through quality and Vahadane, by the clock and by the processor
copies  5,000 phantom patches, and planted copies of 500 of them: which share ends in one group, how many pairs are false
memory  the most that the first process and all processes together held (what they share counted once), for growing numbers of patches

Phantom patches are drawn once into a folder that is kept (`--cache`, default: below the system's folder for temporary files).
"""
import argparse
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')  # before numpy and SPAMS are loaded

import numpy as np
import pandas as pd
from PIL import Image

from histogan.images import FLAT, near_duplicates, thumbnail, unshaded
from histogan.manifest import CLASSES, scan
from histogan.splits import linked_groups
from histogan.phantom import make_phantom, render

def tree(pid):
    "A process and all below it."
    below = {}
    for stat in Path('/proc').glob('[0-9]*/stat'):
        try: below.setdefault(int(stat.read_text().rsplit(')', 1)[1].split()[1]), []).append(int(stat.parent.name))
        except OSError: pass
    found = [pid]
    for p in found: found += below.get(p, [])
    return found

def proportional(pid):
    "Memory of a process in MiB, what it shares with others divided among them."
    try: return int(re.search(r'Pss:\s+(\d+)', Path(f'/proc/{pid}/smaps_rollup').read_text())[1]) / 1024
    except (OSError, TypeError): return 0.

def prepared(root, out, *options, watch=False):
    "A dataset prepared in a process of its own: seconds by the clock, seconds of processor, and, when watched, the peak memory (MiB) of it and of it with all its workers."
    shutil.rmtree(out, ignore_errors=True)
    began, before, peak = time.perf_counter(), os.times(), [0., 0.]
    p = subprocess.Popen([sys.executable, '-m', 'histogan.prepare', str(root), '--out', str(out), *options], stdout=subprocess.DEVNULL)
    while watch and p.poll() is None:
        each = [proportional(k) for k in tree(p.pid)]
        peak = [max(peak[0], each[0]), max(peak[1], sum(each))]; time.sleep(.1)
    if p.wait(): sys.exit(f'histogan.prepare {root} ended with {p.returncode}')
    after = os.times()
    return time.perf_counter() - began, after.children_user + after.children_system - before.children_user - before.children_system, *peak

def load():
    "How busy the machine is, where the system tells."
    return f' (load {os.getloadavg()[0]:.1f})' if hasattr(os, 'getloadavg') else ''

def patches(cache, per_class, size):
    "A folder of phantom patches, drawn if it is not there."
    return make_phantom(Path(cache, f'phantom-{per_class}-{size}'), per_class, size, seed=5, workers=os.cpu_count() or 1)

def speed(cache):
    root, out = patches(cache, 100, 224), Path(cache, 'speed')
    few = Path(cache, 'few'); shutil.rmtree(few, ignore_errors=True)
    for f in scan(root).groupby('label').path.first(): (few/Path(f).parent.name).mkdir(parents=True); shutil.copy(f, few/Path(f).parent.name)
    for workers in ('1', '2'):
        options = ('--workers', workers, '--val-frac', '0', '--test-frac', '0', '--quality.thresholds', 'calibrate')
        wall, cpu, *_ = prepared(root, out, *options)
        start, start_cpu, *_ = prepared(few, Path(cache, 'start'), *options)  # imports and choice of the target, paid once
        n = 900 - 9
        print(f'speed: 900 patches of 224 px, quality filter, Vahadane, copies and split, {workers} worker(s): {wall:.1f} s, of which {start:.1f} s to start; '
              f'{900 / wall:.0f} patches/s in all, {n / (wall - start):.0f} patches/s once started'
              + (f'; {1000 * (cpu - start_cpu) / n:.1f} ms of processor a patch' if workers == '1' else '') + load())

def jpeg(img, quality=90):
    out = io.BytesIO(); Image.fromarray(img).save(out, 'JPEG', quality=quality); return np.array(Image.open(out))

def copies(cache, n=5000, planted=500):
    "Recall of each kind of copy, and pairs that are none."
    images = np.stack([render(list(CLASSES)[k % 9], 10_000 + k, 64) for k in range(n)])
    thumbs = np.stack([thumbnail(x) for x in images]); busy = unshaded(thumbs).std(1) >= FLAT
    pick = np.random.default_rng(0).choice(np.flatnonzero(busy), planted, replace=False)
    kinds = {'exact copy': lambda x: x, 'JPEG 90': jpeg, 'flip': lambda x: x[:, ::-1], 'quarter turn': lambda x: np.rot90(x),
             'flip, quarter turn and JPEG 90': lambda x: jpeg(np.ascontiguousarray(np.rot90(x[:, ::-1])))}
    for name, f in kinds.items():
        more = np.stack([thumbnail(np.ascontiguousarray(f(images[k]))) for k in pick])
        sha = [str(k) for k in range(n)] + [str(k) if name == 'exact copy' else f'{name} {k}' for k in pick]
        unit = linked_groups(pd.DataFrame(dict(sha256=sha)), np.concatenate([thumbs, more]))
        print(f'copies: {name}: {np.mean(unit[n:] == unit[pick]):.2%} of {planted} in one group with their original')
    began = time.perf_counter(); pairs = near_duplicates(thumbs)
    print(f'copies: {len(pairs)} false pairs among {n} patches ({len(pairs) / n:.3%}; {time.perf_counter() - began:.1f} s); {n - busy.sum()} patches of empty glass are tied only when equal')

def noise(cache, n, size=16):
    "A folder of n patches of noise, for sizes at which drawing tissue takes too long."
    root, rng = Path(cache, f'noise-{n}-{size}'), np.random.default_rng(0)
    if root.exists(): return root
    part = Path(cache, 'noise.part'); shutil.rmtree(part, ignore_errors=True)
    for c in 'ABC': (part/c).mkdir(parents=True)
    for k in range(n): Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)).save(part/'ABC'[k % 3]/f'{k:07}.png', compress_level=1)
    return part.rename(root)

def memory(cache):
    small = ('--image-size', '16', '--stain.method', 'none')
    for n, root, options in ((900, patches(cache, 100, 224), ('--quality.thresholds', 'calibrate')), *((n, noise(cache, n), small) for n in (2_000, 20_000, 100_000))):
        wall, _, own, every = prepared(root, Path(cache, 'memory'), '--workers', '2', *options, watch=True)
        print(f"memory: {n:7,} patches{' of 224 px, Vahadane' if 'calibrate' in options else ' of 16 px'}: at most {own:.0f} MiB in the first process, {every:.0f} MiB in all ({wall:.0f} s)", flush=True)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('what', nargs='*', default=[]); p.add_argument('--cache', default=str(Path(tempfile.gettempdir(), 'histogan-bench-prepare')))
    a = p.parse_args(); Path(a.cache).mkdir(parents=True, exist_ok=True)
    for f in (speed, copies, memory):
        if not a.what or f.__name__ in a.what: f(a.cache)

if __name__ == '__main__': main()
