"Several processes compute the run of one: under torchrun, with one killed, with another number of them."
import json, os, re, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from conftest import ROOT, free_port, run_python
from histogan.checkpoint import checkpoints, load_checkpoint
from processes import Program, together, until

TINY = ['--preset', 'poc', '--data.root', 'phantom', '--phantom.per-class', '8', '--data.image-size', '16', '--data.batch-size', '8', '--encoder', 'random:0',
        '--g.fmap-base', '16', '--g.fmap-min', '8', '--g.z-dim', '16', '--g.w-dim', '16', '--g.n-layers', '2', '--d.d-base-ch', '8', '--optim.total-steps-estimate', '0', '--run.d4', '--run.n-eval', '18', '--run.threads', '1']
ALL_ON = ['--ada.ada-freeze-until', '6', '--ada.ada-speed', '100', '--ada.acc-threshold', '-1', '--gate.alpha-freeze-until', '6', '--gate.acc-gate-hi', '0.2', '--gate.acc-gate-lo', '0.1',
          '--gate.alpha-dalpha', '0.01', '--gate.alpha-tau', '5', '--loss.pair-weight', '0.5', '--data.pairs', '--sat.saturation-limit', '0.2', '--data.samples-per-class', '8']
RUN = [*TINY, *ALL_ON, '--run.steps', '20', '--run.save-every', '5', '--run.sample-every', '20']

@pytest.fixture(scope='module')
def base(tmp_path_factory): return tmp_path_factory.mktemp('shared')

@pytest.fixture(scope='module')
def alone(base):
    "One process, batch 8."
    done = Program([*RUN, '--out', base/'alone'], base/'alone.log')
    assert done.wait() == 0, done.said
    return pd.read_csv(base/'alone'/'metrics_gan.csv')

DUMP = '''
import json, os, sys
from histogan.checkpoint import checksum
from histogan.config import parse_args
from histogan.step import state_dict
from histogan.train import train
args = parse_args(sys.argv[2:])
s = train(args.config, resume=bool(args.resume))
state = {k: v for k, v in state_dict(s).items() if k != 'chooser'}  # the first process alone looks for the best model
os.makedirs(sys.argv[1], exist_ok=True)
with open(os.path.join(sys.argv[1], os.environ['RANK']), 'w') as f: f.write(checksum(state))
'''

def torchrun(*args): return ['-m', 'torch.distributed.run', '--standalone', '--local-ranks-filter', '0', *args]

def test_two_processes_of_four_are_one_of_eight(base, alone):
    (base/'dump.py').write_text(DUMP)
    done = run_python(torchrun('--nproc_per_node', 2, base/'dump.py', base/'sums', *RUN, '--out', base/'two'), cwd=base)
    assert done.rc == 0, done.err
    two = pd.read_csv(base/'two'/'metrics_gan.csv')
    still = alone.step <= 5  # before ADA moves
    np.testing.assert_allclose(two[still][['d_loss', 'g_loss']], alone[still][['d_loss', 'g_loss']], rtol=0, atol=1e-5)
    assert (two.step == alone.step).all() and (two.n_img == alone.n_img).all() and two.n_img.iloc[-1] == 160
    last = two.iloc[-1]  # everything took part
    assert last.ada_p > 0 and last.alpha > 0 and last.gate_on in (0, 1) and last.lambda_perceptual < 0.01 and two.g_pair.max() > 0 and two.d_r1.max() > 0 and two.g_perceptual.max() > 0
    np.testing.assert_allclose(two[['d_loss', 'g_loss', 'ada_p', 'alpha', 'acc_ema', 'fake_min', 'fake_max']], alone[['d_loss', 'g_loss', 'ada_p', 'alpha', 'acc_ema', 'fake_min', 'fake_max']], rtol=0, atol=1e-3)
    sums = [(base/'sums'/str(r)).read_text() for r in (0, 1)]
    assert len(sums[0]) == 64 and sums[0] == sums[1]  # both ranks: parameters, optimisers, averages, guards, to the last bit

