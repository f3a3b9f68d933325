"A run is complete, can be moved, and changes nothing behind the user's back."
import json, re, shutil, sys
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from conftest import run_cli, run_python
from histogan.checkpoint import checkpoint_path, checkpoints, load_checkpoint, save_checkpoint
from histogan.config import PRESETS, differing, fixed, load_config, parse_args, save_config
from histogan.core import InputError
from histogan.train import main, open_run, train
from processes import Program

TINY = ['--preset', 'smoke', '--data.image-size', '16', '--data.batch-size', '4', '--run.n-eval', '18']
CHOSEN = [*TINY, '--encoder', 'cnn', '--run.best-metric', 'selection', '--phantom.per-class', '40', '--data.val-frac', '0.35',
          '--run.steps', '6', '--run.save-every', '2', '--run.keep', '0']

def run(*args, code=0):
    "The program in this process; its lines are in capsys."
    assert main(list(map(str, args))) == code

def lines(text, start='error: '): return [l for l in text.splitlines() if l.startswith(start)]

@pytest.fixture(scope='module')
def patches(tmp_path_factory):
    "A folder of three classes, 16 files each."
    return draw(tmp_path_factory.mktemp('patches'), ('ADI', 'MUS', 'TUM'))

def draw(root, names):
    rng = np.random.default_rng(0)
    for name in names:
        (root/name).mkdir()
        for i in range(16): Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).save(root/name/f'{i}.png')
    return root

@pytest.fixture(scope='module')
def plain(patches, tmp_path_factory):
    "Eight steps on a folder, a checkpoint every four."
    out = tmp_path_factory.mktemp('plain')/'run'
    run(*TINY, '--data.root', patches, '--run.steps', 8, '--run.save-every', 4, '--out', out)
    return out

@pytest.fixture(scope='module')
def chosen(tmp_path_factory):
    "Six steps with a trained encoder and a held-out classifier."
    out = tmp_path_factory.mktemp('chosen')/'run'
    run(*CHOSEN, '--out', out)
    return out

def copy(source, target, back_to=None):
    "A copy of a run, as it was at a step."
    shutil.copytree(source, target)
    for p in checkpoints(target):
        if back_to is not None and int(p.stem[9:]) > back_to: p.unlink()
    return target

def test_encoder_and_classifier_are_part_of_the_run(chosen, tmp_path, capsys):
    made = load_config(chosen).made
    assert re.fullmatch(r'cnn [0-9a-f]{64}', made.encoder[0]) and re.fullmatch(r'[0-9a-f]{16,64}', made.classifier), made
    assert load_checkpoint(checkpoint_path(chosen, 6))['config']['made']['classifier'] == made.classifier
    elsewhere = copy(chosen, tmp_path/'no cache here'/'run', 2)  # another folder, no PARENT/cache
    run('--resume', elsewhere)
    for name in ('metrics_gan.csv', 'events.jsonl', 'artifacts/generator/generator.safetensors'):
        assert (elsewhere/name).read_bytes() == (chosen/name).read_bytes(), name

@pytest.mark.parametrize('name', ['encoder', 'classifier'])
def test_another_encoder_or_classifier_is_refused_by_name(name, chosen, tmp_path, capsys):
    other = copy(chosen, tmp_path/'run', 2)
    file = other/'artifacts'/f'{name}.safetensors'
    from safetensors import safe_open
    with safe_open(file, 'pt') as f: facts = f.metadata()
    weights = load_file(file)
    first = next(k for k, v in weights.items() if v.is_floating_point() and v.ndim > 1)
    weights[first] = weights[first] + 1e-3
    save_file(weights, file, facts)
    run('--resume', other, code=2)
    said, = lines(capsys.readouterr().err)
    assert f'{name}.safetensors' in said and 'put' in said, said

def test_scores_of_a_lost_classifier_are_not_compared(chosen, tmp_path, capsys):
    lost = copy(chosen, tmp_path/'run', 2)
    file = lost/'artifacts'/'classifier.safetensors'
    file.unlink()
    cfg = load_config(lost)
    save_config(replace(cfg, made=replace(cfg.made, classifier='0' * 64)), lost/'config.json')  # as if trained on another machine
    run('--resume', lost, code=2)
    assert 'classifier.safetensors' in lines(capsys.readouterr().err)[0]
    run('--resume', lost, '--run.best-metric', 'fd', '--allow-change', 'run.best_metric')
    state = load_checkpoint(checkpoint_path(lost, 6))['chooser']
    assert state['metric'].startswith('fd') and state['best_step'] in (4, 6)

