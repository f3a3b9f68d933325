"A run is never lost: killed, interrupted, out of disk, damaged, locked, hostile files. Real processes throughout."
import ctypes, errno, functools, json, os, pickle, random, signal, time, zipfile
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import assume, given, settings, strategies as st

from histogan.checkpoint import checkpoint_path, checkpoints, load_checkpoint, save_checkpoint
from histogan.data import BalancedSampler, InputError
from processes import Program, until

SMOKE = ['--preset', 'smoke', '--data.image-size', '16', '--data.batch-size', '4', '--run.n-eval', '18']
LONG = [*SMOKE, '--run.steps', '48', '--run.save-every', '4', '--run.sample-every', '8', '--run.keep', '4']

@pytest.fixture(scope='module')
def base(tmp_path_factory): return tmp_path_factory.mktemp('runs')

def start(*argv, log, **kw): return Program(argv, log, **kw)

@pytest.fixture(scope='module')
def whole(base):
    "A run that nothing disturbed."
    done = start(*LONG, '--out', base/'whole', log=base/'whole.log')
    assert done.wait() == 0, done.said
    return base/'whole'

def same(a, b):
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

def content(path): return {k: v for k, v in load_checkpoint(path).items() if k != 'config'}

def assert_same_run(a, b, step=48):
    "Rows, events, pictures, last checkpoint, best model and export are those of the other run, bit for bit."
    for name in ('metrics_gan.csv', 'events.jsonl', 'artifacts/generator/generator.safetensors'): assert (a/name).read_bytes() == (b/name).read_bytes(), name
    pictures = lambda run: {p.name: p.read_bytes() for p in (run/'samples').iterdir()}
    assert pictures(a) == pictures(b)
    for name in (f'cgan_step{step:06d}.pt', 'cgan_best_model.pt'): assert same(content(a/'checkpoints'/name), content(b/'checkpoints'/name)), name
    assert not list(a.rglob('.*.tmp'))

def slow_disk(seconds=0.1):
    "Every flush to the disk takes a while: a save can be met half-way."
    flush = os.fsync
    def slow(handle):
        time.sleep(seconds)
        flush(handle)
    os.fsync = slow

def slow_run(seconds=0.02):
    "So that a moment lies where it was meant on a fast machine too."
    import histogan.train as t
    inner = t.take_step
    def step(*args, **of):
        time.sleep(0.03)
        return inner(*args, **of)
    t.take_step = step
    slow_disk(seconds)

def saving(run): return [p for p in (run/'checkpoints').glob('.*.tmp')] if run.exists() else []

def newest(run): return int(checkpoints(run)[-1].stem[9:]) if checkpoints(run) else 0

def test_sigkill_at_twenty_random_moments(base, whole):
    run, rng, met, in_save = base/'killed', random.Random(0), 0, 0
    further = rng.sample([4] * 9 + [0] * 11, 20)  # in nine of the twenty it first gets to its next checkpoint
    for k in range(20):  # the same command every time; half the moments lie in a save
        child = start(*LONG, '--out', run, '--resume', 'auto', log=base/'killed.log', before=functools.partial(slow_run, 0.3 if k % 2 else 0.02))
        goal = newest(run) + further[k]
        until(lambda: newest(run) >= goal and ('steps' in child.said or k == 0), child)  # the first may die while it opens its data
        if k % 2: until(lambda: saving(run), child)
        time.sleep(rng.uniform(0, 0.08))
        met += child.running
        child.signal(signal.SIGKILL)
        child.process.join()
        in_save += bool(saving(run))
    assert met >= 15 and in_save >= 5 and newest(run) >= 12, (met, in_save, newest(run))  # under way, half-way in a save, spread over the run
    last = start(*LONG, '--out', run, '--resume', 'auto', log=base/'killed.log')
    assert last.wait() == 0, last.said
    assert_same_run(run, whole)

def test_sigterm_and_sigint_at_random_moments(base, whole):
    run, rng, codes = base/'interrupted', random.Random(1), []
    for k in range(4):
        child = start(*LONG, '--out', run, '--resume', 'auto', log=base/'interrupted.log', before=slow_run)
        until(lambda: 'steps' in child.said, child)
        time.sleep(rng.uniform(0, 0.3))
        if child.running: child.signal((signal.SIGTERM, signal.SIGINT, HANGUP)[k % 3])
        code = child.wait()
        if 'done: ' in child.said: break  # it was faster than the signal, which then meets a program on its way out
        codes.append(code)
        assert code == 130 and 'and saved; go on with --resume' in child.said, (code, child.said)
    assert codes
    last = start('--resume', run, log=base/'interrupted.log')
    assert last.wait() == 0, last.said
    assert_same_run(run, whole)

HANGUP = getattr(signal, 'SIGHUP', signal.SIGTERM)  # of a terminal that is closed

def hung_disk(run):
    "Once a signal came no flush of a checkpoint returns: the save that it asks for stays half-way."
    from histogan import process
    heard, hear, flush = [], process._hear, os.fsync
    def noted(*args):
        heard.append(1)
        hear(*args)
    def hung(handle):
        if heard and saving(run): time.sleep(600)
        flush(handle)
    process._hear, os.fsync = noted, hung

