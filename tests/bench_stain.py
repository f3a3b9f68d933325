"""Stain normalisation beside `staintools`, on the same patches: `python tests/bench_stain.py [--n 24] [--images FOLDER]`.

Without `--images` the patches are phantom ones, whose true stains are known. It prints

- seconds per patch of both and their ratio, on one thread; `staintools` works for a fixed second of wall clock per patch, whatever else
  the machine does meanwhile, so the ratio by the clock is taken from our mean and not from our best;
- how far the two results lie apart with the same target, and, for the worst, how far when `staintools` is given `--seconds` instead of one;
- the median angle of the estimated stains to the true ones;
- how many patches per second are read from files, scored and normalised by `--workers` processes;
- with `--images`, how far apart the mean colours lie before and after.
"""
import argparse
import multiprocessing as mp
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest.mock import patch

os.environ['OMP_NUM_THREADS'] = '1'  # before numpy and SPAMS are loaded

import numpy as np
import pandas as pd
import spams
import staintools
from PIL import Image

from histogan.data import read_rgb, resize, scan
from histogan.phantom import render, stain_for
from histogan.quality import quality_metrics
from histogan.stain import METHODS, StainNormalizer, amounts, optical_density, pick_target, stain_matrix

TISSUE = ('DEB', 'LYM', 'MUC', 'MUS', 'NORM', 'STR', 'TUM', 'ADI')
BOUND = 4  # of 255: two pictures this close are the same picture

def degrees(a, b): return np.degrees(np.arccos(np.clip((a * b).sum(-1), -1, 1)))

def phantom_patches(n, size, seed):
    "n patches, each of a slide of its own, and the truth about them."
    keys = [(TISSUE[k % len(TISSUE)], seed + k) for k in range(n)]
    return [render(c, s, size) for c, s in keys], np.array([stain_for(s).matrix for _, s in keys])

def real_patches(folders, match, n, size):
    "n patches spread over the classes whose name holds `match`; size 0 keeps theirs."
    files = pd.concat([scan(folder) for folder in folders])
    paths = files.path[files.label.str.contains(match, regex=False)].tolist()
    if not paths: sys.exit(f'error: --match {match!r}: no such class; there are {", ".join(sorted(set(files.label)))}')
    images = [read_rgb(paths[i]) for i in np.unique(np.linspace(0, len(paths) - 1, min(n, len(paths))).round().astype(int))]
    return [resize(im, size) for im in images] if size else images

def bright(img): return staintools.LuminosityStandardizer.standardize(img.copy())

def run(f, items):
    "Results, and seconds of wall clock and of processor per item."
    wall, cpu = time.perf_counter(), time.process_time()
    out = [f(im) for im in items]
    return out, (time.perf_counter() - wall) / len(items), (time.process_time() - cpu) / len(items)

def gap(a, b): return np.abs(a.astype(int) - b).mean()

def report_speed(images, target, seconds):
    "Both implementations over the same patches; returns which were normalised."
    theirs = staintools.StainNormalizer('vahadane')
    theirs.fit(bright(target))
    ours = StainNormalizer().fit(target)
    ours.transform(images[0])  # warm
    new, wall, cpu = run(lambda im: ours.transform(im, report=True), images)
    old, wall_old, cpu_old = run(lambda im: theirs.transform(bright(im)), images)
    print(f'Vahadane, {len(images)} patches of {images[0].shape[0]} px, one thread')
    print(f'  staintools {wall_old:8.4f} s per patch ({cpu_old:.4f} s of processor)')
    print(f'  histogan   {wall:8.4f} s per patch ({cpu:.4f} s of processor)')
    print(f'  ratio      {wall_old / wall:8.0f} by the clock, {cpu_old / cpu:.0f} by processor time')
    done = [k for k, (_, r) in enumerate(new) if r.changed[0]]
    report_agreement(images, [im for im, _ in new], old, done, theirs, seconds)
    print(f'  same bytes on a second call: histogan {all(np.array_equal(ours.transform(images[k]), new[k][0]) for k in done[:3])}, '
          f'staintools {all(np.array_equal(theirs.transform(bright(images[k])), old[k]) for k in done[:3])}')
    return done

def report_agreement(images, new, old, done, theirs, seconds):
    "Mean absolute difference of the pictures; those that differ, again with more time for `staintools`."
    gaps = {k: gap(new[k], old[k]) for k in done}
    v = np.array(list(gaps.values()))
    print(f'  passed through: {len(images) - len(done)}')
    print(f'  mean absolute difference of the others, of 255: mean {v.mean():.2f}, median {np.median(v):.2f}, worst {v.max():.2f}; at most {BOUND}: {(v <= BOUND).sum()} of {len(v)}')
    if seconds <= 1: return
    with patch.object(spams, 'trainDL', partial(spams.trainDL, iter=-seconds)):
        for k in (k for k in done if gaps[k] > BOUND):
            print(f'    patch {k}: {gaps[k]:.2f} after its second, {gap(new[k], theirs.transform(bright(images[k]))):.2f} after {seconds} s')

