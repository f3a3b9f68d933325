"The ablation as a user runs it: killed, interrupted and gone on with, and told what is wrong with the command line."
import json, os, signal, subprocess, sys, time

import pandas as pd
import pytest
import torch

from conftest import ROOT, run_cli
from histogan.ablate import main
from histogan.core import read_table

torch.set_num_threads(1)
QUICK = ['--quick', '--rows', 'poc,heads,modern']
HEAR = 'import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from histogan.ablate import main; sys.exit(main())'  # ignored where tests run in the background

def start(out):
    "The program, on its own."
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'Agg'}
    return subprocess.Popen([sys.executable, '-c', HEAR, *QUICK, '--out', str(out)], cwd=out.parent, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

def stop_after(out, name, sig):
    "Stop it in the middle of the row after `name`; its exit code and last words."
    p, end = start(out), time.time() + 900
    try:
        while time.time() < end and p.poll() is None and not ((out/'results'/f'{name}-0.json').exists() and (out/'.run').exists()): time.sleep(.01)
        p.send_signal(sig)
        said = p.communicate(timeout=300)[1]
        return p.returncode, said
    finally: p.kill()

def stamps(out): return {p.name: p.stat().st_mtime_ns for p in (out/'results').glob('*.json') if p.name != 'reals-0.json'}

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "An ablation that was killed in its second row, interrupted in its third, and finished."
    out = tmp_path_factory.mktemp('ablate')/'out'
    code, _ = stop_after(out, 'poc', signal.SIGKILL)
    assert code == -signal.SIGKILL and set(stamps(out)) == {'poc-0.json'}
    first = stamps(out)
    code, said = stop_after(out, 'heads', signal.SIGINT)
    assert code == 130 and 'the same command goes on' in said.splitlines()[-1] and 'Traceback' not in said
    second = stamps(out)
    assert set(second) == {'poc-0.json', 'heads-0.json'} and first.items() <= second.items()
    run = run_cli(['histogan.ablate', *QUICK, '--out', out])
    assert run.rc == 0, run.err
    assert second.items() <= stamps(out).items() and '2 of 3 runs are there' in run.out
    return out, run

def test_what_was_stopped_is_gone_on_with_and_leaves_everything(whole):
    out, run = whole
    assert {p.name for p in out.iterdir()} == {'.lock', 'ablation.csv', 'ablation.png', 'ablation_grids.jpg', 'cache', 'grids', 'results'}
    assert {p.name for p in (out/'grids').iterdir()} == {f'{r}-0.png' for r in ('reals', 'poc', 'heads', 'modern')}
    df = pd.read_csv(out/'ablation.csv')
    assert df.row.tolist() == ['reals', 'poc', 'heads', 'modern'] and df[['accuracy', 'worst', 'features', 'pixels', 'layout', 'fd']].notna().all(axis=None)
    assert all(line in run.out for line in ('done', 'ablation.csv')) and 'modern' in run.out.splitlines()[-2]

def test_a_stopped_ablation_has_the_figures_of_one_that_was_not(whole, tmp_path):
    out, _ = whole
    assert main([*QUICK[:2], 'heads', '--out', str(tmp_path/'o')]) == 0
    one, two = (json.loads((o/'results'/'heads-0.json').read_text()) for o in (out, tmp_path/'o'))
    assert one['quality'] == two['quality'] and one['settings'] == two['settings'] and one['changes'] == two['changes']
    assert set(one['changes']) == {'heads', 'd.pixel', 'loss.r1_gamma', 'loss.adv_weight'}

@pytest.mark.parametrize('options, words', [
    (['--rows', 'poc,modren'], "'modren' is unknown; did you mean 'modern'?"), (['--row', 'poc'], 'did you mean'),
    (['--size', '48'], 'power of two'), (['--steps', '0'], '--steps'), (['--seeds', 'three'], 'three'), (['--out', '/dev/null/x'], 'cannot be written')])
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, options, words):
    monkeypatch.chdir(tmp_path)
    assert main(options) == 2
    said = capsys.readouterr()
    assert said.err.startswith('error: ') and said.err.count('\n') == 1 and words in said.err and not said.out
    assert not any(tmp_path.iterdir())

def test_bad_input_from_the_command_line(tmp_path):
    run = run_cli(['histogan.ablate', '--rows', 'hinges'], cwd=tmp_path)
    assert (run.rc, run.out, run.err.count('\n')) == (2, '', 1) and "did you mean 'hinge'?" in run.err

@pytest.mark.parametrize('text, words', [('{', 'not a readable result'), ('[]', 'not a readable result'), ('{"settings": {"run.steps": 850}}', 'choose another --out')])
def test_results_of_something_else_are_refused_and_kept(tmp_path, capsys, text, words):
    path = tmp_path/'results'/'poc-0.json'
    path.parent.mkdir()
    path.write_text(text)
    assert main([*QUICK, '--out', str(tmp_path)]) == 2
    assert words in capsys.readouterr().err and path.read_text() == text

def test_results_under_old_names_still_count(whole, tmp_path, capsys):
    "A result as an earlier version wrote it: agreement for accuracy, gates for selection, and no fields that came later."
    out, _ = whole
    old = json.loads((out/'results'/'heads-0.json').read_text())
    old['agreement_G'] = old.pop('accuracy_G')
    q = old['quality']
    old['quality'] = {k.replace('accuracy', 'agreement'): v for k, v in q.items() if k != 'repeats'}
    name = lambda k: k.replace('selection.', 'gates.').replace('_accuracy', '_agreement')
    old['settings'] = {name(k): 'gates' if v == 'selection' else v for k, v in old['settings'].items() if k not in ('g.padding', 'selection.max_repeats')}
    path = tmp_path/'o'/'results'/'heads-0.json'
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(old))
    assert main([*QUICK[:2], 'heads', '--out', str(tmp_path/'o')]) == 0
    said = capsys.readouterr()
    assert '1 of 1 runs are there' in said.out and 'of an earlier version' in said.err
    df = read_table(tmp_path/'o'/'ablation.csv', ('accuracy', 'accuracy_G'))
    row = df[df.row == 'heads']
    assert abs(row.accuracy.item() - sum(q['accuracy']) / len(q['accuracy'])) < 1e-3 and row.accuracy_G.notna().all()
