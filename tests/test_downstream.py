"The downstream command in real processes: tables, keeping, interruption, other test sets, bad input."
import json, os, shutil, signal, subprocess, sys, time

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from conftest import ROOT, run_cli
from histogan.core import read_table
from histogan import downstream as D
from histogan.train import main as train

QUICK = ['--steps', '3', '--seeds', '2', '--per-class', '6', '--few', '4', '--batch-size', '6']
TINY = ['--preset', 'smoke', '--data.image-size', '16', '--data.batch-size', '4', '--run.n-eval', '18', '--run.steps', '2', '--run.best-metric', 'none']

def textures(root):
    "Three classes of 40 image files: stripes along, across, and none."
    rng = np.random.default_rng(0)
    for k, name in enumerate(('ADI', 'MUS', 'TUM')):
        (root/name).mkdir(parents=True)
        for i in range(40):
            wave = 60 * np.sin(np.arange(16) * rng.uniform(1, 2))
            pattern = [wave[None, :, None], wave[:, None, None], 0][k]
            Image.fromarray((rng.uniform(80, 170, (1, 1, 3)) + pattern + rng.normal(0, 9, (16, 16, 3))).clip(0, 255).astype(np.uint8)).save(root/name/f'{i}.png')
    return root

def trained(folder, *options):
    assert train([*TINY, '--out', str(folder), *map(str, options)]) == 0
    return folder

@pytest.fixture(scope='module')
def patches(tmp_path_factory): return textures(tmp_path_factory.mktemp('data')/'set')

@pytest.fixture(scope='module')
def run(patches, tmp_path_factory):
    "A run with a test split, and its table."
    folder = trained(tmp_path_factory.mktemp('runs')/'run', '--data.root', patches, '--data.test-frac', '0.25', '--data.val-frac', '0.2')
    done = run_cli(['histogan.downstream', folder, *QUICK])
    assert done.rc == 0, done.err
    return folder, done

def table(folder, name='downstream'):
    numbers = ('value', 'seed', 'n_test', 'steps', 'recall', 'n')
    return read_table(folder/'metrics'/f'{name}.csv', numbers)

def test_every_regime_has_every_figure(run):
    folder, done = run
    t = table(folder)
    assert set(t.model) == {'small', *D.COLOUR} and set(t.regime) == {'real', 'synthetic', 'both'}
    assert len(t.groupby(['model', 'regime', 'reals', 'seed'])) == 3 * 5 * 2
    real = t[t.tested_on == 'real'].pivot_table(index=['model', 'regime', 'reals', 'seed'], columns='metric', values='value')
    assert real.notna().all().all() and {'accuracy', 'balanced_accuracy', 'macro_f1', 'ece', 'ece_scaled', 'brier', 'brier_scaled', 'temperature'} == set(real)
    assert real.drop(columns=['temperature', 'brier', 'brier_scaled']).stack().between(0, 1).all() and set(t.steps) == {3}
    for words in ("the run's test patches", '30 trainings of 3 steps, 10 of small to be done', 'small on real + synthetic, 4 reals per class', 'tables and figures'): assert words in done.out, done.out

def test_tables_agree_with_each_other(run):
    folder, _ = run
    t, c, r = (table(folder, n) for n in ('downstream', 'downstream_confusion', 'downstream_recall'))
    key = ['model', 'regime', 'reals', 'seed', 'tested_on']
    right = c[c.true == c.predicted].groupby(key).n.sum() / c.groupby(key).n.sum()
    accuracy, balanced = (t[t.metric == m].set_index(key).value for m in ('accuracy', 'balanced_accuracy'))
    pd.testing.assert_series_equal(right, accuracy.reindex(right.index), check_names=False, atol=1e-5)
    pd.testing.assert_series_equal(r.groupby(key).recall.mean(), balanced.reindex(right.index), check_names=False, atol=1e-5)
    manifest = read_table(folder/'artifacts'/'manifest.csv')
    assert set(t[(t.tested_on == 'real') & (t.metric == 'accuracy')].n_test) == {(manifest.split == 'test').sum()}
    facts = json.loads((folder/'metrics'/'downstream.json').read_text())
    assert facts['patches'] == dict(train=int((manifest.split == 'train').sum()), val=int((manifest.split == 'val').sum()), test=int((manifest.split == 'test').sum()), synth=18)
    assert len(facts['findings']) == 5 and facts['findings'][2].startswith('With 4 reals per class to train the classifier')
    per_class = facts['patches']['train'] / 3  # the generator saw all of them: the sentence says so
    assert f'of a generator that was trained on all {per_class:.0f} of each class' in facts['findings'][2]

