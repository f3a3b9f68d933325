"Preparing a dataset in real processes: kills, full disks, several processes, planted copies, other people's folders, training on it, the audit in a browser."
import errno, json, os, random, shutil, signal, subprocess, sys, time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import histogan.audit as A
import histogan.prepare as P
from conftest import ROOT, Run, run_cli
from histogan.core import lock, read_table
from histogan.data import HistoDataset, InputError, PreparedImages, is_prepared, load_prepared, read_rgb, scan, verify_prepared
from histogan.phantom import make_phantom, render
from histogan.quality import quality_metrics

SMALL = ('--image-size', '48', '--workers', '2')
ENV = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'NO_COLOR': '1'}

def start(*args, **env): return subprocess.Popen([sys.executable, '-m', 'histogan.prepare', *map(str, args)], env=ENV | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def same(a, b):
    "Are two prepared datasets equal to the byte? Pages and locks left out."
    names = sorted(p.name for p in a.iterdir() if p.suffix == '.npy' or p.suffix == '.csv' or p.name == 'prepare.json')
    return len(names) == 4 and names == sorted(p.name for p in b.iterdir()) and all((a/n).read_bytes() == (b/n).read_bytes() for n in names)

def quiet(root, out, **kw): return P.prepare(P.PrepareConfig(str(root), out=str(out), **({'workers': 1} | kw)), progress=False)

def refused(done, *words):
    "Exit code 2 and one line that holds every word."
    lines = [l for l in done.err.splitlines() if l.startswith('error: ')]
    assert done.rc == 2 and len(lines) == 1 and 'Traceback' not in done.err, done.err
    for w in words: assert w in lines[0], lines[0]

@pytest.fixture(scope='module')
def patches(tmp_path_factory): return make_phantom(tmp_path_factory.mktemp('patches')/'phantom', 90, 48, seed=3)

@pytest.fixture(scope='module')
def whole(patches, tmp_path_factory):
    "The undisturbed dataset."
    out = tmp_path_factory.mktemp('whole')/'store'
    p = start(patches, '--out', out, *SMALL); said, err = p.communicate(timeout=600)
    assert p.returncode == 0, err
    assert '810 of 810 patches kept' in said and err == '', err
    return out

# ---- killed

def children(pid):
    "Every process below one."
    found = []
    for stat in Path('/proc').glob('[0-9]*/stat'):
        try: parent = int(stat.read_text().rsplit(')', 1)[1].split()[1])
        except (OSError, IndexError): continue
        if parent == pid: found += [int(stat.parent.name), *children(int(stat.parent.name))]
    return found

def gone(pids, seconds=60):
    "Have all of them ended?"
    end = time.monotonic() + seconds
    alive = lambda p: Path(f'/proc/{p}').exists() and Path(f'/proc/{p}/stat').read_text().rsplit(')', 1)[1].split()[0] != 'Z'
    while any(alive(p) for p in pids) and time.monotonic() < end: time.sleep(.1)
    return not any(alive(p) for p in pids)

def records(out): return len(list(out.glob('.part/done/*.npz')))

def test_killed_at_ten_random_moments_the_store_is_the_same(patches, whole, tmp_path):
    rng, out, kills, states = random.Random(0), tmp_path/'store', 0, []
    while kills < 10:
        goal, p = rng.randint(records(out), min(records(out) + 5, 13)), start(patches, '--out', out, *SMALL)
        while records(out) < goal and p.poll() is None: time.sleep(.01)
        time.sleep(rng.uniform(0, .2)); below = children(p.pid)  # between two records, while tables are written, after the end
        p.send_signal(signal.SIGKILL); p.communicate()
        if p.returncode == 0: assert same(whole, out); shutil.rmtree(out); continue  # it was done before the kill
        kills += 1; states.append(records(out))
        assert gone(below), 'workers outlived their parent'
        if is_prepared(out): assert verify_prepared(out) == []
        if states[-1] == 13 and len(states) % 3: shutil.rmtree(out)  # all but the end was done
    p = start(patches, '--out', out, *SMALL); p.communicate()
    assert p.returncode == 0 and same(whole, out)
    assert len(set(states)) > 3, states  # the moments differed

def test_killed_after_every_write_the_store_is_the_same(patches, tmp_path, monkeypatch):
    "In this process: every rename and every wait for the disk fails once, in turn."
    few = tmp_path/'few'
    for f in scan(patches).groupby('label').path.nth([0, 1, 2]): (few/Path(f).parent.name).mkdir(parents=True, exist_ok=True); shutil.copy(f, few/Path(f).parent.name)
    plain = dict(image_size=32, stain=P.StainOptions(method='none'))
    store, real, n = quiet(few, tmp_path/'store', **plain), dict(fsync=os.fsync, replace=os.replace), 0
    while True:
        left = [n]
        def failing(name):
            def f(*a):
                left[0] -= 1
                if left[0] < 0: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return real[name](*a)
            return f
        for name in real: monkeypatch.setattr(P.os, name, failing(name))
        out = tmp_path/f'cut{n}'
        try: quiet(few, out, **plain); break
        except OSError as e: assert e.errno == errno.ENOSPC  # of the pixels; the program says it in one line
        except InputError as e: assert 'free some space' in str(e) and '\n' not in str(e)
        finally: monkeypatch.undo()
        if is_prepared(out): assert not load_prepared(out).manifest.empty and verify_prepared(out) == []
        assert same(store, quiet(few, out, **plain))
        n += 1
    assert n > 15, n

HOLD = '''
import multiprocessing, os, signal, time
if multiprocessing.parent_process() is None: signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
def held(f, real=os.fsync):
    real(f)
    if multiprocessing.parent_process() is None or not os.path.isdir(os.environ['HOLD']): return
    open(os.path.join(os.environ['HOLD'], str(os.getpid())), 'w').close()
    while os.path.isdir(os.environ['HOLD']): time.sleep(.01)
os.fsync = held
'''

class Held:
    "A run whose workers stop at their first wait for the disk, until they are released: no race with its end."
    def __init__(self, tmp_path, *args):
        tmp_path.mkdir(parents=True, exist_ok=True); (tmp_path/'site').mkdir(); (tmp_path/'hold').mkdir()
        (tmp_path/'site'/'sitecustomize.py').write_text(HOLD)
        self.folder = tmp_path/'hold'
        self.process = start(*args, HOLD=str(self.folder), PYTHONPATH=os.pathsep.join([str(tmp_path/'site'), str(ROOT)]))
        end = time.monotonic() + 600
        while len(self.workers) < 2:
            assert self.process.poll() is None and time.monotonic() < end, self.process.communicate()
            time.sleep(.02)

    @property
    def workers(self): return [int(p.name) for p in self.folder.iterdir()]
    def release(self): self.folder.rename(self.folder.with_name('released'))
    def end(self):
        out, err = self.process.communicate(timeout=600)
        return Run(self.process.returncode, out, err)

def test_a_dead_worker_is_one_line(patches, whole, tmp_path):
    out, p = tmp_path/'a', Held(tmp_path/'held', patches, '--out', tmp_path/'a', *SMALL)
    os.kill(p.workers[0], signal.SIGKILL); p.release()
    refused(p.end(), '--workers', 'a worker process was killed')
    assert not is_prepared(out)
    p = start(patches, '--out', out, *SMALL); p.communicate()
    assert same(whole, out)

def test_an_interruption_is_one_line(patches, whole, tmp_path):
    out, p = tmp_path/'b', Held(tmp_path/'held', patches, '--out', tmp_path/'b', *SMALL)
    p.process.send_signal(signal.SIGINT); p.release()
    done = p.end()
    assert (done.rc, done.err) == (130, 'stopped; the same command goes on where it was\n'), done
    assert not is_prepared(out)
    p = start(patches, '--out', out, *SMALL); p.communicate()
    assert same(whole, out)

# ---- several processes

@pytest.mark.parametrize('first', [0, 2])
def test_three_processes_make_the_same_store(first, patches, whole, tmp_path):
    order = [first, *({0, 1, 2} - {first})]; ps = []
    for r in order: ps.append(start(patches, '--out', tmp_path/'s', '--image-size', '48', RANK=str(r), WORLD_SIZE='3')); time.sleep(.5)
    said = [p.communicate(timeout=600) for p in ps]
    assert [p.returncode for p in ps] == [0, 0, 0], said
    assert same(whole, tmp_path/'s') and [bool(o) for o, _ in said] == [r == 0 for r in order]

def test_two_runs_in_one_folder(patches, tmp_path):
    part = P._claim(tmp_path/'s')
    with lock(part/'.lock-0', 'x'): refused(run_cli(['histogan.prepare', patches, '--out', tmp_path/'s']), 'another process is preparing it')
    for env, word in (({'RANK': '2', 'WORLD_SIZE': '2'}, 'RANK 2'), ({'RANK': 'x'}, 'RANK x, WORLD_SIZE 1')):
        refused(run_cli(['histogan.prepare', patches, '--out', tmp_path/'s'], env=env), word)

# ---- disks

@pytest.fixture
def disk(tmp_path):
    "A function of a size in KiB that mounts a file system of that size."
    mounted = []
    def mount(kib):
        at = tmp_path/f'disk{kib}'; at.mkdir()
        if subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={kib}k', 'tmpfs', at], capture_output=True).returncode: pytest.skip('this test mounts a small file system, which needs root')
        mounted.append(at); return at
    yield mount
    for at in mounted: subprocess.run(['umount', '-l', at])

def test_a_full_disk(patches, whole, disk):
    for kib in (64, 4000):  # no room for a plan; too little for the pixels (5.3 MiB)
        at = disk(kib); refused(run_cli(['histogan.prepare', patches, '--out', at/'s', *SMALL]), '--out', 'the disk is full', 'MiB are needed')
        assert not is_prepared(at/'s')
    at = disk(16_000); p = Held(at.parent/'held', patches, '--out', at/'s', *SMALL)
    with open(at/'ballast', 'wb', buffering=0) as f:  # another program takes what is left
        try:
            while f.write(bytes(4096)): pass
        except OSError: pass
    p.release()
    refused(p.end(), 'free some space')
    assert not is_prepared(at/'s')
    (at/'ballast').unlink()
    p = start(patches, '--out', at/'s', *SMALL); p.communicate()
    assert p.returncode == 0 and same(whole, at/'s')

# ---- bad input

def test_bad_options(patches, tmp_path, capsys):
    (tmp_path/'full').mkdir(); (tmp_path/'full'/'x').touch(); (tmp_path/'m.csv').write_text('path,label\ngone.png,A\n')
    for options, words in ((['nowhere'], ['nowhere']), ([patches, '--image-sise', '4'], ['--image-sise', '--image-size']), ([patches, '--image-size', '4'], ['--image-size: 4']),
                           ([patches, '--stain.method', 'x'], ['--stain.method']), ([patches, patches], ['is listed twice']), ([patches, '--out', tmp_path/'full'], ['is not empty']),
                           ([patches, '--group-column', 'g'], ['--group-column', '--manifest']), ([patches, '--manifest', tmp_path/'m.csv'], ['gone.png']),
                           ([patches, '--group-regex', '('], ['--group-regex']), ([patches, '--stain.white', '7'], ['--stain.white: 7'])):
        refused(Run(P.main([*map(str, options), *([] if '--out' in options else ['--out', str(tmp_path/'s')])]), *capsys.readouterr()), *words)

def test_thresholds_that_empty_a_class_cost_no_second_reading(patches, tmp_path, capsys):
    limits = {c: dict(min_lap_var=1e9 if c == 'TUM' else None, min_entropy=None, max_white_ratio=None, max_sat_ratio=None, min_tenengrad=None, max_jpeg_blockiness=None, min_tissue_frac=None) for c in set(scan(patches).label)}
    (tmp_path/'t.json').write_text(json.dumps(limits))
    run = lambda: P.main([str(patches), '--out', str(tmp_path/'s'), '--stain.method', 'none', '--image-size', '32', '--workers', '1', '--quality.thresholds', str(tmp_path/'t.json')])
    refused(Run(run(), *capsys.readouterr()), 'class TUM would lose all its 90 patches', 't.json')
    done = {p: p.stat().st_mtime_ns for p in (tmp_path/'s').glob('.part/done/*')}; assert len(done) == 13
    limits['TUM'].update(min_lap_var=float(sorted(pd.DataFrame([quality_metrics(read_rgb(p)).lap_var for p in scan(patches).query('label=="TUM"').path])[0])[9])); (tmp_path/'t.json').write_text(json.dumps(limits))
    begun = P.do_chunk; P.do_chunk = None  # nothing is read again
    try: assert run() == 0
    finally: P.do_chunk = begun
    m = P.read_all(tmp_path/'s')
    assert (m.kept == 0).sum() == 9 and set(m.why[m.kept == 0]) == {'quality: lap_var'} and set(m.split[m.kept == 0]) == {''}
    assert len(load_prepared(tmp_path/'s').manifest) == 801 and 'rejected: quality 9' in capsys.readouterr().out

def test_broken_files_are_named_or_rejected(patches, tmp_path, capsys):
    root = shutil.copytree(patches, tmp_path/'broken'); files = scan(root).path
    Path(files[5]).write_bytes(b''); Path(files[300]).write_bytes(Path(files[300]).read_bytes()[:200]); Image.new('RGB', (9, 9)).save(files[500])
    plain = ['--stain.method', 'none', '--image-size', '32', '--workers', '1', '--out', str(tmp_path/'s')]
    refused(Run(P.main([str(root), *plain]), *capsys.readouterr()), '3 of 810 files', Path(files[5]).name, Path(files[300]).name, 'is 9 x 9 px, too small', '--skip-broken')
    assert P.main([str(root), *plain, '--skip-broken']) == 0
    m = P.read_all(tmp_path/'s'); assert np.flatnonzero(m.kept == 0).tolist() == [5, 300, 500] and m.why.str.startswith('unreadable: ').sum() == 3
    assert not np.load(tmp_path/'s'/'images.npy')[300].any() and verify_prepared(tmp_path/'s') == []

def test_changed_files_begin_anew(patches, tmp_path, capsys):
    root = shutil.copytree(patches, tmp_path/'r'); cfg = P.PrepareConfig(str(root), out=str(tmp_path/'s'), image_size=32, workers=1, stain=P.StainOptions(method='none'))
    df, base = P.list_patches(cfg); part = P._claim(cfg.out); plan = P._make_plan(cfg, df, P._work_key(cfg, df, base), part)
    P.do_chunk(P.Job(str(tmp_path/'s'/'images.npy'), str(part), 32, 'none', cfg.stain, None), 0, df.path[:64].tolist())
    Image.fromarray(read_rgb(df.path[3])[::-1]).save(df.path[3])
    P.prepare(cfg, progress=False)
    assert 'it begins anew' in capsys.readouterr().err
    assert same(quiet(root, tmp_path/'t', image_size=32, stain=P.StainOptions(method='none')), tmp_path/'s')
    Image.fromarray(read_rgb(df.path[3])[::-1]).save(df.path[3])
    with pytest.raises(InputError, match='holds a prepared dataset of other files'): P.prepare(cfg, progress=False)

# ---- copies and groups

def test_planted_copies_end_in_one_split(patches, tmp_path):
    root = shutil.copytree(patches, tmp_path/'planted'); df = scan(root); names = sorted(set(df.label))
    busy = [k for k in range(0, len(df), 8) if df.label[k] != 'BACK']  # of empty glass only exact copies are tied
    ways = dict(copy=lambda x: x, jpeg=lambda x: x, flip=lambda x: x[:, ::-1], turn=lambda x: np.rot90(x, 3))
    for k in busy:
        x, wrong = read_rgb(df.path[k]), names[(names.index(df.label[k]) + 4) % 9]
        for w, f in ways.items(): Image.fromarray(np.ascontiguousarray(f(x))).save(root/wrong/f'{w}-{k:04}.{"jpg" if w == "jpeg" else "png"}', quality=90)
    m = load_prepared(quiet(root, tmp_path/'s', image_size=32, stain=P.StainOptions(method='none'))).manifest.set_index('path')
    for w, least in dict(copy=1, jpeg=.99, flip=.99, turn=.99).items():
        mine = [p for p in m.index if os.path.basename(p).startswith(w + '-')]
        home = [df.path[int(os.path.basename(p)[len(w) + 1:-4])] for p in mine]
        assert len(mine) == len(busy) and (m.split[mine].to_numpy() == m.split[home].to_numpy()).mean() >= least, w
    pairs = read_table(tmp_path/'s'/'duplicates.csv').astype(dict(i=int, j=int)); a = P.read_all(tmp_path/'s'); original = a.path.map(lambda p: '-' not in os.path.basename(p)[4:5])
    both = original[pairs.i].to_numpy() & original[pairs.j].to_numpy()
    assert both.sum() <= .001 * len(df)  # false pairs among the patches themselves

def test_groups_of_a_table_are_never_divided(shared, tmp_path):
    d = shared/'data'; options = dict(image_size=32, stain=P.StainOptions(method='none'), manifest=str(d/'histo5_128/MANIFEST.csv'), group_column='group')
    m = load_prepared(quiet(d/'histo5_128', tmp_path/'s', split_column='', **options)).manifest
    assert len(m) == 1800 and m.groupby('group').split.nunique().max() == 1 and set(m.split) == {'train', 'val', 'test'}
    copies = A.copy_counts(P.read_all(tmp_path/'s'), read_table(tmp_path/'s'/'duplicates.csv').astype(dict(i=int, j=int)))
    assert list(copies) == ['pairs', 'across classes', 'across groups', 'across splits']

def test_the_real_patches_as_they_are(shared, tmp_path):
    n = shared/'data'/'nct-sample'
    done = run_cli(['histogan.prepare', n/'NCT-CRC-HE-100K', n/'CRC-VAL-HE-7K', '--out', tmp_path/'s', '--image-size', '64'])
    assert done.rc == 0 and '108 of 108 patches kept, 9 classes' in done.out, done.err
    m = load_prepared(tmp_path/'s').manifest
    assert pd.crosstab(m.root, m.split).to_dict('list') == dict(train=[90, 0], val=[0, 9], test=[0, 9]) and m.width.nunique() > 1
    assert P.read_all(tmp_path/'s')['mode'].nunique() > 1 and verify_prepared(tmp_path/'s') == []

# ---- other people's folders

PLAIN = dict(image_size=32, stain=P.StainOptions(method='none'))

def drawn(folder, labels, n=6, size=32):
    "A folder of drawn patches for each class name; tissue in turn."
    for k, label in enumerate(labels):
        (folder/label).mkdir(parents=True)
        for i in range(n): Image.fromarray(render(('TUM', 'STR', 'LYM')[k % 3], 100*k + i, size)).save(folder/label/f'{i:03}.png')
    return folder

def table(folder, labels, n=6):
    "A manifest of drawn patches whose labels are no folder names."
    drawn(folder, [f'c{k}' for k in range(len(labels))], n)
    rows = [dict(path=f'c{k}/{i:03}.png', label=label) for k, label in enumerate(labels) for i in range(n)]
    pd.DataFrame(rows).to_csv(folder/'m.csv', index=False)
    return folder/'m.csv'

@pytest.mark.parametrize('labels', [('0', '1', '001'), ('all', 'rejected', 'patches'), ('NA', 'None', 'nan')])
def test_labels_are_text_and_no_word_is_taken(labels, tmp_path):
    store = quiet(drawn(tmp_path/'r', labels), tmp_path/'s', **PLAIN)
    assert set(P.read_all(store).label) == set(labels) == set(load_prepared(store).card['classes'])
    html = A.audit(store).read_text(encoding='utf-8'); n = json.loads((store/'audit.json').read_text())
    assert {c: v['all'] for c, v in n['classes'].items()} == dict.fromkeys(labels, 6)
    assert set(n['leaks']['mean colour, as stored']['recall']) == set(labels)
    assert all(f'<td>{c}</td>' in html for c in labels)

def test_labels_are_no_paths(tmp_path):
    labels = ['ER+/PR-', '..', 'tumour / invasive']; m = table(tmp_path/'r', labels)
    store = quiet(tmp_path/'r', tmp_path/'out'/'s', manifest=str(m), **PLAIN); A.audit(store)
    assert set(load_prepared(store).manifest.label) == set(labels)
    assert [p.name for p in (tmp_path/'out').iterdir()] == ['s'] and sorted(p.name for p in tmp_path.iterdir()) == ['out', 'r']

def test_its_own_output_is_no_class(tmp_path):
    root = drawn(tmp_path/'r', ['TUM', 'STR']); here = dict(cwd=root)
    small = ['histogan.prepare', '.', '--image-size', '32', '--stain.method', 'none', '--workers', '1']
    for _ in range(2):
        done = run_cli([*small, '--audit'], **here)
        assert done.rc == 0 and 'found 2 classes' in done.out and ': STR 6, TUM 6\n' in done.out, done
    assert is_prepared(root/'prepared')
    other = run_cli([*small, '--out', 'two/more'], **here); assert other.rc == 0 and ': STR 6, TUM 6\n' in other.out, other
    (root/'half'/'.part').mkdir(parents=True)  # as after an interruption
    done = run_cli([*small, '--out', 'half'], **here); assert done.rc == 0 and ': STR 6, TUM 6\n' in done.out, done
    assert load_prepared(root/'half').card['classes'] == ['STR', 'TUM']

def test_links_to_nowhere(tmp_path, capsys):
    root = drawn(tmp_path/'r', ['A', 'B']); (root/'A'/'x.png').symlink_to('/nowhere/x.png')
    small = [str(root), '--image-size', '32', '--stain.method', 'none', '--workers', '1', '--out', str(tmp_path/'s')]
    refused(Run(P.main(small), *capsys.readouterr()), 'A/x.png', '--skip-broken')
    assert P.main([*small, '--skip-broken']) == 0
    m = P.read_all(tmp_path/'s').set_index('path')
    assert m.kept['A/x.png'] == 0 and m.why['A/x.png'].startswith('unreadable: ') and m.kept.sum() == 12

def test_files_that_vanish_after_they_were_listed(tmp_path, monkeypatch):
    root, listed = drawn(tmp_path/'r', ['A', 'B']), P.list_patches
    def vanishing(cfg):
        found = listed(cfg); (root/'B'/'003.png').unlink(missing_ok=True); return found
    monkeypatch.setattr(P, 'list_patches', vanishing)
    with pytest.raises(InputError, match='B/003.png'): quiet(root, tmp_path/'s', **PLAIN)
    for p in scan(root).path: Path(p).touch()
    drawn(tmp_path/'again', ['B']); shutil.copy(tmp_path/'again'/'B'/'003.png', root/'B')
    m = P.read_all(quiet(root, tmp_path/'t', skip_broken=True, **PLAIN))
    assert m.path[m.kept == 0].tolist() == ['B/003.png']

def test_unfinished_work_of_another_set_is_left_alone(tmp_path):
    a, b = drawn(tmp_path/'a', ['A', 'B']), drawn(tmp_path/'b', ['A', 'B'])
    cfg = P.PrepareConfig(str(a), out=str(tmp_path/'s'), workers=1, **PLAIN)
    df, base = P.list_patches(cfg); part = P._claim(cfg.out); plan = P._make_plan(cfg, df, P._work_key(cfg, df, base), part)
    P.do_chunk(P.Job(str(tmp_path/'s'/'images.npy'), str(part), 32, 'none', cfg.stain, None), 0, df.path.tolist())
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path/'s').rglob('*') if p.is_file() and '.lock' not in p.name}
    for other in (dict(root=str(b)), dict(image_size=48)):
        with pytest.raises(InputError, match='unfinished work of other files or options'): quiet(other.pop('root', a), tmp_path/'s', **PLAIN | other)
        assert before == {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in before}
    (part/'plan.json').write_text(json.dumps(dict(key='0', target=None)))  # an earlier version's
    with pytest.raises(InputError, match='another version'): quiet(a, tmp_path/'s', **PLAIN)
    (part/'plan.json').write_bytes(before[part/'plan.json'][0])
    assert same(quiet(a, tmp_path/'t', **PLAIN), quiet(a, tmp_path/'s', **PLAIN))
    moved = a.rename(tmp_path/'moved')  # the same files on another mount: the same work
    cfg = P.PrepareConfig(str(moved), out=str(tmp_path/'u'), workers=1, **PLAIN)
    assert P._work_key(cfg, *P.list_patches(cfg)) == plan.key

