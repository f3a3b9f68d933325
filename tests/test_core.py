"Files, tables, names, locks, signals and exit codes, by real processes where it counts."
import errno, os, signal, subprocess, sys, time, unicodedata

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings, strategies as st

from conftest import ROOT, run_python
from histogan import core
from histogan.core import InputError, clear_torn, lock, read_table, safe_names, write_file, write_table
from histogan.process import run_program

posix = pytest.mark.skipif(os.name == 'nt', reason='signals and locks of POSIX')

def start(code, *args, **kw):
    "A Python process of its own, under way."
    env = {**os.environ, 'PYTHONPATH': str(ROOT)}
    return subprocess.Popen([sys.executable, '-c', code, *map(str, args)], env=env, stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw)

# files

DIES = '''
import os, sys
from histogan.core import write_file
path, k = sys.argv[1], int(sys.argv[2])
def write(f):
    f.write(b'new' * 100)
    f.truncate(k); f.flush()
    os._exit(9)
write_file(path, write)
'''

@pytest.mark.parametrize('k', [0, 1, 150, 300])
def test_a_killed_writer_leaves_the_old_file_and_a_name_to_know_it_by(tmp_path, k):
    path = tmp_path/'x.csv'
    path.write_text('old')
    assert start(DIES, path, k).wait(60) == 9
    assert path.read_text() == 'old'
    (torn,) = (p.name for p in tmp_path.iterdir() if p != path)
    assert torn.startswith('.x.csv.') and torn.endswith('.tmp')
    assert clear_torn(tmp_path) == [torn] and [p.name for p in tmp_path.iterdir()] == ['x.csv']

@pytest.mark.parametrize('number, says', [
    (errno.ENOSPC, 'free some space'), (errno.EDQUOT, 'free some space'), (errno.EROFS, 'choose another place'), (errno.EIO, 'the disk does not answer')])
def test_a_disk_that_fails_is_one_line_and_the_old_file_stays(tmp_path, number, says):
    path = write_file(tmp_path/'x', 'old')
    def fails(f):
        try: raise OSError(number, os.strerror(number))
        except OSError: raise RuntimeError('unexpected pos')  # as torch.save does
    with pytest.raises(InputError, match=says) as e: write_file(path, fails)
    assert str(path) in str(e.value) and ('free' in str(e.value)) == (number in (errno.ENOSPC, errno.EDQUOT))
    assert path.read_text() == 'old' and len(list(tmp_path.iterdir())) == 1