def test_nothing_is_trained_twice(run, capsys):
    folder, _ = run
    before = (folder/'metrics'/'downstream.csv').read_bytes()
    kept = sorted((folder/'metrics'/'cache'/'downstream').glob('*.npz'))
    kept[0].write_bytes(kept[0].read_bytes()[:-40])
    kept[1].unlink()
    times = {p: p.stat().st_mtime_ns for p in kept[2:]}
    assert D.main([str(folder), *QUICK]) == 0 and (folder/'metrics'/'downstream.csv').read_bytes() == before
    assert {p: p.stat().st_mtime_ns for p in kept[2:]} == times and all(p.exists() for p in kept)

def test_interrupted_and_called_again(run, patches, tmp_path):
    whole, _ = run
    part = trained(tmp_path/'run', '--data.root', patches, '--data.test-frac', '0.25', '--data.val-frac', '0.2')
    args = [sys.executable, '-m', 'histogan.downstream', str(part), *QUICK]
    child = subprocess.Popen(args, cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    cache, deadline = part/'metrics'/'cache'/'downstream', time.time() + 600
    while len(list(cache.glob('*.npz'))) < 4 and time.time() < deadline and child.poll() is None: time.sleep(.01)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=600)
    assert child.returncode in (0, 130) and 'Traceback' not in err, err
    if child.returncode == 130: assert 'goes on' in err and not (part/'metrics'/'downstream.csv').exists()
    assert D.main([str(part), *QUICK]) == 0
    assert (part/'metrics'/'downstream.csv').read_bytes() == (whole/'metrics'/'downstream.csv').read_bytes()

def test_without_a_test_split_half_of_val_is_the_test(patches, tmp_path, capsys):
    folder = trained(tmp_path/'run', '--data.root', patches, '--data.test-frac', '0', '--data.val-frac', '0.3')
    s = D.open_sources(folder, 6)
    assert len(s.val.y) + len(s.test.y) == 36 and min(len(s.val.y), len(s.test.y)) >= 12 and 'half' in s.about['test']
    assert not {x.tobytes() for x in s.val.x} & {x.tobytes() for x in s.test.x}