def test_few_patches(tmp_path, capsys):
    one = drawn(tmp_path/'one', ['A'], 3); A.audit(quiet(one, tmp_path/'s1', **PLAIN))
    many = drawn(tmp_path/'many', [f'c{k:02}' for k in range(40)], 3); A.audit(quiet(many, tmp_path/'s2', **PLAIN))
    assert json.loads((tmp_path/'s2'/'audit.json').read_text())['leaks']['mean colour, as stored']['chance'] == 1/40
    Image.new('RGB', (128, 4)).save(one/'A'/'thin.png')
    with pytest.raises(InputError, match='thin.png: .*too small'): quiet(one, tmp_path/'s3', **PLAIN)

def test_magnification_is_carried(tmp_path, capsys):
    root = drawn(tmp_path/'r', ['A', 'B'], size=64)
    card = load_prepared(quiet(root, tmp_path/'s', mpp=.25, **PLAIN)).card
    assert card['mpp'] == .5 and set(P.read_all(tmp_path/'s').mpp) == {.25}  # 64 px of 0.25 µm become 32 px of 0.5
    rows = scan(root).assign(mpp=[.25, .5]*6); rows.to_csv(tmp_path/'m.csv', index=False)
    card = load_prepared(quiet(root, tmp_path/'t', manifest=str(tmp_path/'m.csv'), **PLAIN)).card
    assert card['mpp'] == [.5, 1.] and '0.5 to 1 µm per pixel are mixed' in capsys.readouterr().err
    assert 'mpp' not in load_prepared(quiet(root, tmp_path/'u', **PLAIN)).card

