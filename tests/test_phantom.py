"Writing phantoms: several processes, a kill half-way, using a folder again."
import hashlib, os, signal, subprocess, sys, time
import pytest
from histogan.data import InputError
from histogan.phantom import CLASSES, make_phantom

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

@pytest.mark.parametrize('workers', [1, 2])
@pytest.mark.parametrize('sig', [signal.SIGKILL, signal.SIGINT])
def test_a_kill_half_way_leaves_no_folder_that_looks_whole(tmp_path, workers, sig):
    root = tmp_path/'set'
    hear = 'import signal; signal.signal(signal.SIGINT, signal.default_int_handler)'  # ignored where tests run in the background
    code = f'{hear}; from histogan.phantom import make_phantom; make_phantom({str(root)!r}, per_class=4000, size=32, slides=2, workers={workers})'
    p = subprocess.Popen([sys.executable, '-c', code], stderr=subprocess.DEVNULL, start_new_session=True)
    end = time.time() + 60
    while time.time() < end and len(list(tmp_path.glob('.set-*/*/*.png'))) < 20: time.sleep(.02)
    half = len(list(tmp_path.glob('.set-*/*/*.png')))
    os.killpg(p.pid, sig)
    try: assert p.wait(60) != 0
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