def test_a_phantom_run_without_test_split_is_tested_on_other_slides(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(D, 'FRESH', 4)
    folder = trained(tmp_path/'run')
    assert D.main([str(folder), '--steps', '1', '--seeds', '1', '--per-class', '6', '--few', '2']) == 0
    facts = json.loads((folder/'metrics'/'downstream.json').read_text())
    assert 'fresh phantom' in facts['sources']['test'] and facts['patches']['test'] >= 18
    assert 'fresh phantom' in capsys.readouterr().out

def test_a_timm_network(run, capsys):
    folder, _ = run
    assert D.main([str(folder), '--model', 'mobilenetv2_035', '--steps', '1', '--seeds', '1', '--per-class', '6', '--few', '40']) == 0
    said = capsys.readouterr()
    assert 'starts from random weights' in said.err and 'mobilenetv2_035 on real + synthetic' in said.out

@pytest.mark.parametrize('options, words', [
    (['--model', 'mobilenet_v2'], ['--model mobilenet_v2']),
    (['--model', 'mobilenetv2_035', '--weights', 'nowhere.pth'], ['nowhere.pth']),
    (['--weights', 'w.pth'], ['--weights']),
    (['--steps', '0'], ['--steps']),
    (['--few', '0'], ['--few']),
    (['--device', 'cuda:7'], ['--device', 'cuda:7']),
    (['--sead', '3'], ['--sead', '--seeds'])])
def test_bad_options(options, words, run, capsys):
    assert D.main([str(run[0]), '--per-class', '6', *options]) == 2
    lines = [l for l in capsys.readouterr().err.splitlines() if l.startswith('error: ')]
    assert len(lines) == 1 and all(w in lines[0] for w in words), lines

def test_bad_runs(patches, tmp_path, capsys):
    assert D.main([str(tmp_path/'nowhere')]) == 2
    folder = trained(tmp_path/'run', '--data.root', patches, '--data.test-frac', '0', '--data.val-frac', '0')
    assert D.main([str(folder), '--per-class', '6']) == 2
    folder = trained(tmp_path/'other', '--data.root', patches, '--data.test-frac', '0', '--data.val-frac', '0.3')
    shutil.rmtree(folder/'checkpoints')
    assert D.main([str(folder), '--per-class', '6']) == 2
    lines = [l for l in capsys.readouterr().err.splitlines() if l.startswith('error: ')]
    assert len(lines) == 3 and '--data.val-frac' in lines[1] and 'cgan_best_model.pt' in lines[2], lines

def few(root, classes, n):
    "n patches of each class, named for its number."
    rng = np.random.default_rng(1)
    for k in range(classes):
        (root/f'c{k:03}').mkdir(parents=True)
        for i in range(n):
            x = rng.integers(0, 256, (16, 16, 3), np.uint8) // 2 + k % 100
            Image.fromarray(x.astype(np.uint8)).save(root/f'c{k:03}'/f'{k}-{i}.png')
    return root

ONCE = ['--steps', '2', '--seeds', '1', '--per-class', '6', '--few', '2', '--batch-size', '8']

def test_seven_patches_a_class_give_figures_with_a_warning(tmp_path, capsys):
    folder = trained(tmp_path/'run', '--data.root', few(tmp_path/'set', 2, 7))
    capsys.readouterr()
    assert D.main([str(folder), *ONCE]) == 0
    said = capsys.readouterr()
    assert 'warning: few test patches' in said.err and 'accuracy' in said.out
    assert table(folder).value.notna().all()

def test_one_class_is_refused_before_the_work(tmp_path, capsys):
    folder = trained(tmp_path/'run', '--data.root', few(tmp_path/'set', 1, 30))
    capsys.readouterr()
    assert D.main([str(folder), *ONCE]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert 'one class (c000)' in said and '2 classes or more' in said and not (folder/'synth').exists()

def test_a_hundred_classes_of_three(tmp_path, capsys):
    folder = trained(tmp_path/'run', '--data.root', few(tmp_path/'set', 100, 3), '--run.n-eval', '100')
    capsys.readouterr()
    code = D.main([str(folder), *ONCE])
    said = capsys.readouterr().err
    assert 'Traceback' not in said and (code == 0 and 'few test patches' in said or code == 2 and 'each class needs' in said), said

def test_labels_that_are_paths_words_and_numbers(tmp_path, capsys):
    "Classes called ER+/PR-, .., NA and 001 keep their names, and nothing is written elsewhere."
    names, rng, rows = ['ER+/PR-', '..', 'NA', '001'], np.random.default_rng(0), []
    (tmp_path/'in').mkdir()
    for k, name in enumerate(names):
        for i in range(12):
            x = rng.integers(0, 120, (16, 16, 3), np.uint8) + 30 * k
            Image.fromarray(x.astype(np.uint8)).save(tmp_path/'in'/f'{k}-{i}.png')
            rows.append(f"{k}-{i}.png,{name},{'test' if i % 4 == 0 else 'val' if i % 4 == 1 else 'train'}")
    (tmp_path/'in'/'m.csv').write_text('path,label,split\n' + '\n'.join(rows) + '\n')
    folder = trained(tmp_path/'runs'/'run', '--data.manifest', tmp_path/'in'/'m.csv')
    before = sorted(p for p in tmp_path.rglob('*') if 'run/' not in str(p) and 'cache' not in str(p))
    assert D.main([str(folder), *ONCE]) == 0
    assert sorted(p for p in tmp_path.rglob('*') if 'run/' not in str(p) and 'cache' not in str(p)) == before
    assert set(table(folder, 'downstream_recall').label) == set(names)
    assert 'fresh phantom' not in capsys.readouterr().out  # a manifest is no phantom
