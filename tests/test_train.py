"The training command in real processes: bad input, interruption, resume, guards, real patches."
import json, os, signal, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT, Run, run_cli, run_python
from histogan.train import main

TINY = ['--preset', 'smoke', '--data.image-size', '16', '--data.batch-size', '4', '--run.n-eval', '18']

@pytest.fixture(scope='module')
def patches(tmp_path_factory):
    "A folder of three classes, 16 real image files each."
    root, rng = tmp_path_factory.mktemp('patches'), np.random.default_rng(0)
    for name in ('ADI', 'MUS', 'TUM'):
        (root/name).mkdir()
        for i in range(16): Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).save(root/name/f'{i}.png')
    return root

def train(*args, **kw): return run_cli(['histogan.train', *TINY, *args], **kw)

def refused(done, *words):
    "Exit code 2 and one line that holds every word."
    lines = [l for l in done.err.splitlines() if l.startswith('error: ')]
    assert done.rc == 2 and len(lines) == 1 and 'Traceback' not in done.err, done.err
    for w in words: assert w in lines[0], lines[0]

@pytest.mark.parametrize('options, words', [
    (['--data.root', 'nowhere'], ['nowhere']),
    (['--data.batch-sise', '4'], ['--data.batch-sise', '--data.batch-size']),
    (['--data.image-size', '48'], ['--data.image-size', '48']),
    (['--data.batch-size', '4096'], ['--data.batch-size', '4096']),
    (['--data.batch-size', 'many'], ['data.batch-size']),
    (['--run.device', 'cuda:7'], ['--run.device', 'cuda:7']),
    (['--resume', 'nowhere'], ['nowhere']),
    (['--encoder', 'pathoduet:nowhere.pth'], ['nowhere.pth']),
    (['--encoder', 'clip'], ['clip'])])
def test_bad_options(options, words, patches, tmp_path, capsys):
    root = [] if '--data.root' in options else ['--data.root', patches]
    rc = main([*TINY, *map(str, root), '--out', str(tmp_path/'run'), *options])  # in this process: a second each saved
    refused(Run(rc, *capsys.readouterr()), *words)
    assert not (tmp_path/'run'/'config.json').exists()

def test_bad_folders(tmp_path):
    (tmp_path/'empty').mkdir()
    refused(train('--data.root', tmp_path/'empty', '--out', tmp_path/'run'), 'empty')
    (tmp_path/'hollow'/'ADI').mkdir(parents=True)
    refused(train('--data.root', tmp_path/'hollow', '--out', tmp_path/'run'), 'ADI')

