"""Does the copying check tell a generator that memorised from one that learnt? `python tests/bench_copying.py 40|5000 FOLDER [--steps 2000]`.

Trains the demo's recipe at 32 px, without turning the reals, on 40 phantom patches (four classes) or on 5,004 (nine), into
FOLDER/run40 or FOLDER/run5000, and evaluates it against 200 patches per class of other slides. Prints the verdict. A training
that was stopped goes on.
"""
import argparse, json, subprocess, sys
from pathlib import Path
from shutil import copy

from histogan.phantom import make_phantom

def patches(folder, n):
    "The folder of training patches."
    root = make_phantom(folder/'phantom-556', 556, 32, seed=0, slides=48, workers=2)
    if n == 5000: return root
    for c in ('LYM', 'MUC', 'NORM', 'STR'):
        (folder/'forty'/c).mkdir(parents=True, exist_ok=True)
        for p in sorted((root/c).glob('*.png'))[::55][:10]: copy(p, folder/'forty'/c/p.name)
    return folder/'forty'

def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('n', type=int, choices=(40, 5000), help='training patches')
    ap.add_argument('folder', type=Path)
    ap.add_argument('--steps', type=int, default=2000)
    a = ap.parse_args()
    run, other = a.folder/f'run{a.n}', make_phantom(a.folder/'other', 200, 32, seed=777, slides=24, workers=2)
    options = ['--data.root', patches(a.folder, a.n), '--data.image-size', 32, '--data.val-frac', 0, '--data.test-frac', 0, '--run.no-d4',
               '--run.steps', a.steps, '--run.save-every', 500, '--run.sample-every', 1000, '--run.threads', 1, '--out', run]
    train = ['--resume', run] if (run/'config.json').exists() else options
    subprocess.run([sys.executable, '-m', 'histogan.train', *map(str, train)], check=True)
    subprocess.run([sys.executable, '-m', 'histogan.eval', run, '--real', other, '--lpips', 'no'], check=True)
    result = json.loads((run/'metrics'/'copying.json').read_text())
    for space, s in result['spaces'].items():
        print(a.n, space, result['verdict'], *(f"{k}: {s[k]['share']:.1%} (expected {s[k]['expected']:.1%}, p = {s[k]['p']:.0e})" for k in ('twentieth', 'lowest')), sep='; ')

if __name__ == '__main__': main()
