"Quality metrics and thresholds with real files, hostile pixels, hostile JSON, and other processes."
import hashlib, json, re, warnings
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from histogan.data import InputError, read_rgb, scan
from histogan.phantom import render
from histogan.quality import (LIMITS, METRICS, NCT_THRESHOLDS, QualityFilter, as_thresholds, batch_metrics, calibrate, load_thresholds, measure,
                              quality_metrics, quality_report, reason_table, save_thresholds)
from conftest import run_python

TUM = asdict(NCT_THRESHOLDS['TUM'])

def says(call):
    "The one line of an `InputError`."
    with pytest.raises(InputError) as e: call()
    line = str(e.value)
    assert line and '\n' not in line and len(line) < 500
    return line

@pytest.fixture(scope='module')
def table():
    "Metrics of 90 phantom patches of three classes."
    labels = np.repeat(['LYM', 'STR', 'TUM'], 30)
    return pd.DataFrame(batch_metrics(np.stack([render(c, k, 64) for k, c in enumerate(labels)]))._asdict()).assign(label=labels)

# ---- pixels

RNG = np.random.default_rng(0)
HOSTILE = {'white': np.full((40, 40, 3), 255), 'black': np.zeros((40, 40, 3)), 'one colour': np.full((64, 64, 3), [200, 80, 160]), 'smallest': np.full((16, 16, 3), 7),
           'thin': RNG.integers(0, 256, (16, 3000, 3)), 'odd sides': RNG.integers(0, 256, (17, 31, 3)), 'ramp': np.tile(np.arange(256)[:, None, None], (1, 64, 3))}

@pytest.mark.parametrize('name', HOSTILE)
def test_hostile_pixels_have_metrics_in_their_ranges(name):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        m = quality_metrics(HOSTILE[name].astype(np.uint8))
    assert all(type(v) is float for v in m)
    assert all(0 <= v <= 1 for v in (m.white_ratio, m.sat_ratio, m.tissue_frac)) and 0 <= m.entropy <= 8 and min(m.lap_var, m.tenengrad) >= 0
    assert np.isnan(m.block_dct) if name == 'black' else 0 <= m.block_dct <= 1 + 1e-6
    assert np.isfinite([v for k, v in m._asdict().items() if k != 'block_dct']).all()

@pytest.mark.parametrize('bad', [np.zeros((40, 40, 3)), np.zeros((40, 40, 3), np.uint16), np.zeros((40, 40, 3), bool), np.zeros((40, 40, 4), np.uint8), np.zeros((40, 40), np.uint8),
                                 np.zeros((1, 1, 3), np.uint8), np.zeros((15, 40, 3), np.uint8), np.zeros((0, 40, 3), np.uint8), None, 'patch.png'],
                         ids=lambda b: str(getattr(b, 'shape', b)) + str(getattr(b, 'dtype', '')))
def test_what_has_no_metrics_is_refused(bad):
    with pytest.raises((ValueError, InputError), match='uint8|too small'): quality_metrics(bad)

def test_the_division_into_batches_changes_nothing():
    x = np.stack([render(c, k, 48) for k, c in enumerate(('TUM', 'LYM', 'ADI', 'BACK', 'MUC', 'STR', 'DEB'))])
    whole = np.array(batch_metrics(x))
    for n in (1, 2, 3): assert np.array_equal(np.concatenate([np.array(batch_metrics(x[i:i + n])) for i in range(0, len(x), n)], 1), whole)
    assert np.array_equal(np.array(batch_metrics(x[::-1])), whole[:, ::-1]) and np.array(batch_metrics(x[:0])).shape == (8, 0)

MEASURE = '''
import hashlib, sys, numpy as np
from histogan.quality import batch_metrics
print(hashlib.sha256(np.array(batch_metrics(np.load(sys.argv[1]))).tobytes()).hexdigest())
'''

def test_the_same_digits_in_a_fresh_process(tmp_path):
    x = np.stack([render('TUM', k, 64) for k in range(4)])
    np.save(tmp_path/'x.npy', x)
    for env in (dict(OMP_NUM_THREADS='4', PYTHONHASHSEED='7'), dict(OPENBLAS_CORETYPE='Nehalem')):
        done = run_python(['-c', MEASURE, tmp_path/'x.npy'], env=env)
        assert done.out.split() == [hashlib.sha256(np.array(batch_metrics(x)).tobytes()).hexdigest()], done.err

# ---- files

def test_files_of_every_format_are_measured_and_a_bad_one_is_named(tmp_path):
    img = Image.fromarray(render('TUM', 1, 64))
    for name in ('a.png', 'b.tif', 'c.bmp'): img.save(tmp_path/name)
    img.save(tmp_path/'d.webp', lossless=True)
    df = pd.DataFrame(dict(path=[str(p) for p in sorted(tmp_path.iterdir())]))
    found = measure(df)
    assert len(found) == 4 and (found[list(METRICS)].nunique() == 1).all()
    for name, content in {'small.png': None, 'text.png': b'hello', 'empty.tif': b''}.items():
        path = tmp_path/name
        if content is None: img.resize((8, 8)).save(path)
        else: path.write_bytes(content)
        assert name in says(lambda: measure(pd.DataFrame(dict(path=[str(path)]))))

