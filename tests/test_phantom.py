"Phantoms: the same bytes everywhere, several processes, a kill half-way, using a folder again."
import hashlib, os, signal, subprocess, sys, time
import pytest
from conftest import run_python
from histogan.core import InputError
from histogan.phantom import CLASSES, make_phantom, render, stain_for

# ---- the same bytes on every processor

DRAW = """
import hashlib
from histogan.phantom import CLASSES, render
for size in (32, 64, 112):
    drawn = [render(c, k, size) for c in CLASSES for k in range(3)]
    print(hashlib.sha256(b''.join(x.tobytes() for x in drawn)).hexdigest())
"""
DRAWN = '''
cadad247e0813090b3d072b90f3652de342ffceadf1028b74097696b69e388fc
d4faeaecee6af238224c6baa21041ebc5d5c41b158a9a055793055477e24210d
d2827d266b853a3a777d25c34a1f914634032e2bad4a159353f950c23e4d84bb
'''.split()  # by PHANTOM_VERSION 2, at 32, 64 and 112 px

PROCESSORS = {
    'as it is': {},
    'no AVX-512': dict(NPY_DISABLE_CPU_FEATURES='X86_V4 AVX512_ICL AVX512_SPR AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL'),
    'no AVX2': dict(NPY_DISABLE_CPU_FEATURES='X86_V3 X86_V4 AVX512_ICL AVX512_SPR AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX2 FMA3'),
    'BLAS of 2004': dict(OPENBLAS_CORETYPE='Prescott'), 'BLAS of 2013': dict(OPENBLAS_CORETYPE='Haswell'),
    'four threads': dict(OMP_NUM_THREADS='4', OPENBLAS_NUM_THREADS='4'), 'torch without vectors': dict(ATEN_CPU_CAPABILITY='default', ONEDNN_MAX_CPU_ISA='SSE41')}

@pytest.mark.parametrize('name', PROCESSORS)
def test_the_bytes_are_those_written_down(name):
    done = run_python(['-c', DRAW], env=PROCESSORS[name])
    assert done.rc == 0 and done.out.split() == DRAWN, (done.out, done.err)

def test_nothing_in_a_render_asks_the_machine_for_a_transcendental(monkeypatch):
    import numpy as np
    def forbidden(*a, **kw): raise AssertionError('its last bit differs between processors')
    for name in ('exp', 'log', 'sin', 'cos', 'arctan2', 'power', 'hypot', 'tanh', 'dot', 'einsum'): monkeypatch.setattr(np, name, forbidden)
    for c in CLASSES: assert render(c, 5, 32, stain_for(k := 3)).shape == (32, 32, 3), k

def test_workers_that_are_spawned_draw_the_same_files(tmp_path):
    code = f"""
import multiprocessing
from histogan.phantom import make_phantom
if __name__ == '__main__':
    multiprocessing.set_start_method('spawn')
    make_phantom({str(tmp_path/'two')!r}, per_class=4, size=16, slides=3, workers=2)
"""
    (tmp_path/'draw.py').write_text(code)
    done = run_python([tmp_path/'draw.py'])
    assert done.rc == 0, done.err
    one = make_phantom(tmp_path/'one', per_class=4, size=16, slides=3)
    assert digest(one) == digest(tmp_path/'two')

# ---- folders

def digest(root):
    "Names and contents of everything under a folder."
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(root.rglob('*')) if p.is_file()}

def test_workers_do_not_change_the_files(tmp_path):
    one = make_phantom(tmp_path/'one', per_class=4, size=16, slides=3)
    two = make_phantom(tmp_path/'two', per_class=4, size=16, slides=3, workers=2)
    assert len(digest(one)) == 9*4 + 1 and digest(one) == digest(two)

def test_more_patches_keep_the_first_ones(tmp_path):
    few, many = (digest(make_phantom(tmp_path/str(n), per_class=n, size=16, slides=2)) for n in (2, 4))
    assert all(many[k] == v for k, v in few.items() if k.endswith('.png'))

def test_every_slide_holds_every_class(tmp_path):
    names = [p.split('/')[1] for p in digest(make_phantom(tmp_path/'p', per_class=4, size=16, slides=2)) if p.endswith('.png')]
    assert {(n.split('-')[0], n.split('-')[1]) for n in names} == {(c, s) for c in CLASSES for s in ('s000', 's001')}

@pytest.mark.skipif(os.name == 'nt', reason='Windows has no process groups to signal')
@pytest.mark.parametrize('workers', [1, 2])
@pytest.mark.parametrize('sig', ['SIGKILL', 'SIGINT'])
def test_a_kill_half_way_leaves_no_folder_that_looks_whole(tmp_path, workers, sig):
    root, sig = tmp_path/'set', getattr(signal, sig)
    hear = 'import signal; signal.signal(signal.SIGINT, signal.default_int_handler)'  # ignored where tests run in the background
    code = f'{hear}; from histogan.phantom import make_phantom; make_phantom({str(root)!r}, per_class=4000, size=32, slides=2, workers={workers})'
    p = subprocess.Popen([sys.executable, '-c', code], stderr=subprocess.DEVNULL, start_new_session=True)
    end = time.time() + 300
    while time.time() < end and len(list(tmp_path.glob('.set-*/*/*.png'))) < 20: time.sleep(.02)
    half = len(list(tmp_path.glob('.set-*/*/*.png')))
    os.killpg(p.pid, sig)
    try: assert p.wait(300) != 0
    finally:
        if p.poll() is None: os.killpg(p.pid, signal.SIGKILL)
    assert 20 <= half < 36000 and not root.exists()
    if sig == signal.SIGINT: assert not list(tmp_path.iterdir())        # an orderly stop cleans up as well
    assert len(digest(make_phantom(root, per_class=1, size=16, slides=1))) == 10

def test_a_whole_folder_is_used_again(tmp_path):
    root = make_phantom(tmp_path/'p', per_class=2, size=16, slides=1); before = {p: p.stat().st_mtime_ns for p in root.rglob('*')}
    assert make_phantom(root, per_class=2, size=16, slides=1, workers=2) == root
    assert before == {p: p.stat().st_mtime_ns for p in root.rglob('*')}

@pytest.mark.parametrize('change', [dict(per_class=3), dict(size=32), dict(seed=1), dict(slides=2)])
def test_other_parameters_are_refused_and_nothing_is_touched(tmp_path, change):
    want = dict(per_class=2, size=16, seed=0, slides=1); root = make_phantom(tmp_path/'p', **want); before = digest(root)
    with pytest.raises(InputError, match=f'{next(iter(change))}.*another folder'): make_phantom(root, **{**want, **change})
    assert digest(root) == before