def test_arrays_are_prepared_as_they_are_split(tmp_path, capsys):
    x = {s: np.stack([render(('TUM', 'STR')[k % 2], 100*j + k, 32) for k in range(n)]) for j, (s, n) in enumerate(dict(train=8, val=4, test=4).items())}
    np.savez(tmp_path/'two.npz', **{f'{s}_images': v for s, v in x.items()}, **{f'{s}_labels': np.arange(len(v))[:, None] % 2 for s, v in x.items()})
    store = quiet(tmp_path/'two.npz', tmp_path/'s', **PLAIN); d = load_prepared(store)
    assert d.manifest.split.value_counts().to_dict() == dict(train=8, val=4, test=4) and len(d.card['classes']) == 2
    images = PreparedImages(store, d.manifest.store_row, 32)
    for row in (0, 15):
        split_, k = d.manifest.path[row].rsplit('#', 1)[1].split('_images/')
        assert np.array_equal(images[[row]][0], x[split_][int(k)])
    A.audit(store)
    anew = load_prepared(quiet(tmp_path/'two.npz', tmp_path/'t', split_column='', **PLAIN)).manifest.split.value_counts()
    assert anew.sum() == 16 and anew.to_dict() != dict(train=8, val=4, test=4)
    with pytest.raises(InputError, match='brings its own split'): quiet(tmp_path/'two.npz', tmp_path/'u', test_root=str(drawn(tmp_path/'r', ['A'])), **PLAIN)