def test_an_old_run_goes_on(chosen, tmp_path, capsys):
    "Keys of version 0.1: gates, min_agreement, best_metric gates; no chooser, no hashes."
    old = copy(chosen, tmp_path/'run', 4)
    data = json.loads((old/'config.json').read_text())
    del data['made']
    data['gates'] = data.pop('selection')
    for now, was in {'min_accuracy': 'min_agreement', 'min_class_accuracy': 'min_class_agreement'}.items():
        data['gates'][was] = data['gates'].pop(now)
    data['run']['best_metric'] = 'gates'
    (old/'config.json').write_text(json.dumps(data))
    state = load_checkpoint(checkpoint_path(old, 4))
    del state['chooser']
    save_checkpoint(checkpoint_path(old, 4), state | dict(gates=dict(best=1e-9, best_step=2), best=float('inf'), config=data))
    for name in ('encoder', 'classifier'): (old/'artifacts'/f'{name}.safetensors').unlink()
    run('--resume', old)
    said = capsys.readouterr()
    assert 'choosing begins again' in said.err and 'best model of step 6' in said.out, said
    assert load_config(old).made.classifier and (old/'artifacts'/'classifier.safetensors').is_file()

def test_two_runs_started_together_keep_their_own(tmp_path):
    both = [Program([*CHOSEN, '--out', tmp_path/name], tmp_path/f'{name}.log') for name in 'ab']
    assert [p.wait() for p in both] == [0, 0], [p.said for p in both]
    for name in ('artifacts/encoder.safetensors', 'artifacts/classifier.safetensors', 'metrics_gan.csv', 'events.jsonl'):
        assert (tmp_path/'a'/name).read_bytes() == (tmp_path/'b'/name).read_bytes(), name
    shutil.rmtree(tmp_path/'cache')
    for p in checkpoints(tmp_path/'a')[1:]: p.unlink()
    run('--resume', tmp_path/'a')
    assert (tmp_path/'a'/'metrics_gan.csv').read_bytes() == (tmp_path/'b'/'metrics_gan.csv').read_bytes()

# ---- what may change

def test_changed_constants_are_in_force(plain, tmp_path):
    target = copy(plain, tmp_path/'run')
    args = parse_args(['--resume', str(target), '--optim.betas', '0.5', '0.9', '--loss.lambda-perceptual', '0.02', '--gate.alpha-max', '0.3',
                       '--run.steps', '12', '--allow-change', 'optim.betas', 'loss.lambda_perceptual', 'gate.alpha_max', 'run.steps'])
    s, _, _ = open_run(args.config, resume=True)
    assert s.step == 8 and s.sat.lambda_perceptual == 0.02 and s.sat.alpha_max == 0.3
    assert {tuple(g['betas']) for o in (s.opt_G, s.opt_D) for g in o.param_groups} == {(0.5, 0.9)}

def leaves(cfg, where=''):
    for f in fields(cfg):
        v = getattr(cfg, f.name)
        if is_dataclass(v): yield from leaves(v, f'{where}{f.name}.')
        else: yield where + f.name, v

def other(v):
    "Another number of the same kind, as typed; None when there is no simple one."
    if isinstance(v, (int, float)): return [str(v * 2 if v else 1)]
    return ['0.25', '0.75'] if isinstance(v, tuple) and len(v) == 2 else None

def test_every_number_and_switch_is_changed_or_refused(plain):
    "None is accepted and ignored."
    seen = []
    for name, v in leaves(load_config(plain)):
        if name.startswith('made.') or not (isinstance(v, bool) or (new := other(v))): continue
        *section, last = name.replace('_', '-').split('.')
        option = ['--' + '.'.join([*section, 'no-'*v + last])] if isinstance(v, bool) else ['--' + name.replace('_', '-'), *new]
        try: cfg = parse_args(['--resume', str(plain), *option, '--allow-change', name]).config
        except InputError as e:
            if fixed(name): assert any(w in str(e) for w in ('cannot be changed', 'must', 'need', 'both off')), (name, str(e))
            continue
        assert name in differing(load_config(plain), cfg) or name.split('.')[0] in ('g', 'd'), name
        seen.append(name)
    assert 'loss.pair_contrast' not in seen  # what was averaged before is in other units
    assert len(seen) > 40 and {'optim.lr_g', 'optim.grad_clip', 'ada.ada_speed', 'run.save_every'} <= set(seen), seen