# ---- thresholds in JSON

def text(**changes): return json.dumps({'TUM': {k: v for k, v in (TUM | changes).items() if v != 'gone'}})

BROKEN = {
    'unknown key': (text(min_laplacian=1), 'unknown key min_laplacian'), 'another spelling': (text(jpeg_blockiness_max=.04, max_jpeg_blockiness='gone'), "did you mean 'max_jpeg_blockiness'?"),
    'missing key': (text(min_entropy='gone'), 'min_entropy is missing'), 'missing class': (json.dumps({'TUMOR': TUM}), 'class TUM is missing'),
    'text for a number': (text(min_entropy='6.7'), 'min_entropy must be a number'), 'true for a number': (text(min_entropy=True), 'min_entropy must be a number'),
    'a list for a number': (text(min_entropy=[6]), 'min_entropy must be a number'), 'a share of 78': (text(min_tissue_frac=78), 'min_tissue_frac must be finite and in [0, 1]'),
    'negative': (text(min_lap_var=-1), 'min_lap_var'), 'NaN': (text(min_entropy=float('nan')), 'NaN is no number'), 'infinite': (text().replace('332.22', '1e999'), 'finite'),
    'a huge integer': (text().replace('332.22', '1' + 400 * '0'), 'finite'), 'an impossible integer': (text().replace('332.22', 5000 * '1'), 'no JSON'),
    'unknown rule': (text(rule='allways'), "'allways'"), 'no rule': (text(rule=None), 'rule must be one of'), 'a class that is a list': ('{"TUM": []}', 'wants an object'),
    'twice': ('{"TUM": {"min_entropy": 1, "min_entropy": 2}}', 'min_entropy appears twice'), 'a class twice': (text()[:-1] + ', ' + text()[1:], 'TUM appears twice'),
    'a list': ('[]', 'one entry per class'), 'nothing': ('{}', 'one entry per class'), 'null': ('null', 'one entry per class'), 'empty': ('', 'no JSON'), 'half': (text()[:40], 'no JSON'),
    'nested': (100_000*'[', 'no JSON'), 'a line break': (json.dumps({'TUM': TUM | {'a\nb': 1}}), "unknown key 'a\\nb'"), 'a long key': (json.dumps({'TUM': TUM | {3000*'a': 1}}), 'unknown key'),
    'UTF-16': (text().encode('utf-16'), 'no JSON'), 'bytes': (bytes(range(256)), 'no JSON')}

@pytest.mark.parametrize('name', BROKEN)
def test_broken_thresholds_are_refused_by_file_and_key(name, tmp_path):
    content, expected = BROKEN[name]
    path = tmp_path/'thresholds.json'
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = says(lambda: load_thresholds(path, ['TUM']))
    assert line.startswith(str(path)) and expected in line

def test_files_that_are_not_there_or_cannot_be_written(tmp_path):
    assert 'cannot be read' in says(lambda: load_thresholds(tmp_path/'none.json')) and 'cannot be read' in says(lambda: load_thresholds(tmp_path))
    assert 'could not be written' in says(lambda: save_thresholds(tmp_path/'no'/'folder.json', NCT_THRESHOLDS))
    (tmp_path/'taken').mkdir()
    assert 'could not be written' in says(lambda: save_thresholds(tmp_path/'taken', NCT_THRESHOLDS))
    (tmp_path/'file').write_text('')
    assert 'could not be written' in says(lambda: save_thresholds(tmp_path/'file'/'x.json', NCT_THRESHOLDS))
    assert sorted(p.name for p in tmp_path.iterdir()) == ['file', 'taken'], 'a part of a file was left behind'

def test_the_recipe_is_the_recipe(shared):
    recipe = shared/'spec'/'recipe.md'
    if not recipe.is_file(): pytest.skip('no recipe beside the project')
    rows = re.findall(r'^\| ([A-Z]{3,4}) \| ((?:[\d.]+ \| ){6}[\d.]+) \|$', recipe.read_text(encoding='utf-8'), re.M)
    order = ('min_lap_var', 'min_entropy', 'max_white_ratio', 'max_sat_ratio', 'min_tenengrad', 'max_jpeg_blockiness', 'min_tissue_frac')
    assert {c: dict(zip(order, map(float, row.split(' | ')))) for c, row in rows} == {c: {k: getattr(t, k) for k in LIMITS} for c, t in NCT_THRESHOLDS.items()}
    assert len(rows) == 9 and {c: t.rule for c, t in NCT_THRESHOLDS.items() if t.rule != 'limits'} == {'ADI': 'finite', 'BACK': 'always'}

# ---- filter and calibration

