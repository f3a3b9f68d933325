"""What LPIPS diversity says of known faults: `python tests/bench_lpips.py ALEXNET [--size 64]` prints the mean LPIPS of 100 pairs of a class,
averaged over the nine phantom classes, for reals as they are and with a fault."""
import argparse, io, tempfile

import numpy as np
from PIL import Image, ImageFilter

from histogan.data import CLASSES
from histogan.eval import FIDLPIPSEvaluator
from histogan.features import FeatureCache, Patches, lpips_distance
from histogan.phantom import render

def jpeg(im):
    file = io.BytesIO()
    im.save(file, 'JPEG', quality=20)
    return Image.open(file)

def hue(im):
    hsv = np.array(im.convert('HSV'))
    hsv[..., 0] += 20
    return Image.fromarray(hsv, 'HSV').convert('RGB')

def each(change): return lambda x: np.stack([np.asarray(change(Image.fromarray(p))) for p in x])

FAULTS = {'as they are': lambda x: x, 'blur, 1 px': each(lambda im: im.filter(ImageFilter.GaussianBlur(1))), 'JPEG 20': each(jpeg), 'hue, 28°': each(hue),
          'three of nine classes': lambda x: x, 'every patch ten times': lambda x: x[np.arange(len(x))//10*10]}

def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('alexnet', help='AlexNet weights')
    ap.add_argument('--size', type=int, default=64, help='side of the patches; px')
    ap.add_argument('--n', type=int, default=30, help='patches of each class')
    a = ap.parse_args()
    x, y = np.stack([render(c, i, a.size) for c in CLASSES for i in range(a.n)]), np.repeat(list(CLASSES), a.n)
    with tempfile.TemporaryDirectory() as d:
        ev = FIDLPIPSEvaluator(FeatureCache(d), [], lpips_distance(a.alexnet))
        for name, change in FAULTS.items():
            rows = ev.diversity(ev.lpips, Patches(change(x), y), list(CLASSES)[:3] if 'three' in name else list(CLASSES))
            print(f"{name}: {rows[0]['value']:.3f}", flush=True)

if __name__ == '__main__': main()