def test_a_longer_run_says_what_happens_to_the_learning_rate(plain, tmp_path, capsys):
    target = copy(plain, tmp_path/'run')
    run('--resume', target, '--run.steps', 16, '--allow-change', 'run.steps')
    said, = lines(capsys.readouterr().err, 'warning: the schedule')
    rate = float(re.search(r'--optim.lr-g (\S+)', said)[1])
    table = pd.read_csv(target/'metrics_gan.csv')
    assert abs(rate / table.lr_g[7] - 1) < .01 and table.lr_g[8] > 1.2 * table.lr_g[7], said
    kept = copy(plain, tmp_path/'kept')
    way = said.split('rates add ')[1].split()
    run('--resume', kept, '--run.steps', 10, *way)
    assert 'schedule is stretched' not in capsys.readouterr().err
    table = pd.read_csv(kept/'metrics_gan.csv')
    assert abs(table.lr_g[9] / table.lr_g[7] - 1) < .01

def test_fewer_steps_than_done_are_refused(plain, capsys):
    before = {p: p.read_bytes() for p in plain.rglob('*') if p.is_file() and p.name != '.lock'}
    run('--resume', plain, '--run.steps', 5, '--allow-change', 'run.steps', code=2)
    said, = lines(capsys.readouterr().err)
    assert '--run.steps 5' in said and 'has done 8 steps' in said
    assert {p: p.read_bytes() for p in before} == before

# ---- another place, another version

def test_run_and_data_that_were_moved_together_go_on(patches, plain, tmp_path):
    first = tmp_path/'here'
    shutil.copytree(patches, first/'data')
    run(*TINY, '--data.root', first/'data', '--run.steps', 8, '--run.save-every', 4, '--out', first/'run')
    shutil.move(first, tmp_path/'there')
    moved = tmp_path/'there'/'run'
    checkpoint_path(moved, 8).unlink()
    run('--resume', moved, '--data.root', tmp_path/'there'/'data', '--allow-change', 'data.root')
    assert (moved/'metrics_gan.csv').read_bytes() == (plain/'metrics_gan.csv').read_bytes()

def test_rows_of_another_version_keep_their_columns(plain, tmp_path):
    target = copy(plain, tmp_path/'run', 4)
    whole = pd.read_csv(plain/'metrics_gan.csv', dtype=str, keep_default_na=False)
    whole.drop(columns='ada_p').to_csv(target/'metrics_gan.csv', index=False)  # a column that came later
    run('--resume', target)
    mixed = pd.read_csv(target/'metrics_gan.csv', dtype=str, keep_default_na=False)
    assert list(mixed) == list(whole) and (mixed.ada_p[:4] == '').all()
    pd.testing.assert_frame_equal(mixed.drop(columns='ada_p'), whole.drop(columns='ada_p'))

def test_a_wrong_type_in_the_configuration_is_one_line(plain, tmp_path, capsys):
    target = copy(plain, tmp_path/'run')
    data = json.loads((target/'config.json').read_text())
    data['run']['steps'] = 'eight'
    (target/'config.json').write_text(json.dumps(data))
    run('--resume', target, code=2)
    said = capsys.readouterr().err
    assert said.count('\n') == 1 and "'run.steps' is 'eight', expected a whole number" in said, said

# ---- what is said before the first step

POC = ['--preset', 'poc', '--data.image-size', '16', '--data.batch-size', '4', '--g.fmap-base', '16', '--g.fmap-min', '8', '--g.z-dim', '16', '--g.w-dim', '16',
       '--g.n-layers', '2', '--d.d-base-ch', '8', '--run.steps', '1', '--run.best-metric', 'none']

def test_the_recipe_on_raw_patches_warns_once_and_shows_the_way(patches, tmp_path, capsys):
    run(*POC, '--data.root', patches, '--out', tmp_path/'raw')
    said = [l for l in lines(capsys.readouterr().err, 'warning: ') if 'stain' in l]
    assert len(said) == 1 and f'python -m histogan.prepare {patches} --out prepared' in said[0] and '--data.root prepared' in said[0]
    run(*POC, '--data.root', 'phantom', '--phantom.per-class', 8, '--out', tmp_path/'drawn')
    assert 'stain' not in capsys.readouterr().err

def test_a_manifest_replaces_the_phantom_with_every_preset(patches, tmp_path):
    rows = [(str(p), p.parent.name, ('train', 'train', 'val')[i % 3]) for i, p in enumerate(sorted(patches.rglob('*.png')))]
    pd.DataFrame(rows, columns=['path', 'label', 'split']).to_csv(tmp_path/'m.csv', index=False)
    run(*TINY, '--data.manifest', tmp_path/'m.csv', '--run.steps', 1, '--out', tmp_path/'run')
    cfg = load_config(tmp_path/'run')
    assert not cfg.is_phantom and load_checkpoint(checkpoint_path(tmp_path/'run', 1))['classes'] == ['ADI', 'MUS', 'TUM']
    assert not list(tmp_path.glob('cache/phantom*'))

