"The report of a run, made by the command and opened in a browser."
import json, re, shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from chromium import complaints, seen_at
from conftest import run_cli
from histogan.downstream import main as downstream
from histogan.report import main
from histogan.train import main as train

TITLES = ['Configuration', 'Data', 'Training', 'Samples', 'Distribution', 'Copying check', 'Classifier', 'Environment and hashes']

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
    assert html.count('python -m histogan.eval') == 2 and 'python -m histogan.downstream' not in html
    assert not re.search(r'(?:src|href)="(?!data:)', html), 'the page fetches something'

def test_the_page_shows_what_the_files_hold(page):
    html, table = page.read_text(), pd.read_csv(page.parent/'metrics'/'downstream.csv')
    assert 'run.steps' not in html.partition('</table>')[0] and 'data.test_frac' in html.partition('</table>')[0]
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
    assert seen['pictures'] >= 14 and seen['broken'] == seen['mute'] == 0, seen
    assert seen['headings'][0] == 1 and all(b <= a + 1 for a, b in zip(seen['headings'], seen['headings'][1:])), seen
    if width == 400: assert seen['wide'] > 0, 'no table is wider than a phone: the test shows nothing'

def test_the_card_names_its_weights_and_what_was_not_measured(page):
    card = (page.parent/'MODEL_CARD.md').read_text()
    assert 'Trained on synthetic patches alone' in card and card.count('not measured') == 2
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
    row = {'class': 'all', 'std': None, 'n': 54, 'n_ref': 90, 'extractor': 'cnn', 'resize': '32 px', 'reference': 'test'}
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