def test_a_run_goes_on_with_another_number_of_processes(base, alone):
    first = together(2, [*RUN, '--out', base/'changed', '--run.max-hours', '0'], base/'changed.log', before=stop_at_ten)
    assert [p.wait() for p in first] == [130, 130], first[0].said
    second = together(4, ['--resume', base/'changed'], base/'changed.log')
    assert [p.wait() for p in second] == [0] * 4, [p.said for p in second]
    changed = pd.read_csv(base/'changed'/'metrics_gan.csv')
    assert (changed.step == alone.step).all() and (changed.epoch == alone.epoch).all()
    np.testing.assert_allclose(changed[['d_loss', 'g_loss', 'ada_p']], alone[['d_loss', 'g_loss', 'ada_p']], rtol=0, atol=1e-3)

def stop_at_ten():
    "One process of the two hears a signal at step 10; both must stop there."
    import histogan.train as t
    inner = t.take_step
    def step(s, *batch, **of):
        if s.step == 9 and t.rank() == 1: os.kill(os.getpid(), signal.SIGTERM)
        return inner(s, *batch, **of)
    t.take_step = step

def test_a_batch_that_cannot_be_shared_and_a_taken_folder(base, alone):
    odd = together(3, [*RUN, '--out', base/'odd'], base/'odd.log')
    assert [p.wait() for p in odd] == [2] * 3 and 'error: --data.batch-size 8: cannot be shared by 3 processes in pairs; take a multiple of 6' in odd[0].said, odd[0].said
    taken = together(2, [*RUN, '--out', base/'alone'], base/'taken.log')
    assert [p.wait() for p in taken] == [2, 2] and 'already holds a run' in taken[0].said and taken[1].said == '', [p.said for p in taken]

def test_a_killed_worker_comes_back(base, alone):
    command = [*RUN, '--out', base/'elastic', '--resume', 'auto']
    (base/'kill.py').write_text(KILL)
    done = run_python(torchrun('--nproc_per_node', 2, '--max_restarts', 1, base/'kill.py', *command), cwd=base)
    assert done.rc == 0, done.err
    assert 'steps 0 to 20' in done.out and 'steps 10 to 20' in done.out, done.out
    assert (base/'elastic'/'metrics_gan.csv').read_bytes() == (base/'two'/'metrics_gan.csv').read_bytes()  # as if nothing had happened
    a, b = (load_checkpoint(checkpoints(base/run)[-1]) for run in ('elastic', 'two'))
    assert all(torch.equal(a['G_ema'][k], b['G_ema'][k]) for k in a['G_ema']) and a['chooser'] == b['chooser']

KILL = '''
import os, signal, sys
import histogan.train as t
inner = t.take_step
def step(s, *batch, **of):
    if s.step == 12 and t.rank() == 1 and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0': os.kill(os.getpid(), signal.SIGKILL)
    return inner(s, *batch, **of)
t.take_step = step
sys.exit(t.main())
'''

def test_generate_shares_the_work(base, alone):
    command = [base/'alone', '--per-class', '5', '--batch', '4']
    one = Program([*command, '--out', base/'one'], base/'one.log', module='histogan.generate')
    assert one.wait() == 0, one.said
    many = together(3, [*command, '--out', base/'many'], base/'many.log', module='histogan.generate')
    assert [p.wait() for p in many] == [0] * 3, many[0].said
    files = lambda d: {str(p.relative_to(d)): p.read_bytes() for p in d.rglob('*') if p.is_file()}
    assert files(base/'one') == files(base/'many') and len(files(base/'one')) == 9*5 + 2

MEETS = '''
import os, sys, time, signal
import torch
from histogan import dist
from histogan.core import say
from histogan.process import run_program
gpus, minutes, hours, kind = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
torch.cuda.device_count = lambda: gpus
torch.cuda.set_device = lambda d: None
def body(argv):
    with dist.processes('cuda' if gpus < 9 else 'cpu', hours=hours, minutes=minutes):
        dist.barrier()
        if dist.rank() == 1 and kind != 'works': os.kill(os.getpid(), dict(killed=signal.SIGKILL, stopped=signal.SIGSTOP)[kind])
        dist.barrier()
        print('together', flush=True)
sys.exit(run_program(body, where=f'process {dist.rank()}' if dist.rank() else '', known=dist.elsewhere))
'''