def test_a_file_system_without_locks_and_folder_sync(tmp_path, monkeypatch):
    import histogan.core as core
    def no_locks(*a): raise OSError(errno.ENOLCK, 'No locks available')
    def fsync(f, real=os.fsync):
        if Path(f'/proc/self/fd/{f}').resolve().is_dir(): raise OSError(errno.EINVAL, 'Invalid argument')
        real(f)
    root = drawn(tmp_path/'r', ['A', 'B']); plain = quiet(root, tmp_path/'s', **PLAIN)
    if core.fcntl: monkeypatch.setattr(core.fcntl, 'lockf', no_locks)
    monkeypatch.setattr(os, 'fsync', fsync)
    assert same(plain, quiet(root, tmp_path/'t', **PLAIN))

def test_without_posix_modules(tmp_path):
    site = tmp_path/'site'; site.mkdir()
    (site/'sitecustomize.py').write_text("import sys\nfor m in ('fcntl', 'resource', 'pwd', 'grp'): sys.modules[m] = None\n")
    root = drawn(tmp_path/'r', ['A', 'B']); env = dict(PYTHONPATH=os.pathsep.join([str(site), str(ROOT)]))
    for program in ('prepare', 'audit'): assert run_cli([f'histogan.{program}', '--help'], env=env).rc == 0