def report_truth(images, truth):
    "Angles of both stain vectors to the phantom's, for each method."
    theirs = dict(vahadane=staintools.VahadaneStainExtractor, macenko=staintools.MacenkoStainExtractor)
    print('median angle to the true stains (haematoxylin, eosin, both)')
    for method, extractor in theirs.items():
        for name, f in (('staintools', lambda im: extractor.get_stain_matrix(bright(im))), ('histogan', lambda im: stain_matrix(im, method))):
            e = degrees(np.array([f(im) for im in images]), truth)
            print(f'  {method:9} {name:10} {np.median(e[:, 0]):5.2f} {np.median(e[:, 1]):5.2f} {np.median(e):5.2f}')

def report_parts(images, target):
    "Seconds of the other methods, of the metrics, and of the amounts beside SPAMS's solver."
    print('seconds per patch')
    for method in METHODS[1:]: print(f'  {method:24} {run(StainNormalizer(method).fit(target).transform, images)[1]:.4f}')
    print(f'  {"eight quality metrics":24} {run(quality_metrics, images)[1]:.4f}')
    m = stain_matrix(target)
    for name, solve in (('amounts, closed form', lambda od: amounts(od, m)),
                        ('amounts, spams.lasso', lambda od: spams.lasso(np.asfortranarray(od), D=np.asfortranarray(m.T), mode=2, lambda1=.01, pos=True, numThreads=1))):
        print(f'  {name:24} {run(solve, [optical_density(im)[0].astype(float) for im in images[:8]])[1]:.4f}')

def prepared(path, norm=None):
    "What preparing does with a file; seconds of processor."
    start = time.process_time()
    img = read_rgb(path)
    quality_metrics(img); norm.transform(img)
    return time.process_time() - start

def report_pipeline(images, target, workers, files=240):
    "Files of three formats read, scored and normalised by several processes."
    norm = StainNormalizer().fit(target)
    with tempfile.TemporaryDirectory() as tmp, mp.get_context('spawn').Pool(workers) as pool:
        for suffix in ('tif', 'png', 'jpg'):
            paths = [Path(tmp, f'{k}.{suffix}') for k in range(files)]
            for k, path in enumerate(paths): Image.fromarray(images[k % len(images)]).save(path)
            work = partial(prepared, norm=norm)
            pool.map(work, paths[:8 * workers], 1)  # warm
            start = time.perf_counter()
            cpu = np.mean(pool.map(work, paths, 8))
            print(f'read ({suffix}), metrics and Vahadane, {workers} processes: {files / (time.perf_counter() - start):.0f} patches per second by the clock, '
                  f'{workers / cpu:.0f} by processor time')

def spread(images):
    "Root mean square distance from the mean: of mean colours, grey levels; of mean densities, degrees."
    m = np.array([im.mean((0, 1)) for im in images])
    d = np.array([-np.log(np.maximum(im, 1) / 255).mean((0, 1)) for im in images])
    d /= np.linalg.norm(d, axis=1, keepdims=True)
    levels, radians = (np.sqrt(((v - v.mean(0))**2).sum(1).mean()) for v in (m, d))
    return f'mean colours {levels:5.1f} grey levels apart, hue {np.degrees(radians):4.1f} degrees'

def report_spread(images):
    "What each method leaves of the differences in colour, with the most ordinary of a sample as target."
    sample = images[::max(1, len(images) // 24)]
    target = sample[pick_target(sample)]
    print(f'{"as they are":12} {spread(images)}')
    for method in METHODS:
        done = [StainNormalizer(method).fit(target).transform(im, report=True) for im in images]
        print(f'{method:12} {spread([im for im, _ in done])}; passed through: {sum(not r.changed[0] for _, r in done)}')

def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--n', type=int, default=24, help='patches; staintools takes more than a second for each')
    ap.add_argument('--size', type=int, default=224, help='side of the patches, px; 0 keeps that of real ones')
    ap.add_argument('--seed', type=int, default=1000, help='of the phantom patches')
    ap.add_argument('--images', nargs='+', metavar='FOLDER', help='folders of class folders, in place of the phantom')
    ap.add_argument('--match', default='', help='only classes whose name holds this')
    ap.add_argument('--seconds', type=int, default=1, help='for staintools, where the two pictures differ')
    ap.add_argument('--workers', type=int, default=2, help='processes that read, score and normalise files')
    ap.add_argument('--spread', action='store_true', help='only the spread of colours of --images')
    ap.add_argument('--quick', action='store_true', help='without staintools: files, metrics and methods only')
    a = ap.parse_args()
    if a.spread and not a.images: ap.error('--spread needs --images')
    images, truth = (real_patches(a.images, a.match, a.n, a.size), None) if a.images else phantom_patches(a.n, a.size, a.seed)
    if a.images: report_spread(images)
    if a.spread: return
    target = render('TUM', 5, a.size or images[0].shape[0])
    report_pipeline(images, target, a.workers)
    report_parts(images, target)
    if a.quick: return
    done = report_speed(images, target, a.seconds)
    if truth is not None: report_truth([images[k] for k in done], truth[done])

if __name__ == '__main__': main()