def meet(ranks, world, gpus=9, minutes=10, hours=1, kind='works', limit=500):
    "Exit codes and words of processes that are started by hand, as without torchrun, and the seconds they took."
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'WORLD_SIZE': str(world), 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free_port())}
    started, since = [], time.monotonic()
    for r in ranks:
        args = [sys.executable, '-c', MEETS, *map(str, (gpus, minutes, hours, kind))]
        started.append(subprocess.Popen(args, env=env | {'RANK': str(r), 'LOCAL_RANK': str(r)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    try: said = [p.communicate(timeout=limit) for p in started if not (kind == 'stopped' and p is started[1])]
    finally:
        for p in started: p.kill()
    assert not any('Traceback' in err for _, err in said), said
    lines = [[l for l in (out + err).splitlines() if re.match(r'(\[process \d\] )?(error|stopped|together)', l)] for out, err in said]  # torch has words of its own
    return [p.wait() for p in started], lines, time.monotonic() - since

def test_processes_started_by_hand_meet():
    codes, lines, _ = meet(range(2), 2)
    assert codes == [0, 0] and lines == [['together']] * 2, lines

def test_more_processes_than_gpus_end_all_at_once():
    "Outside torchrun nobody ends the first process when another leaves."
    codes, lines, took = meet(range(3), 3, gpus=2)
    assert codes == [2, 2, 2] and took < 400, (codes, took, lines)  # far below the ten minutes that they would wait
    assert lines[0] == ['error: process 2 cannot take part: --nproc_per_node: process 2 of this machine finds only 2 GPU; start at most one process for each'], lines
    assert lines[1] == [] and lines[2][0].startswith('[process 2] error: --nproc_per_node: process 2'), lines

@pytest.mark.parametrize('rank', [0, 1])
def test_a_process_that_never_comes_is_given_up(rank):
    codes, lines, took = meet([rank], 2, minutes=.05)
    assert codes == [2] and took < 400 and len(lines[0]) == 1 and '2 processes did not meet at 127.0.0.1:' in lines[0][0], lines

@pytest.mark.parametrize('kind, words', [('killed', 'another process has ended'), ('stopped', 'another process does not answer')])
def test_a_process_that_is_lost_or_stands_still_is_one_line(kind, words):
    codes, lines, took = meet(range(2), 2, hours=15/3600, kind=kind)
    assert codes[0] == 1 and took < 400 and [l for l in lines[0] if words in l] == lines[0], lines

def exchange(world):
    "What two processes count in a step, and what is predicted from sizes."
    import histogan.step as st
    from histogan.config import parse_args
    from histogan.dist import forked, processes, step_traffic, traffic
    def work():
        torch.set_num_threads(1)
        cfg = parse_args([*TINY, *ALL_ON, '--loss.layout-weight', '1', '--gate.alpha-freeze-until', '0']).config
        with processes():
            from histogan.encoder import load_encoder
            s = st.build(cfg, list('abcdefghi'), load_encoder(cfg.encoder), 10)
            s.gate = replace(s.gate, alpha=.1)
            n = cfg.data.batch_size//world
            x, y = torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8), torch.arange(n)//2
            st.train_step(s, x, y)
            with traffic() as seen: st.train_step(s, x, y)
            return seen, step_traffic(s, st.weights_of_g(s), world)
    return forked(world, work)

@pytest.mark.parametrize('world', [2, 4])
def test_the_volume_of_a_step_is_the_predicted_one(world):
    "To the byte where statistics are gathered; of what is reduced the log's numbers alone are not predicted."
    for seen, told in exchange(world):
        assert seen['gathered'] == told['gathered'] and 0 <= seen['reduced'] - told['reduced'] < 8*64, (seen, told)
        assert told['gathered'] < (world - 1)*8//world*3*16*16*4  # less than one image of 16 px for each of a process's
