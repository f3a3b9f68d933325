"The report of a run, made by the command and opened in a browser."
import json, re, shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from chromium import complaints, seen_at
from conftest import run_cli
from histogan.core import read_table
from histogan.checkpoint import load_checkpoint, save_checkpoint
from histogan.downstream import main as downstream
from histogan.report import main
from histogan.train import main as train

TITLES = ['Samples beside reals', 'Verdict', 'One latent over the run', 'Training', 'Distribution', 'Copying check',
          'Classifier', 'Data', 'Configuration', 'Environment and hashes']

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A finished smoke run with a table of the classifier."
    folder = tmp_path_factory.mktemp('runs')/'run'
    assert train(['--preset', 'smoke', '--data.test-frac', '0.2', '--out', str(folder)]) == 0
    assert downstream([str(folder), '--steps', '2', '--seeds', '2', '--per-class', '6', '--few', '3']) == 0
    return folder

@pytest.fixture(scope='module')
def page(run):
    done = run_cli(['histogan.report', run])
    assert done.rc == 0 and 'report.html' in done.out, done.err
    return run/'report.html'

def test_every_section_is_there_and_says_what_it_lacks(page):
    html = page.read_text()
    assert re.findall('<h2>(.*?)</h2>', html) == TITLES
    assert html.count('python -m histogan.eval') == 3 and 'python -m histogan.downstream' not in html
    assert not re.search(r'(?:src|href)="(?!data:)', html), 'the page fetches something'

def test_the_page_shows_what_the_files_hold(page):
    html, table = page.read_text(), read_table(page.parent/'metrics'/'downstream.csv', ('value', 'seed'))
    asked = html.partition('<h2>Configuration</h2>')[2].partition('</table>')[0]
    assert 'run.steps' not in asked and 'data.test_frac' in asked
    first = html.partition('<h2>Verdict</h2>')[0]  # nine classes, reals and samples of each
    assert first.count('<img') == 18 and len(re.findall(r'alt="\d real patches of', first)) == first.count('8 synthetic patches') == 9
    assert 'of a generator that was trained on all' in html
    real = table[(table.model == 'small') & (table.regime == 'real') & (table.reals == 'all') & (table.tested_on == 'real') & (table.metric == 'accuracy')].value
    assert f'{real.mean():.3f}\u00a0±\u00a0{real.std():.3f}' in html
    assert f"{100 * real.mean():.1f} %" in html

def test_no_complaint_on_the_console(page, tmp_path):
    assert complaints(page) == []
    (tmp_path/'bad.html').write_text(page.read_text().replace('</body>', '<img src="https://127.0.0.1:9/x.png" alt="x"></body>'))
    assert complaints(tmp_path/'bad.html'), 'a picture from elsewhere goes unnoticed'

@pytest.mark.parametrize('width', [1280, 400])
def test_it_fits_its_window(width, page, tmp_path):
    seen = seen_at(page, width, tmp_path)
    assert seen['width'] == width and seen['needed'] <= width, seen
    assert seen['pictures'] >= 30 and seen['broken'] == seen['mute'] == 0, seen
    assert seen['headings'][0] == 1 and all(b <= a + 1 for a, b in zip(seen['headings'], seen['headings'][1:])), seen
    if width == 400: assert seen['wide'] > 0, 'no table is wider than a phone: the test shows nothing'

def test_the_card_names_its_weights_and_what_was_not_measured(page):
    card = (page.parent/'MODEL_CARD.md').read_text()
    assert 'Trained on synthetic patches alone' in card and card.count('not measured') == 2
    exported = (page.parent/'artifacts'/'generator'/'README.md').read_text()
    assert exported.startswith('---\nlibrary_name: histogan') and exported.endswith(card)
    assert re.search(r'sha256 `[0-9a-f]{64}`', card) and 'Diagnosis' in card

@pytest.mark.parametrize('gone', ['metrics', 'samples', 'artifacts', 'checkpoints', 'metrics_gan.csv', 'events.jsonl'])
def test_a_run_that_lacks_something_still_has_a_page(gone, page, tmp_path, capsys):
    part = tmp_path/'part'
    shutil.copytree(page.parent, part)
    shutil.rmtree(part/gone) if (part/gone).is_dir() else (part/gone).unlink()
    assert main([str(part)]) == 0
    assert re.findall('<h2>(.*?)</h2>', (part/'report.html').read_text()) == TITLES