def test_bad_files_are_all_named(patches, tmp_path):
    root = tmp_path/'bad'
    subprocess.run(['cp', '-r', patches, root], check=True)
    whole = (root/'ADI'/'0.png').read_bytes()
    (root/'ADI'/'cut.png').write_bytes(whole[:len(whole)//2])
    (root/'MUS'/'void.png').write_bytes(b'')
    (root/'TUM'/'text.png').write_text('not a picture')
    refused(train('--data.root', root, '--out', tmp_path/'run'), 'cut.png', 'void.png', 'text.png')

def test_unwritable_out(patches, tmp_path):
    (tmp_path/'file').write_text('in the way')
    refused(train('--data.root', patches, '--out', tmp_path/'file'/'run'), '--out')

def test_taken_folder_is_refused_and_kept(patches, tmp_path):
    first = train('--data.root', patches, '--out', tmp_path/'run', '--run.steps', '2')
    assert first.rc == 0, first.err
    before = (tmp_path/'run'/'metrics_gan.csv').read_bytes()
    refused(train('--data.root', patches, '--out', tmp_path/'run'), '--resume')
    assert (tmp_path/'run'/'metrics_gan.csv').read_bytes() == before

def checkpoint(run, step): return torch.load(run/'checkpoints'/f'cgan_step{step:06d}.pt', weights_only=True)

def same(a, b):
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

def strip(state): return {k: v for k, v in state.items() if k not in ('config', 'checksum')}  # the folder's name is in both

def test_interrupted_and_resumed_is_bit_identical(patches, tmp_path):
    args = ['--data.root', patches, '--run.steps', '60', '--run.save-every', '30', '--run.sample-every', '30']
    assert train(*args, '--out', tmp_path/'whole').rc == 0
    child = subprocess.Popen([sys.executable, '-m', 'histogan.train', *TINY, *map(str, args), '--out', str(tmp_path/'part')],
                             cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 600
    while not (tmp_path/'part'/'checkpoints'/'cgan_step000030.pt').exists() and time.time() < deadline: time.sleep(0.02)
    child.send_signal(signal.SIGTERM)
    out, err = child.communicate(timeout=600)
    if child.returncode == 130:  # it may have been done before the signal came
        assert 'saved' in err and '--resume' in err
        done = run_cli(['histogan.train', '--resume', tmp_path/'part'])
        assert done.rc == 0, done.err
    else: assert child.returncode == 0, err
    assert (tmp_path/'part'/'metrics_gan.csv').read_bytes() == (tmp_path/'whole'/'metrics_gan.csv').read_bytes()
    assert same(strip(checkpoint(tmp_path/'part', 60)), strip(checkpoint(tmp_path/'whole', 60)))
    assert (tmp_path/'part'/'samples'/'step_000060.png').read_bytes() == (tmp_path/'whole'/'samples'/'step_000060.png').read_bytes()

def test_sigkill_then_resume_is_bit_identical(patches, tmp_path):
    args = ['--data.root', patches, '--run.steps', '40', '--run.save-every', '20', '--run.sample-every', '20']
    assert train(*args, '--out', tmp_path/'whole').rc == 0
    child = subprocess.Popen([sys.executable, '-m', 'histogan.train', *TINY, *map(str, args), '--out', str(tmp_path/'part')],
                             cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 600
    while not (tmp_path/'part'/'checkpoints'/'cgan_step000020.pt').exists() and time.time() < deadline: time.sleep(0.01)
    child.kill()
    child.wait()
    done = run_cli(['histogan.train', '--resume', tmp_path/'part'])
    assert done.rc == 0, done.err
    assert (tmp_path/'part'/'metrics_gan.csv').read_bytes() == (tmp_path/'whole'/'metrics_gan.csv').read_bytes()
    assert same(strip(checkpoint(tmp_path/'part', 40)), strip(checkpoint(tmp_path/'whole', 40)))

def damage(path, how):
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole)//2] ^= 1
    path.write_bytes({'truncated': whole[:len(whole)//2], 'flipped': bytes(flipped), 'empty': b''}[how])

@pytest.mark.parametrize('how', ['truncated', 'flipped', 'empty'])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(how, patches, tmp_path, capsys):
    run = tmp_path/'run'
    assert main([*TINY, '--data.root', str(patches), '--out', str(run), '--run.steps', '6', '--run.save-every', '3']) == 0
    before, newest = (run/'metrics_gan.csv').read_bytes(), run/'checkpoints'/'cgan_step000006.pt'
    damage(newest, how)
    capsys.readouterr()
    assert main(['--resume', str(run)]) == 0
    said = capsys.readouterr()
    assert newest.name in said.err and 'steps 3 to 6' in said.out, said
    assert (run/'metrics_gan.csv').read_bytes() == before

def test_gates_choose_and_a_resume_chooses_alike(tmp_path, capsys):
    run = tmp_path/'run'
    gates = ['--run.best-metric', 'selection', '--phantom.per-class', '60', '--data.val-frac', '0.3', '--run.steps', '6', '--run.save-every', '2', '--run.amp', 'auto']
    assert main([*TINY, *gates, '--out', str(run)]) == 0
    assert 'evaluating checkpoints took' in capsys.readouterr().out
    scored = [json.loads(l) for l in (run/'events.jsonl').read_text().splitlines() if '"selection"' in l]
    assert [e['step'] for e in scored] == [2, 4, 6] and all(len(e['quality']['accuracy']) == 9 for e in scored)
    best = torch.load(run/'checkpoints'/'cgan_best_model.pt', weights_only=True)['card']
    assert best['metric'] == 'selection' and best['value'] == next(e['score'] for e in scored if e['step'] == best['step'])
    assert checkpoint(run, 6)['chooser']['best_step'] == best['step'] and checkpoint(run, 6)['chooser']['best'] == min(e['score'] for e in scored)
    whole = {n: (run/n).read_bytes() for n in ('metrics_gan.csv', 'events.jsonl')}
    for step in (4, 6): (run/'checkpoints'/f'cgan_step{step:06d}.pt').unlink()
    assert main(['--resume', str(run)]) == 0
    assert {n: (run/n).read_bytes() for n in whole} == whole
    assert torch.load(run/'checkpoints'/'cgan_best_model.pt', weights_only=True)['card'] == best

def test_resume_refuses_another_configuration(patches, tmp_path):
    assert train('--data.root', patches, '--out', tmp_path/'run', '--run.steps', '2').rc == 0
    refused(run_cli(['histogan.train', '--resume', tmp_path/'run', '--optim.lr-g', '0.5']), 'optim.lr_g')

NAN = '''
import sys, torch, histogan.step as step, histogan.train as t
from histogan.data import to_float
bad = range(int(sys.argv[1]), int(sys.argv[2]))
steps = iter(range(1, 10_000))
def poisoned(x):
    return to_float(x) * float('nan') if next(steps) in bad else to_float(x)
step.to_float = poisoned
sys.exit(t.main(sys.argv[3:]))
'''

def test_nan_batches_are_skipped_and_the_run_goes_on(patches, tmp_path):
    done = run_python(['-c', NAN, 3, 6, *TINY, '--data.root', patches, '--out', tmp_path/'run', '--run.steps', '8', '--run.best-metric', 'none'])
    assert done.rc == 0, done.err
    events = [json.loads(l) for l in (tmp_path/'run'/'events.jsonl').read_text().splitlines()]
    assert [(e['step'], e['guard'], e['action']) for e in events if e['guard'] == 'nonfinite'] == [(k, 'nonfinite', 'skip') for k in (3, 4, 5)]
    assert all(torch.isfinite(v).all() for v in checkpoint(tmp_path/'run', 8)['G_ema'].values())

def test_twenty_nan_batches_stop_with_the_last_good_checkpoint(patches, tmp_path):
    done = run_python(['-c', NAN, 12, 99, *TINY, '--data.root', patches, '--out', tmp_path/'run', '--run.steps', '60', '--run.save-every', '10', '--run.best-metric', 'none'])
    assert done.rc == 3 and 'cgan_step000010.pt' in done.err, done.err
    assert all(torch.isfinite(v).all() for v in checkpoint(tmp_path/'run', 10)['G'].values())

def test_smoke_on_real_patches(shared, tmp_path):
    done = run_cli(['histogan.train', '--preset', 'smoke', '--data.root', shared/'data'/'nct-sample'/'NCT-CRC-HE-100K', '--out', tmp_path/'run'])
    assert done.rc == 0, done.err
    assert len(json.loads((tmp_path/'run'/'artifacts'/'generator'/'generator.json').read_text())['classes']) == 9
    made = run_cli(['histogan.generate', tmp_path/'run', '--per-class', '2', '--out', tmp_path/'synth'])
    assert made.rc == 0 and len(list((tmp_path/'synth').rglob('*.png'))) == 18, made.err

def test_poc_steps_at_256(shared, tmp_path):
    done = run_cli(['histogan.train', '--preset', 'poc', '--data.root', shared/'data'/'nct-sample'/'NCT-CRC-HE-100K', '--data.batch-size', '2',
                    '--run.steps', '2', '--run.best-metric', 'none', '--out', tmp_path/'run'])
    assert done.rc == 0, done.err
    assert Image.open(tmp_path/'run'/'samples'/'step_000002.png').size[1] == 9*256
    assert 'alpha stays 0' in done.out and 'checkpoint_HE.pth' in done.out

def test_help_and_dry_run(patches, tmp_path):
    shown = run_cli(['histogan.train', '--help'])
    assert shown.rc == 0 and '--gate.acc-gate-hi' in shown.out and 'ACC_GATE_HI' in shown.out
    timed = train('--data.root', patches, '--out', tmp_path/'run', '--dry-run')
    assert 'mb_received_per_step' in timed.out and 'processes_that_share_a_step: 8' in timed.out
    assert timed.rc == 0 and 'seconds_per_step' in timed.out and not (tmp_path/'run').exists(), timed.err

def test_the_dial_says_what_it_chose_and_what_that_costs(patches, tmp_path):
    "A larger mark has a wider G; an option that is given wins; a run at it goes on at it."
    said = [train('--data.root', patches, '--out', tmp_path/'run', '--dry-run', *more) for more in ([], ['--scale', 'M', '--optim.lr-g', '0.003'])]
    small, large = (dict(line.split(': ') for line in s.out.splitlines() if ': ' in line) for s in said)
    assert large['batch_size'] == small['batch_size'] == '4' and int(large['G_parameters']) > 2*int(small['G_parameters']), said[1].err
    of = lambda said: [int(c) for c in said['channels'].strip('()').split(',')]
    assert of(large) == [2*c for c in of(small)] and int(large['head_channels']) == 1.5*int(small['head_channels']), said[1].out
    assert int(large['heads']) == int(small['heads']) == 5 and int(large['z_dim']) == 2*int(small['z_dim'])
    assert large['scale'] == 'M' and float(large['lr_g']) == .003 and float(large['half_life_img']) > float(small['half_life_img'])
    done = train('--data.root', patches, '--out', tmp_path/'run', '--scale', 'M', '--run.steps', '2')
    assert done.rc == 0 and json.loads((tmp_path/'run'/'config.json').read_text())['scale'] == 'M', done.err
    other = run_cli(['histogan.train', '--resume', tmp_path/'run', '--scale', 'L'])
    assert other.rc == 2 and '--scale: ' in other.err
    refused = run_cli(['histogan.train', '--preset', 'poc', '--scale', 'M'])
    assert refused.rc == 2 and 'poc has one size' in refused.err