def test_a_second_signal_exits_at_once(base):
    run = base/'twice'
    child = start(*SMOKE, '--run.steps', '2000', '--run.save-every', '2000', '--run.sample-every', '2000', '--out', run, log=base/'twice.log', before=functools.partial(hung_disk, run))
    assert until(lambda: 'steps' in child.said, child), child.said
    child.signal(signal.SIGTERM)
    assert until(lambda: saving(run), child), child.said
    child.signal(signal.SIGTERM)
    assert child.wait(120) == 130 and not checkpoints(run), child.said  # in the middle of the save that the first asked for

def test_the_time_limit_saves_and_the_next_call_goes_on(base, whole):
    run = base/'limited'
    first = start(*LONG, '--out', run, '--run.max-hours', '0.00002', log=base/'limited.log')
    assert first.wait() == 130 and 'saved' in first.said
    step = int(checkpoints(run)[-1].stem[9:])
    more = start('--resume', run, '--run.max-hours', '0', '--allow-change', 'run.max_hours', log=base/'limited.log')
    assert more.wait() == 0, more.said
    assert (run/'metrics_gan.csv').read_bytes() == (whole/'metrics_gan.csv').read_bytes()
    events = [json.loads(l) for l in (run/'events.jsonl').read_text().splitlines()]
    assert [(e['step'], e['action']) for e in events if e['guard'] == 'config'] == [(step, 'changed run.max_hours')]
    assert json.loads((run/'config.json').read_text())['run']['max_hours'] == 0  # the next resume needs no permission

def private_disk(folder, size):
    "A small file system of this process's own."
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x20000 | (0 if os.geteuid() == 0 else 0x10000000)): os._exit(77)  # namespaces: mount (user)
    libc.mount(None, b'/', None, 0x40000 | 0x4000, None)
    if libc.mount(b'tmpfs', str(folder).encode(), b'tmpfs', 0, f'size={size}'.encode()): os._exit(77)

def full_disk(folder, main, mark):
    "In one process, because its disk goes with it: fill it, train, make space, go on."
    private_disk(folder, '40m')
    run = folder/'run'
    assert main([*LONG, '--out', str(run), '--run.steps', '12', '--run.keep', '0']) == 0
    (run/'checkpoints'/'cgan_step000012.pt').unlink()  # as if killed before its last save
    old = {p.name: p.read_bytes() for p in checkpoints(run)}
    room = os.statvfs(folder)
    (folder/'ballast').write_bytes(b'x' * (room.f_bavail * room.f_bsize - 60_000))
    first = main(['--resume', str(run)])
    after = {p.name: p.read_bytes() for p in checkpoints(run)}
    (folder/'ballast').unlink()
    second = main(['--resume', str(run)])
    mark.write_text(json.dumps(dict(codes=[first, second], untouched=after == old, left=[p.name for p in run.rglob('.*.tmp')],
                                    rows=len((run/'metrics_gan.csv').read_text().splitlines()), last=len(load_checkpoint(checkpoint_path(run, 12))))))

def fills(folder, mark):
    from histogan.train import main
    full_disk(folder, main, mark)
    os._exit(0)

def test_a_full_disk(base):
    folder, mark = base/'disk', base/'disk.json'
    folder.mkdir()
    child = start(log=base/'disk.log', before=functools.partial(fills, folder, mark))
    if child.wait() == 77: pytest.skip('this user may not mount a small file system')
    assert mark.exists(), child.said
    found = json.loads(mark.read_text())
    assert found['codes'] == [2, 0] and found['untouched'] and not found['left'], (found, child.said)
    assert found['rows'] == 13 and found['last'] > 10
    lines = [l for l in child.said.splitlines() if l.startswith('error: ')]
    assert len(lines) == 1 and 'No space left' in lines[0] and 'free some space' in lines[0] and 'Traceback' not in child.said, child.said

def test_two_processes_on_one_folder_and_a_lock_left_behind(base):
    run = base/'locked'
    command = [*SMOKE, '--run.steps', '3000', '--run.save-every', '3', '--run.best-metric', 'none', '--out', run, '--data.num-workers', '1', '--resume', 'auto']
    first = start(*command, log=base/'locked.log')
    assert until(lambda: checkpoints(run), first), first.said
    second = start(*command, log=base/'second.log')
    assert second.wait() == 2 and f'another process (process {first.process.pid} on' in second.said and 'Traceback' not in second.said, second.said
    first.signal(signal.SIGKILL)
    assert (run/'.lock').exists()
    third = start(*command, log=base/'third.log')  # at once: the dead run's loader workers may still be alive
    assert until(lambda: 'steps' in third.said, third), third.said
    third.signal(signal.SIGINT)
    assert third.wait() == 130, third.said

class Runs:
    def __reduce__(self): return os.system, ('touch planted',)

def bomb(path):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z:
        z.writestr('archive/data.pkl', pickle.dumps({}))
        z.writestr('archive/data/0', bytes(50_000_000))

