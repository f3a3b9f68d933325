"""What the k-nearest-neighbour metrics cost: `python tests/bench_metrics.py [--n 5000] [--d 2048] [--threads 2]` prints seconds and peak memory."""
import argparse, resource, time

import numpy as np
import torch

from histogan.metrics import frechet, kernel_distance, manifold_metrics

def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('--n', type=int, default=5000, help='rows of each set')
    ap.add_argument('--d', type=int, default=2048, help='length of a feature')
    ap.add_argument('--threads', type=int, default=2)
    a = ap.parse_args()
    torch.set_num_threads(a.threads)
    rng = np.random.default_rng(0)
    fake, real = (rng.standard_normal((a.n, a.d)).astype(np.float32) for _ in range(2))
    for f in (manifold_metrics, frechet, kernel_distance):
        start = time.perf_counter()
        got = f(fake, real)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20
        print(f'{f.__name__}: {time.perf_counter() - start:.1f} s, peak memory so far {peak:.2f} GiB, {got}', flush=True)

if __name__ == '__main__': main()