def test_datasets_of_the_first_format_load():
    old = ROOT/'tests'/'prepared_format_1'; store = load_prepared(old)
    assert store.card['classes'] == ['001', 'LYM', 'NA'] and len(store.manifest) == 6 and verify_prepared(old) == []
    assert PreparedImages(old, store.manifest.store_row, 16)[[0, 5]].shape == (2, 16, 16, 3)
    assert '6 of 6 patches kept, 3 classes' in P.summary(old)

# ---- reading it

def test_store_and_folders_give_the_same_patches(patches, tmp_path):
    store = quiet(patches, tmp_path/'s', image_size=64, stain=P.StainOptions(method='none')); s = load_prepared(store)
    a, b = (HistoDataset(s.manifest, s.card['classes'], 64, im) for im in (PreparedImages(store, s.manifest.store_row, 64), None))
    for k in (0, 17, 809): assert all(np.array_equal(x, y) for x, y in zip(a[k], b[k]))

def test_training_on_a_store_and_resuming(patches, whole, tmp_path):
    out = tmp_path/'run'
    first = run_cli(['histogan.train', '--preset', 'smoke', '--data.root', whole, '--out', out, '--run.steps', '6', '--run.save-every', '3'])
    assert first.rc == 0, first.err
    assert f"{(load_prepared(whole).manifest.split == 'train').sum()} training patches, 32 px" in first.out
    cut = tmp_path/'cut'; shutil.copytree(out, cut); (cut/'checkpoints'/'cgan_step000006.pt').unlink()
    again = run_cli(['histogan.train', '--resume', cut])
    assert again.rc == 0 and (cut/'metrics_gan.csv').read_text() == (out/'metrics_gan.csv').read_text(), again.err
    other = quiet(patches, tmp_path/'other', image_size=48, seed=1, stain=P.StainOptions(method='none')); swapped = json.loads((cut/'config.json').read_text())
    swapped['data']['root'] = str(other); (cut/'config.json').write_text(json.dumps(swapped))
    refused(run_cli(['histogan.train', '--resume', cut]), 'is not the prepared dataset that the run began with')