@pytest.mark.parametrize('kind, words', [('pickle', 'refused'), ('torch', 'refused'), ('bomb', 'unfolds'), ('another', 'of another architecture')])
def test_hostile_and_foreign_checkpoints(kind, words, base, whole, tmp_path, monkeypatch):
    run = tmp_path/'run'
    assert os.system(f'cp -r {whole} {run}') == 0
    for p in checkpoints(run): p.unlink()
    bad = checkpoint_path(run, 48)
    if kind == 'pickle': bad.write_bytes(pickle.dumps(Runs()))
    if kind == 'torch': torch.save({'G': Runs()}, bad)
    if kind == 'bomb': bomb(bad)
    if kind == 'another':
        state = load_checkpoint(checkpoint_path(whole, 48))
        state['G'] = {k: torch.zeros(7, *v.shape) for k, v in state['G'].items()}
        save_checkpoint(bad, {k: v for k, v in state.items()})
    monkeypatch.chdir(tmp_path)
    child = start('--resume', run, log=tmp_path/'log')
    assert child.wait() == 2 and 'Traceback' not in child.said and not Path('planted').exists(), child.said
    errors = [l for l in child.said.splitlines() if l.startswith('error: ')]
    assert len(errors) == 1 and (words in child.said or kind == 'pickle'), child.said
    if kind == 'another': assert 'G is of another architecture' in errors[0] and 'in the file and' in errors[0]
    else: assert 'none of its 1 checkpoints can be read' in errors[0] and bad.name in child.said

def test_a_generator_of_a_stranger(base, whole, tmp_path):
    torch.save({'card': Runs(), 'G_ema': {}}, tmp_path/'best.pt')
    child = start(tmp_path/'best.pt', '--out', tmp_path/'synth', log=tmp_path/'log', module='histogan.generate')
    assert child.wait() == 2 and child.said.startswith('error: ') and 'refused' in child.said and child.said.count('\n') == 1

def test_retention(base):
    run = base/'kept'
    child = start(*SMOKE, '--run.steps', '24', '--run.save-every', '2', '--run.keep', '2', '--run.keep-every', '4', '--out', run, log=base/'kept.log')
    assert child.wait() == 0, child.said
    assert [int(p.stem[9:]) for p in checkpoints(run)] == [8, 16, 22, 24]  # every fourth, and the newest two
    assert (run/'checkpoints'/'cgan_best_model.pt').exists()

sizes = st.fixed_dictionaries(dict(classes=st.lists(st.integers(1, 9), min_size=1, max_size=4), per_class=st.integers(4, 40), pairs=st.booleans(),
                                   batch=st.integers(1, 3), worlds=st.tuples(st.integers(1, 3), st.integers(1, 4)), seed=st.integers(0, 3)))

def samplers(c, world):
    "One for each process; the batch of all together is the same for any number of them."
    unit = 2 if c['pairs'] else 1
    total = c['batch'] * unit * c['worlds'][0] * c['worlds'][1]
    labels = [k for k, n in enumerate(c['classes']) for _ in range(n)]
    return [BalancedSampler(labels, c['per_class'] * unit, c['seed'], c['pairs'], total // world, r, world) for r in range(world)], total

def used(group, total, steps):
    "What `steps` steps take: a list of batches, each with the images of all processes in the order of a single one."
    unit, out = group[0].unit, []
    for _ in range(steps):
        parts = []
        for s in group:
            part = list(s)[:total // len(group)]
            s.advance(len(part))
            parts.append([tuple(part[i:i + unit]) for i in range(0, len(part), unit)])
        out.append([p for units in zip(*parts) for p in units])
    return out

@settings(deadline=None, max_examples=150)
@given(sizes, st.integers(0, 12), st.integers(1, 12))
def test_no_patch_is_lost_or_doubled_at_any_stop(c, before, after):
    "Stop anywhere, in any epoch, with any number of processes; go on with any other."
    try: (one, total), (first, _), (second, _) = samplers(c, 1), samplers(c, c['worlds'][0]), samplers(c, c['worlds'][1])
    except InputError: assume(False)  # an epoch too short for one batch is refused
    expected = used(one, total, before + after)
    seen = used(first, total, before)
    states = [s.state_dict() for s in first]
    assert all(s == states[0] for s in states)  # one place for all processes
    for s in second: s.load_state_dict(json.loads(json.dumps(states[0])))
    assert seen + used(second, total, after) == expected

@settings(deadline=None, max_examples=100)
@given(sizes, st.integers(0, 3))
def test_every_epoch_is_balanced_whoever_shares_it(c, epoch):
    try: group, total = samplers(c, c['worlds'][0])
    except InputError: assume(False)
    for s in group: s.set_epoch(epoch)
    images = [i for s in group for i in s]
    labels = [k for k, n in enumerate(c['classes']) for _ in range(n)]
    assert len(images) == sum(map(len, group)) and len(images) % total == 0
    counts = pd.Series(images).value_counts()
    for k, n in enumerate(c['classes']):  # no image comes twice before all of its class have come, or nearly: an epoch may span two passes
        mine = counts.reindex([i for i, label in enumerate(labels) if label == k]).fillna(0)
        assert mine.max() <= -(-group[0].samples_per_class // n) + 1
