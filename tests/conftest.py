"What the tests of the project share."
import os, random, socket, subprocess, sys, tempfile
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent/'shared'

class Run(NamedTuple):
    "How a program ended."
    rc: int
    out: str
    err: str

# the files that start many programs; with several workers they begin first, so that none of them is the last to end
LONG = 'resume eval dist train runs encoder prepare ablate downstream docs wheel report outputs readme gpu_hour startup tree widgets generate python'.split()

def pytest_collection_modifyitems(items):
    "Long files first, all else as it was."
    place = {f'test_{name}': k for k, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))

def run_python(args, cwd=None, env=None, timeout=600):
    "Run this Python with `args` on one thread, in a throwaway folder unless `cwd` is given, against the code of this tree."
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'Agg', 'NO_COLOR': '1', **(env or {})}
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run([sys.executable, *map(str, args)], cwd=cwd or scratch, env=env, timeout=timeout,
                              stdin=subprocess.DEVNULL, capture_output=True, text=True, encoding='utf-8', errors='replace')
    return Run(done.returncode, done.stdout, done.stderr)

def free_port():
    "A port that is free and stays so: not one of those that a system gives to connections that go out."
    for port in random.SystemRandom().sample(range(20000, 32000), 200):
        with socket.socket() as s:
            try: s.bind(('127.0.0.1', port))
            except OSError: continue
            return port
    raise OSError('no free port')

def run_cli(args, **kw):
    "Run `python -m MODULE OPTION…`: `run_cli(['histogan.train', '--help'])`; keywords as for `run_python`."
    return run_python(['-m', *args], **kw)

@pytest.fixture(scope='session')
def shared():
    "The folder of real patches that may lie beside the project."
    if not SHARED.is_dir(): pytest.skip('no folder `shared` with real patches lies beside the project')
    return SHARED

def copy_tree(target):
    "A copy of what git knows of this tree or would add to it, so that a test may change it."
    listed = subprocess.run(['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode: pytest.skip('this test needs a git checkout')
    for name in filter(None, listed.stdout.split('\0')):
        source, copy = ROOT/name, target/name
        if not source.exists(): continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink(): copy.symlink_to(os.readlink(source))
        else: copy.write_bytes(source.read_bytes())
    return target

@pytest.fixture
def tree(tmp_path):
    "A copy of the project that the test may change."
    return copy_tree(tmp_path/'tree')
