"""Kill a training N times, resume it each time, and compare the end with a run that nobody disturbed, bit for bit.

    python tests/bench_kills.py N [FOLDER]

Torch is imported once; every attempt is a forked process of its own that runs `histogan.train --resume auto` and is ended
by SIGKILL, half of the times in the middle of a save, else at any moment. The same command goes on where it was stopped;
`FOLDER/kills.json` holds what is done. POSIX only."""
import json, os, random, signal, sys, tempfile, time
from pathlib import Path

os.environ |= dict(OMP_NUM_THREADS='1', MPLBACKEND='Agg')
import matplotlib.pyplot  # before the fork: so that no attempt imports it again
import torch
import torch._dynamo
from histogan import train
from histogan.checkpoint import checkpoints
from histogan.core import read_json, write_json

sys.path.insert(0, str(Path(__file__).parent))
from test_resume import SMOKE, assert_same_run, content, same

STEPS, EVERY = 40, 2
RUN = [*SMOKE, '--run.steps', STEPS, '--run.save-every', EVERY, '--run.sample-every', 8, '--run.keep', 4, '--run.threads', 1]

def begin(run, seed, slow):
    "An attempt as a process of its own; with `slow`, a flush takes a moment longer, so that saves are met half-way."
    log = os.open(f'{run}.log', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    if pid := os.fork():
        os.close(log)
        return pid
    os.setsid()
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        flush = os.fsync
        if slow: os.fsync = lambda handle: (time.sleep(.02), flush(handle))
        code = train.main([str(a) for a in (*RUN, '--run.seed', seed, '--out', run, '--resume', 'auto')])
        sys.stdout.flush()
    except BaseException: __import__('traceback').print_exc()
    finally: os._exit(code)

def ended(pid):
    "Exit code of a process, None while it runs; -9 when it was killed."
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None

def torn(run):
    "Files that are being written just now, or were when the process died."
    try: return [e.name for e in os.scandir(run/'checkpoints') if e.name.startswith('.') and e.name.endswith('.tmp')]
    except FileNotFoundError: return []

def newest(run): return int(checkpoints(run)[-1].stem[9:]) if checkpoints(run) else 0

def wait(pid, condition, seconds):
    "Until a condition holds or some time has passed; the exit code when the process ends before."
    until = time.monotonic() + seconds
    while (code := ended(pid)) is None and time.monotonic() < until and not condition(): time.sleep(.0005)
    return code

def attempt(run, seed, rng, took):
    "Start, and kill at a random moment: (exit code, was it in a save)."
    in_save, goal = rng.random() < .5, newest(run) + EVERY * rng.choice((0, 0, 1))
    pid = begin(run, seed, slow=in_save)
    if in_save:
        code = wait(pid, lambda: newest(run) >= goal, 60)
        if code is None: code = wait(pid, lambda: torn(run), 60)
        if code is None: time.sleep(rng.uniform(0, .03))
    else: code = wait(pid, lambda: False, rng.uniform(0, took))
    if code is None:
        os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, bool(torn(run))

def undisturbed(run, seed):
    "A run to its end."
    pid = begin(run, seed, slow=False)
    while (code := ended(pid)) is None: time.sleep(.01)
    assert code == 0, Path(f'{run}.log').read_text()[-2000:]

def compare(whole, killed):
    "Table, events, pictures, export and every checkpoint."
    assert_same_run(whole, killed, STEPS)
    names = [[p.name for p in checkpoints(run)] for run in (whole, killed)]
    assert names[0] == names[1], names
    for name in names[0]: assert same(content(whole/'checkpoints'/name), content(killed/'checkpoints'/name)), name

def main(n, folder):
    "Until n processes were killed."
    folder.mkdir(parents=True, exist_ok=True)
    path, started = folder/'kills.json', time.monotonic()
    done = read_json(path) if path.exists() else dict(kills=0, in_save=0, before_first=0, compared=0, seed=0)
    took = 1.0  # s of the start and some steps
    while done['kills'] < n or done['compared'] <= done['seed'] - 1:
        seed = done['seed']
        whole, killed = folder/f'whole{seed}', folder/f'killed{seed}'
        if not (whole/'artifacts'/'generator'/'generator.safetensors').exists():
            since = time.monotonic()
            undisturbed(whole, seed)
            took = (time.monotonic() - since) / 4
        code = -9
        while code == -9 and done['kills'] < n:
            rng = random.Random(done['kills'])
            first = not checkpoints(killed)
            code, in_save = attempt(killed, seed, rng, took)
            assert code in (-9, 0), Path(f'{killed}.log').read_text()[-2000:]
            if code == 0: break
            done['kills'] += 1
            done['in_save'] += in_save
            done['before_first'] += first
            write_json(path, done)
            if done['kills'] % 10 == 0:
                each = (time.monotonic() - started) / 10
                started = time.monotonic()
                print(f"{done['kills']} of {n} kills, {done['in_save']} of them in a save; run {seed} at step {newest(killed)}, {each:.2f} s each", flush=True)
        if code == -9: undisturbed(killed, seed)
        compare(whole, killed)
        done |= dict(compared=done['compared'] + 1, seed=seed + 1)
        write_json(path, done)
        if done['kills'] >= n: break
    print(f"{done['kills']} kills ({done['in_save']} in a save, {done['before_first']} before the first checkpoint) of {done['compared']} runs of {STEPS} steps: "
          'tables, events, pictures, checkpoints and exports are those of undisturbed runs, bit for bit')

if __name__ == '__main__':
    if len(sys.argv) < 2: sys.exit(__doc__)
    main(int(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else Path(tempfile.gettempdir())/'histogan-kills')