# ---- the audit

BROWSER = shutil.which('chromium') or shutil.which('google-chrome')
FLAGS = ('--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync', '--enable-logging=stderr')

def browse(page, tmp_path, *flags):
    "What a browser puts out, and what it complains about in its console."
    done = subprocess.run([BROWSER, *FLAGS, f'--user-data-dir={tmp_path/"profile"}', *flags, page.as_uri()], capture_output=True, text=True, timeout=60)
    return done.stdout, [l for l in done.stderr.splitlines() if 'CONSOLE' in l]

@pytest.mark.skipif(not BROWSER, reason='no Chromium')
def test_the_audit_in_a_browser(whole, tmp_path):
    store = shutil.copytree(whole, tmp_path/'s')
    html = A.audit(store).read_text(encoding='utf-8'); n = json.loads((store/'audit.json').read_text())
    out, said = browse(store/'audit.html', tmp_path, '--dump-dom')
    assert said == [] and out.count('<img') == 10  # nine classes, one chart
    script = "<script>document.title = [...document.images].filter(i => i.naturalWidth > 100).length + ' of ' + document.images.length + (document.documentElement.scrollWidth > innerWidth ? ' too wide' : '')</script>"
    probe = tmp_path/'probe.html'; probe.write_text(html.replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'").replace('</body>', script + '</body>'), encoding='utf-8')
    for width in ('500', '1280'): assert '<title>10 of 10</title>' in browse(probe, tmp_path, '--dump-dom', f'--window-size={width},900')[0]
    probe.write_text(html.replace('<section>', '<img src="https://example.invalid/x.png"><section>', 1), encoding='utf-8')
    assert any('Content Security Policy' in l for l in browse(probe, tmp_path, '--dump-dom')[1])  # what a fault looks like
    assert n['kept'] == 810 and set(n['classes']) == set(load_prepared(store).card['classes']) and 0 < n['leaks']['colour histogram, as stored']['accuracy'] <= 1

def test_the_audit_can_be_added_later_and_is_the_same_twice(patches, whole, tmp_path):
    store = shutil.copytree(whole, tmp_path/'s'); card = (store/'prepare.json').read_bytes()
    done = run_cli(['histogan.prepare', patches, '--out', store, *SMALL, '--audit'])
    assert done.rc == 0 and 'audit.html' in done.out and done.err == '' and (store/'prepare.json').read_bytes() == card, done.err
    first = (store/'audit.html').read_bytes(), (store/'audit.json').read_bytes()
    assert (A.audit(store).read_bytes(), (store/'audit.json').read_bytes()) == first

# ---- vectors of the reals, kept

def test_kept_vectors_of_reals_change_nothing_but_the_cost(whole, tmp_path, capsys):
    from dataclasses import replace
    from histogan.config import parse_args
    from histogan.step import train_step
    from histogan.train import batches, open_run
    small = ['--preset', 'poc', '--data.root', str(whole), '--data.image-size', '32', '--encoder', 'random:0', '--g.fmap-base', '16', '--g.fmap-min', '8',
             '--g.z-dim', '16', '--g.w-dim', '16', '--g.n-layers', '2', '--d.d-base-ch', '8', '--run.device', 'cpu']
    def run(name, *more, p=0.):
        s, data, _ = open_run(parse_args([*small, '--out', str(tmp_path/name), *more]).config)
        calls, encode, steps, rows = [], s.encoder.encode, batches(data), []
        s.encoder.encode = lambda x, vector: (calls.append(len(x)), encode(x, vector))[1]
        s.ada = replace(s.ada, p=p)
        for _ in range(3): x, y, _, ids = next(steps); rows.append(train_step(s, x, y, ids)[0]); s.ada = replace(s.ada, p=p)
        return pd.DataFrame(rows), len(calls)
    plain, cached = run('plain'), run('cached', '--encoder-cache')
    assert (plain[1], cached[1]) == (6, 3)  # the fakes alone
    assert (plain[0].g_perceptual > 0).all() and len(list((tmp_path/'cache').glob('features-*.npy'))) == 1
    numbers = plain[0].select_dtypes('number').columns
    np.testing.assert_allclose(cached[0][numbers], plain[0][numbers], rtol=1e-4, atol=1e-6)
    assert run('moved', '--encoder-cache', p=.1)[1] == 6  # augmented: the encoder is asked
    capsys.readouterr()
    assert run('turned', '--encoder-cache', '--run.d4')[1] == 6
    assert 'warning: encoder_cache: not used, because run.d4 turns every patch' in capsys.readouterr().err