def test_names_in_other_scripts(tmp_path, capsys):
    (tmp_path/'data').mkdir()
    draw(tmp_path/'data', ('рак', '上皮'))
    run(*TINY, '--data.root', tmp_path/'data', '--run.steps', 1, '--out', tmp_path/'run')
    said = lines(capsys.readouterr().out, 'note: the font')
    assert len(said) == 1 and "class 1 for '上皮'" in said[0] and 'рак' not in said[0]

# ---- machines

WINDOWS = '''
import sys
for name in ('fcntl', 'resource', 'pwd', 'grp', 'termios'): sys.modules[name] = None
import os
del os.getloadavg, os.geteuid
import histogan.train as t
sys.exit(t.main(sys.argv[1:]))
'''

def test_without_posix_modules(patches, tmp_path):
    shown = run_python(['-c', WINDOWS, '--help'])
    assert shown.rc == 0 and '--optim.lr-g' in shown.out, shown.err
    done = run_python(['-c', WINDOWS, *TINY, '--data.root', patches, '--run.steps', 2, '--out', tmp_path/'run'])
    assert done.rc == 0, done.err
    timed = run_python(['-c', WINDOWS, *TINY, '--data.root', patches, '--dry-run', '--out', tmp_path/'dry'])
    assert timed.rc == 0 and 'memory_mb' in timed.out, timed.err

TWICE = '''
import os, signal, sys, threading, time
import histogan.train as t
from histogan import process
from histogan.config import parse_args
inner = t.take_step
def slow(*args, **of):
    if args[0].step == 2: threading.Thread(target=twice).start()
    if args[0].step >= 2: time.sleep(1.5)
    return inner(*args, **of)
heard, hear = threading.Event(), process._hear
def noted(*args):
    heard.set()
    hear(*args)
process._hear = noted
def twice():
    os.kill(os.getpid(), signal.SIGINT)
    heard.wait(60)  # two that wait at once would be one
    os.kill(os.getpid(), signal.SIGINT)
t.take_step = slow
try: t.train(parse_args(sys.argv[1:]).config)
except KeyboardInterrupt: print('the kernel lives')
'''

def test_two_interrupts_spare_a_kernel(patches, tmp_path):
    done = run_python(['-c', TWICE, *TINY, '--data.root', patches, '--run.steps', 9, '--out', tmp_path/'run'])
    assert done.rc == 0 and 'the kernel lives' in done.out, (done.rc, done.err)

# ---- watching

def test_a_hook_sees_every_step(patches, tmp_path, capsys):
    seen = []
    cfg = parse_args([*TINY, '--data.root', str(patches), '--run.steps', '3', '--out', str(tmp_path/'run')]).config
    s = train(cfg, hook=lambda s, row, verdicts: seen.append((s.step, row['d_loss'], len(verdicts))))
    table = pd.read_csv(tmp_path/'run'/'metrics_gan.csv')
    assert [k for k, _, _ in seen] == [1, 2, 3] == table.step.tolist() and s.step == 3
    np.testing.assert_allclose([d for _, d, _ in seen], table.d_loss)

def test_tensorboard_reads_back(patches, tmp_path, capsys):
    read = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    out = tmp_path/'run'
    run(*TINY, '--data.root', patches, '--run.steps', 6, '--run.save-every', 3, '--run.sample-every', 3, '--run.tensorboard', '--out', out)
    checkpoint_path(out, 6).unlink()
    run('--resume', out, '--run.max-hours', 1, '--allow-change', 'run.max_hours')
    board = read.EventAccumulator(str(out/'tensorboard'), size_guidance=dict(scalars=0, images=0, tensors=0))
    board.Reload()
    table = pd.read_csv(out/'metrics_gan.csv')
    said = board.Scalars('D/d_loss')
    assert [e.step for e in said] == table.step.tolist()  # a resume forgets the steps after its checkpoint
    np.testing.assert_allclose([e.value for e in said], table.d_loss, rtol=1e-6)
    assert {e.step for e in board.Images('samples')} == {3, 6}
    event = next(t for t in board.Tags()['tensors'] if t.startswith('events/config'))
    assert b'changed run.max_hours' in board.Tensors(event)[0].tensor_proto.string_val[0]

def test_tensorboard_is_optional(patches, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)
    run(*TINY, '--data.root', patches, '--run.steps', 2, '--run.tensorboard', '--out', tmp_path/'run', code=2)
    assert 'pip install tensorboard' in lines(capsys.readouterr().err)[0]