def test_evaluation_and_copying_are_shown(page, tmp_path, capsys):
    part = tmp_path/'part'
    shutil.copytree(page.parent, part)
    row = {'scope': 'all classes', 'class': '', 'std': None, 'n': 54, 'n_ref': 90, 'extractor': 'cnn', 'resize': '32 px', 'reference': 'test'}
    pd.DataFrame([row | {'set': s, 'metric': 'FD-cnn', 'value': v, 'note': n} for s, v, n in (('synthetic', 2.25, 'n is too small <for> a Fréchet distance'), ('real half', .125, ''))]).to_csv(part/'metrics'/'distribution.csv', index=False)
    (part/'metrics'/'copying.json').write_text(json.dumps(dict(verdict='no', sentence='closer to training patches than held-out reals are: no', spaces=dict(pixels=dict(median_distance=12.5, median_distance_held=12.25)))))
    Image.fromarray(np.zeros((40, 200, 3), np.uint8)).save(part/'metrics'/'copying_pairs.png')
    assert main([str(part)]) == 0
    html, card = (part/'report.html').read_text(), (part/'MODEL_CARD.md').read_text()
    for wanted in ('>2.25<', '>0.125<', '&lt;for&gt;', '12.500', 'held-out reals are: no', 'closest pairs'): assert wanted in html, wanted
    assert 'python -m histogan.eval' not in html and 'FD-cnn (cnn, 54 against 90 of test): 2.25' in card and 'not measured' not in card

def test_bad_folders_are_one_line(tmp_path, capsys):
    assert main([str(tmp_path/'nowhere')]) == 2 and main([str(tmp_path)]) == 2
    assert [line.split(':')[0] for line in capsys.readouterr().err.splitlines()] == ['error', 'error']

@pytest.fixture(scope='module')
def odd(tmp_path_factory):
    "A run on a manifest whose classes are called all, hem, 001, NA and None."
    root, rng, rows = tmp_path_factory.mktemp('odd'), np.random.default_rng(0), []
    for k, name in enumerate(('all', 'hem', '001', 'NA', 'None')):
        for i in range(12):
            x = rng.integers(0, 120, (16, 16, 3), np.uint8) + 25 * k
            Image.fromarray(x.astype(np.uint8)).save(root/f's{i % 3}-{k}-{i}.png')
            rows.append(f"s{i % 3}-{k}-{i}.png,{name},{'test' if i % 4 == 0 else 'val' if i % 4 == 1 else 'train'},p{i // 2}")
    (root/'m.csv').write_text('path,label,split,group\n' + '\n'.join(rows) + '\n')
    small = ['--data.image-size', '16', '--data.batch-size', '4', '--run.n-eval', '20', '--run.steps', '3', '--run.best-metric', 'none']
    assert train(['--preset', 'smoke', *small, '--data.manifest', str(root/'m.csv'), '--out', str(root/'runs'/'run')]) == 0
    return root/'runs'/'run'

def test_labels_are_text_and_all_of_them_are_counted(odd, capsys):
    assert main([str(odd)]) == 0
    html, card = (odd/'report.html').read_text(), (odd/'MODEL_CARD.md').read_text()
    assert '30 training patches of 5 classes (001, NA, None, all, hem)' in card
    counts = html.partition('<h2>Data</h2>')[2].partition('</table>')[0]
    assert [f'<td>{n}</td>' in counts for n in ('001', 'NA', 'None', 'all', 'hem')] == [True] * 5

def test_a_manifest_is_not_the_phantom(odd, capsys):
    assert main([str(odd)]) == 0
    for text in ((odd/'report.html').read_text(), (odd/'MODEL_CARD.md').read_text()):
        assert 'procedural' not in text and 'the manifest m.csv' in text

def test_a_class_called_all_is_not_all_classes(odd, tmp_path, capsys):
    part = tmp_path/'run'
    shutil.copytree(odd, part)
    base = {'set': 'synthetic', 'metric': 'FD-cnn', 'std': None, 'n': 54, 'n_ref': 90, 'extractor': 'cnn', 'resize': '', 'reference': 'test', 'note': ''}
    rows = [base | {'scope': 'all classes', 'class': '', 'value': 1.25}, base | {'scope': 'class', 'class': 'all', 'value': 7.75}]
    pd.DataFrame(rows).to_csv(part/'metrics'/'distribution.csv', index=False) if (part/'metrics').exists() else ((part/'metrics').mkdir(), pd.DataFrame(rows).to_csv(part/'metrics'/'distribution.csv', index=False))
    assert main([str(part)]) == 0
    card = (part/'MODEL_CARD.md').read_text()
    assert ': 1.25.' in card and '7.75' not in card

def test_every_threshold_has_a_line(odd, tmp_path, capsys):
    part = tmp_path/'run'
    shutil.copytree(odd, part)
    best = part/'checkpoints'/'cgan_best_model.pt'
    state = load_checkpoint(best)
    q = dict(accuracy=[.9, .5, .9, .9, .9], accuracy_real=.95, features=[1.] * 5, pixels=[.5] * 5, layout=[.1, .1, .6, .1, .1], fd=4., fd_real=2.)
    state['card'] |= dict(metric='selection', value=2.5, quality=q)
    save_checkpoint(best, state)
    assert main([str(part)]) == 0
    lines = re.findall(r'<li class=(ok|miss)>(.*?)</li>', (part/'report.html').read_text())
    said = {words.split('</b> ')[1].split(':')[0]: kind for kind, words in lines}
    assert said['Worst class'] == said['Diversity in pixels'] == said['Repeated layout'] == 'miss'
    assert said['Diversity in features'] == said['Fréchet distance to reals'] == 'ok'
    assert 'Repeated layout: None: 0.60' in (part/'MODEL_CARD.md').read_text()  # the third class by name
