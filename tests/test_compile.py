"`--run.compile`: the losses of a step compiled are those of the same step as it is, in `modern`'s present form; without a compiler it says so and goes on."
import json
import os
import shutil

import pytest

from conftest import run_python

CODE = '''
import json, sys
from histogan.plain import CLASSES, batch_of, bench_config
from histogan.encoder import load_encoder
from histogan.state import build
from histogan.step import train_step

cfg = bench_config('modern', 32, 4, compile=bool(int(sys.argv[1])))
assert cfg.g.padding == 'replicate' and cfg.d.pair and cfg.loss.pair_weight
s = build(cfg, [str(k) for k in range(CLASSES)], load_encoder(cfg.encoder, device='cpu'), 1000)
x, y = batch_of(cfg)
rows = [train_step(s, x, y)[0] for _ in range(2)]
print(json.dumps([[r['d_loss'], r['g_loss'], r['g_grad_norm']] for r in rows] + [[f.fast is not None for f in s.fast.values()]]))
'''

def steps(compiled, **env):
    "Losses of two steps, whether the compiled forms are in use, and what was said."
    done = run_python(['-c', CODE, int(compiled)], env=env)
    assert done.rc == 0, done.err
    *losses, used = json.loads(done.out.splitlines()[-1])
    return losses, used, done.err

@pytest.mark.skipif(os.name == 'nt' or not (os.environ.get('CXX') or shutil.which('g++')), reason='no C++ compiler')
def test_compiled_is_eager(tmp_path):
    eager, _, _ = steps(False)
    fast, used, said = steps(True)
    assert used == [True, True] and 'uncompiled' not in said
    # the second step follows from the first step's gradients
    for a, b in zip(eager, fast): assert a == pytest.approx(b, rel=1e-3)

@pytest.mark.skipif(os.name == 'nt', reason='the compiler has another name there')
def test_without_a_compiler_it_says_so_and_goes_on(tmp_path):
    eager, _, _ = steps(False)
    slow, used, said = steps(True, CXX=str(tmp_path/'no-compiler'), TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert slow == eager and not any(used)
    assert said.count('runs uncompiled (') == 2 and '--run.compile: G ' in said