def test_calibrated_thresholds_survive_a_file_and_cost_what_they_say(table, tmp_path):
    for quantile in (0, .05, .2):
        found = calibrate(table, quantile=quantile)
        again = load_thresholds(save_thresholds(tmp_path/'own.json', found), sorted(set(table.label)))
        assert again == found
        verdict = QualityFilter(again).check(table)
        assert (verdict.failed.groupby(table.label.to_numpy()).mean() <= quantile).all().all()
        assert verdict.kept.all() == (quantile == 0)
        assert (verdict.kept == (verdict.reasons == '')).all()

def test_background_always_and_fat_unless_not_finite(table):
    awful = table.iloc[[0, 0, 0]].assign(lap_var=0., entropy=0., white_ratio=1., sat_ratio=1., tenengrad=0., tissue_frac=0.)
    for label, nan_is_kept in (('BACK', True), ('ADI', False)):
        rows = awful.assign(label=label, block_dct=[.9, .9, np.nan])
        assert QualityFilter(NCT_THRESHOLDS).check(rows).kept.tolist() == [True, True, nan_is_kept]

def test_no_class_is_emptied(table):
    harsh = {c: asdict(t) | dict(min_entropy=8.) for c, t in calibrate(table, quantile=0).items()}
    line = says(lambda: QualityFilter(harsh, where='own.json').check(table))
    assert line.startswith('own.json: class LYM would lose all its 30 patches, 30 of them to entropy')
    assert 'class TUM is missing' in says(lambda: QualityFilter({c: t for c, t in calibrate(table).items() if c != 'TUM'}).check(table))
    assert 'unknown key' in says(lambda: as_thresholds({'TUM': TUM | {'max_dust': 1}}))

def test_the_report_shows_rejected_beside_accepted(table):
    seen = []
    def read(row): seen.append(row); return np.full((16, 16, 3), 90, np.uint8)
    quality = QualityFilter(calibrate(table))
    verdict = quality.check(table)
    report = quality_report(table, quality, read=read, per_class=3)
    assert report.total.kept == verdict.kept.sum() and report.total.patches == len(table)
    assert list(report.table.index) == sorted(set(table.label))
    for c in set(table.label):
        shown = [r for r in seen if table.label[r] == c]
        assert sum(verdict.kept[r] for r in shown) == 3 and 0 < sum(not verdict.kept[r] for r in shown) <= 3
    titles = [ax.get_title() for ax in report.shares.axes]
    assert titles[:7] == list(LIMITS)
    for ax, key in zip(report.shares.axes, LIMITS):
        assert sorted(line.get_xdata()[0] for line in ax.lines if line.get_marker() == 'o') == sorted(getattr(t, key) for t in quality.thresholds.values())

@pytest.mark.parametrize('names', [('all', 'hem', 'total'), ('0', '1', '001'), ('_a', '$b$', 'c{}')])
def test_no_class_name_is_taken(names, table):
    own = table.assign(label=table.label.map(dict(zip(('LYM', 'STR', 'TUM'), names))))
    report = quality_report(own, QualityFilter(calibrate(own)), read=lambda row: np.full((16, 16, 3), 90, np.uint8))
    assert report.table.patches.to_dict() == dict.fromkeys(names, 30) and report.total.patches == 90
    assert report.table.kept.sum() == report.total.kept
    report.shares.canvas.draw(); report.pictures.canvas.draw()  # no name is a formula or hidden
    assert len(report.shares.axes[-1].get_legend().get_texts()) == 3

# ---- the real sample

def test_real_background_is_dark_and_fat_is_not_one_thing(shared):
    df = pd.concat([scan(shared/'data'/'nct-sample'/root) for root in ('NCT-CRC-HE-100K', 'CRC-VAL-HE-7K')], ignore_index=True)
    nct = measure(df)
    assert len(nct) == 108 and np.isfinite(nct[list(METRICS)]).all().all()
    back, fat = (nct[nct.label == c] for c in ('BACK', 'ADI'))
    assert (back.white_ratio < .01).all() and (back.tissue_frac == 1).all() and fat.white_ratio.min() < .01 and fat.white_ratio.max() > .7
    counts = reason_table(QualityFilter(NCT_THRESHOLDS).check(nct), nct.label)
    assert counts.kept['BACK'] == 12 and counts.kept['ADI'] == 12 and counts.kept.min() > 0
    strict = {c: asdict(NCT_THRESHOLDS[c]) | dict(rule='limits') for c in ('BACK', 'ADI')}
    assert not QualityFilter(strict).check(nct[nct.label.isin(strict)]).kept.all(), 'the rules of BACK and ADI would make no difference'

def test_a_real_file_is_measured_as_its_pixels_are(shared):
    path = sorted((shared/'data'/'nct-sample'/'CRC-VAL-HE-7K'/'TUM').iterdir())[0]
    row = measure(pd.DataFrame(dict(path=[str(path)]))).iloc[0]
    assert tuple(row[list(METRICS)]) == tuple(quality_metrics(read_rgb(path)))