@pytest.mark.parametrize('number', [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_that_refuses_fsync_still_holds_the_file(tmp_path, monkeypatch, number):
    def refuse(handle): raise OSError(number, os.strerror(number))
    monkeypatch.setattr(os, 'fsync', refuse)
    assert write_file(tmp_path/'x', 'new').read_text() == 'new'

def test_a_disk_that_is_full_at_fsync_is_not_taken_for_a_refusal(tmp_path, monkeypatch):
    def full(handle): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(InputError, match='free some space'): write_file(tmp_path/'x', 'new')
    assert not list(tmp_path.iterdir())

def test_a_folder_that_cannot_be_opened_as_on_windows(tmp_path, monkeypatch):
    inner = os.open
    def refuse(path, *a, **k):
        if os.path.isdir(path): raise PermissionError(errno.EACCES, 'Permission denied')
        return inner(path, *a, **k)
    monkeypatch.setattr(os, 'open', refuse)
    assert write_file(tmp_path/'x', 'new').read_text() == 'new'

@pytest.mark.parametrize('times', [2, 99])
def test_a_file_open_in_another_program_on_windows(tmp_path, monkeypatch, times):
    inner, seen = os.replace, []
    def busy(a, b):
        seen.append(a)
        if len(seen) > times: return inner(a, b)
        e = PermissionError(errno.EACCES, 'Access is denied')
        e.winerror = 5
        raise e
    monkeypatch.setattr(os, 'replace', busy)
    monkeypatch.setattr(time, 'sleep', lambda s: None)
    if times == 2: assert write_file(tmp_path/'x', 'new').read_text() == 'new'
    else:
        with pytest.raises(InputError, match='another program has it open'): write_file(tmp_path/'x', 'new')

def test_a_long_name_and_a_folder_that_is_not_there(tmp_path):
    assert write_file(tmp_path/('ä' * 125), 'x').read_text() == 'x'
    with pytest.raises(InputError, match='its folder does not exist'): write_file(tmp_path/'no'/'x', 'x')
    with pytest.raises(InputError, match='shorter name'): write_file(tmp_path/('x' * 300), 'x')

# tables

CELL = st.text(st.characters(exclude_categories=['Cs'], exclude_characters='\0'), max_size=8) | st.sampled_from(['NA', '001', 'None', 'null', '1e3', 'nan', '', ' x ', 'a,b', '"', 'a\nb', 'a\rb', '\ufeff', '#'])

@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(CELL, CELL, st.floats(allow_nan=True, allow_infinity=True)), min_size=1, max_size=5))
@example([('\r', '', 0.1)])
def test_a_table_comes_back_as_it_was(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp()/'table.csv'
    df = pd.DataFrame(rows, columns=['label', 'note', 'value'])
    back = read_table(write_table(path, df), numbers=['value'])
    assert list(back.label) == list(df.label) and list(back.note) == list(df.note)
    np.testing.assert_array_equal(back.value, df.value)
    one = read_table(write_table(path, df[['label']]))
    assert list(one.label) == list(df.label)

def test_a_large_table_is_quick(tmp_path):
    n = 200_000
    df = pd.DataFrame(dict(path=[f'/data/c{i % 9}/{i:08d}.png' for i in range(n)], label=[f'{i % 9:03d}' for i in range(n)], red=np.random.default_rng(0).random(n)))
    path, started = write_table(tmp_path/'x.csv', df), time.process_time()
    back = read_table(path, numbers=['red'])
    assert time.process_time() - started < 2 and back.red.equals(df.red)  # .4 s measured

# names

LABELS = st.lists(st.text(max_size=12) | st.sampled_from(['..', '.', '', 'ER+/PR-', 'CON', 'con', 'CON.txt', 'a.', 'a ', 'TUM', 'tum', 'ß', 'ss', 'é', 'e\u0301', 'ı', 'I', 'a%2Fb', 'a/b', 'x' * 300, 'x' * 299, 'LPT1', '腫瘍', 'CON_', '_']), max_size=12)

@settings(max_examples=500, deadline=None)
@given(LABELS)
def test_names_are_safe_and_no_two_are_one(labels):
    names = safe_names(labels)
    assert list(names) == list(dict.fromkeys(labels))
    fold = lambda s: unicodedata.normalize('NFC', unicodedata.normalize('NFC', s).casefold())
    assert len({fold(n) for n in names.values()}) == len(names)
    for n in names.values():
        assert n and n[0] not in '. ' and n[-1] not in '. ' and not set(n) & set('<>:"/\\|?*\0\n') and len(n.encode()) <= 100
        assert n.split('.')[0].strip().upper() not in {'CON', 'PRN', 'AUX', 'NUL', 'COM1', 'LPT1'}

def test_ordinary_names_stay_and_files_can_have_them(tmp_path):
    plain = ['TUM', 'tumour, invasive', 'ER+PR-', 'Serrated_adenoma', '腫瘍', 'naïve', '1', '001', 'High-grade IN (2)']
    assert safe_names(plain) == {n: n for n in plain}
    odd = ['..', 'ER+/PR-', 'CON', 'a.', '', 'x' * 300, 'A', 'a', 'tumour / invasive']
    for name in safe_names(odd).values(): (tmp_path/name).mkdir()
    assert len(list(tmp_path.iterdir())) == len(odd)
    assert safe_names(odd)['tumour / invasive'] == 'tumour %2F invasive' and safe_names(['a', 'A'])['A'] == 'A'

def test_names_do_not_hang_on_the_order(): assert safe_names(['TUM', 'tum', 'Tum']) == dict(reversed(safe_names(['Tum', 'tum', 'TUM']).items()))

# locks

HOLDS = '''
import sys, time
from histogan import core
if sys.argv[2] != '0':
    def none(*a): raise OSError(int(sys.argv[2]), 'no locks here')
    core.fcntl.lockf = none
try:
    with core.lock(sys.argv[1], '--out x: {who} is at work'):
        print('held', flush=True)
        time.sleep(900)  # it is killed before
except core.InputError as e: print(e, flush=True)
'''

@posix
@pytest.mark.parametrize('number', [0, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_place_belongs_to_one_process_and_comes_free_with_its_end(tmp_path, number):
    first = start(HOLDS, tmp_path/'.lock', number)
    assert first.stdout.readline() == 'held\n'
    second = start(HOLDS, tmp_path/'.lock', number)
    assert f'--out x: process {first.pid} on ' in (said := second.stdout.readline()) and 'at work' in said
    first.kill()
    first.wait()
    third = start(HOLDS, tmp_path/'.lock', number)
    assert third.stdout.readline() == 'held\n'
    third.kill()
    warned = third.communicate()[1]
    assert (f'process {first.pid} on' in warned and 'taken over' in warned) == bool(number) and warned.count('\n') == bool(number)

@posix
def test_of_many_that_take_over_one_wins(tmp_path):
    (tmp_path/'.lock.held').write_text(f'process 999999999 on {core.socket.gethostname()}')
    all_of_them = [start(HOLDS, tmp_path/'.lock', errno.ENOLCK) for _ in range(6)]
    said = [p.stdout.readline() for p in all_of_them]
    for p in all_of_them: p.kill()
    assert said.count('held\n') == 1, said

def test_a_process_does_not_hold_a_place_twice(tmp_path):
    with lock(tmp_path/'.lock', 'taken'):
        with pytest.raises(InputError, match='taken .this process holds it'):
            with lock(tmp_path/'.lock', 'taken'): pass
    with lock(tmp_path/'.lock', 'taken'): pass

# signals

LOOP = '''
import sys, time
from histogan.process import interruption, run_program
def loop(argv=None):
    with interruption() as heard:
        print('ready', flush=True)
        while not heard: time.sleep(.01)
        print('heard', flush=True)
        for _ in range(600): time.sleep(.1)  # goes on all the same
if sys.argv[1] == 'library':
    try: loop()
    except KeyboardInterrupt: print('alive', flush=True)
else: sys.exit(run_program(loop))
'''

@posix
@pytest.mark.parametrize('kind, code', [('library', 0), ('command', 130)])
def test_two_interrupts_end_a_command_and_spare_a_kernel(kind, code):
    p = start(LOOP, kind)
    assert p.stdout.readline() == 'ready\n'
    p.send_signal(signal.SIGINT)
    assert p.stdout.readline() == 'heard\n' and p.poll() is None
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=50)  # less than it would go on for
    assert p.returncode == code and 'Traceback' not in err
    assert out == ('alive\n' if kind == 'library' else ''), out

# ends

@posix
def test_a_reader_that_leaves_ends_a_program_quietly():
    body = 'from histogan.process import run_program; import sys; sys.exit(run_program(lambda a: [print(i) for i in range(100000)] and 0))'
    p = start(body)
    p.stdout.readline()
    p.stdout.close()
    assert p.stderr.read() == '' and p.wait(20) == 141

def test_a_fault_of_the_program_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError): run_program(lambda argv: 1/0, [])
    with pytest.raises(FileNotFoundError): run_program(lambda argv: open('no such file'), [])

# any system

WITHOUT = '''
import sys, runpy
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in ('fcntl', 'resource', 'pwd', 'grp', 'termios'): raise ModuleNotFoundError(f'No module named {name!r}', name=name)
for name in ('fcntl', 'resource', 'pwd', 'grp', 'termios'): sys.modules.pop(name, None)
sys.meta_path.insert(0, Missing())
'''

def test_core_is_light():
    said = run_python(['-c', 'import sys, histogan.core; print([m for m in ("torch", "pandas", "numpy", "PIL") if m in sys.modules])']).out
    assert said.strip() == '[]'

def test_locks_without_fcntl(tmp_path):
    "As on Windows, with a msvcrt that counts."
    done = run_python(['-c', WITHOUT + f'''
import types
sys.modules['msvcrt'] = types.SimpleNamespace(LK_NBLCK=2, LK_UNLCK=0, locking=lambda fd, how, n: print(how, n))
from histogan import core
with core.lock({str(tmp_path/'.lock')!r}, 'taken'): print('held')
assert core.fcntl is None
'''])
    assert done.out.split('\n')[:3] == ['2 1', 'held', '0 1'], done.err
