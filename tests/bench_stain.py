"""Stain normalisation beside `staintools`, on the same patches: `python tests/bench_stain.py [--n 27] [--images FOLDER]`.

Prints seconds per patch and their ratio, the angles to the true stains (phantom patches; with `--images`, a folder that holds one
folder of patches per class, there is no truth), the difference between the two results, and how many patches per second quality
metrics and stain normalisation make together. Everything runs on one thread. `staintools` works for a fixed second of wall clock
per patch whatever the machine does meanwhile; the ratio of wall times is therefore taken from our slowest honest reading, the mean.
"""
import argparse
import os
import time

os.environ['OMP_NUM_THREADS'] = '1'  # before numpy and SPAMS are loaded

import numpy as np
import staintools

from histogan.data import read_rgb, resize, scan
from histogan.phantom import render, stain_for
from histogan.stain import METHODS, StainNormalizer, stain_matrix

TISSUE = ('DEB', 'LYM', 'MUC', 'MUS', 'NORM', 'STR', 'TUM', 'ADI')

def degrees(a, b): return np.degrees(np.arccos(np.clip((a * b).sum(-1), -1, 1)))

def phantom_patches(n, size, seed):
    "n patches, each of a slide of its own, and the truth about them."
    keys = [(TISSUE[k % len(TISSUE)], seed + k) for k in range(n)]
    return [render(c, s, size) for c, s in keys], np.array([stain_for(s).matrix for _, s in keys])

def real_patches(folder, n, size):
    "n patches spread over the folder."
    paths = scan(folder).path.tolist()
    return [resize(read_rgb(paths[i]), size) for i in np.unique(np.linspace(0, len(paths) - 1, n).round().astype(int))], None

def bright(img): return staintools.LuminosityStandardizer.standardize(img.copy())

def run(f, images):
    "Results, and seconds of wall clock and of processor per patch."
    wall, cpu = time.perf_counter(), time.process_time()
    out = [f(im) for im in images]
    return out, (time.perf_counter() - wall) / len(images), (time.process_time() - cpu) / len(images)

def report_speed(images, target):
    "Both implementations over the same patches; returns their images."
    theirs = staintools.StainNormalizer('vahadane')
    theirs.fit(bright(target))
    ours = StainNormalizer().fit(target)
    ours.transform(images[0])  # warm
    new, wall, cpu = run(lambda im: ours.transform(im, report=True), images)
    old, wall_old, cpu_old = run(lambda im: theirs.transform(bright(im)), images)
    print(f'Vahadane, {len(images)} patches of {images[0].shape[0]} px, one thread')
    print(f'  staintools {wall_old:8.4f} s per patch ({cpu_old:.4f} s of processor)')
    print(f'  histogan   {wall:8.4f} s per patch ({cpu:.4f} s of processor)')
    print(f'  ratio      {wall_old / wall:8.0f} by the clock')
    done = [k for k, (_, r) in enumerate(new) if r.changed[0]]
    gap = np.array([np.abs(new[k][0].astype(int) - old[k]).mean() for k in done])
    print(f'  passed through: {len(images) - len(done)}; mean absolute difference of the others: mean {gap.mean():.2f}, worst {gap.max():.2f} of 255')
    print(f'  same bytes on a second call: histogan {all(np.array_equal(ours.transform(images[k]), new[k][0]) for k in done[:3])}, '
          f'staintools {np.array_equal(theirs.transform(bright(images[0])), old[0])}')
    return done

def report_truth(images, truth):
    "Angles of both stain vectors to the phantom's, for each method."
    theirs = dict(vahadane=staintools.VahadaneStainExtractor, macenko=staintools.MacenkoStainExtractor)
    print('median angle to the true stains (haematoxylin, eosin, both)')
    for method, extractor in theirs.items():
        for name, f in (('staintools', lambda im: extractor.get_stain_matrix(bright(im))), ('histogan', lambda im: stain_matrix(im, method))):
            e = degrees(np.array([f(im) for im in images]), truth)
            print(f'  {method:9} {name:10} {np.median(e[:, 0]):5.2f} {np.median(e[:, 1]):5.2f} {np.median(e):5.2f}')

def report_others(images, target):
    "Seconds of the other methods, and of quality and stain together."
    for method in METHODS[1:]:
        norm = StainNormalizer(method).fit(target)
        print(f'{method:9} {run(norm.transform, images)[1]:.4f} s per patch')
    try: from histogan.quality import quality_metrics
    except ImportError: return
    norm = StainNormalizer().fit(target)
    _, wall, cpu = run(lambda im: (quality_metrics(im), norm.transform(im)), images)
    print(f'quality and Vahadane together: {1 / wall:.0f} patches per second of one core ({1 / cpu:.0f} by processor time)')

def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--n', type=int, default=24, help='patches; staintools takes more than a second for each')
    ap.add_argument('--size', type=int, default=224, help='side of the patches, px')
    ap.add_argument('--seed', type=int, default=1000, help='of the phantom patches')
    ap.add_argument('--images', help='folder of class folders, in place of the phantom')
    a = ap.parse_args()
    images, truth = real_patches(a.images, a.n, a.size) if a.images else phantom_patches(a.n, a.size, a.seed)
    target = render('TUM', 5, a.size)
    done = report_speed(images, target)
    if truth is not None: report_truth([images[k] for k in done], truth[done])
    report_others(images, target)

if __name__ == '__main__': main()
