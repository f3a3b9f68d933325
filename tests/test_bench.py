"What the programs that measure a run count as its own: rows of its training split, and nothing of other patients."
import json

import numpy as np
import pandas as pd

import bench_accuracy
from conftest import run_python

def test_reals_of_a_run_are_its_training_rows_alone(tmp_path, monkeypatch):
    "Its manifest also lists val and test patches, which come from other patients."
    (tmp_path/'run'/'artifacts').mkdir(parents=True)
    rows = [(f'{i}.png', 'ab'[i % 2], ('train', 'val', 'test')[i % 3]) for i in range(36)]
    for path in (tmp_path/'run'/'artifacts'/'manifest.csv', tmp_path/'other.csv'): pd.DataFrame(rows, columns=['path', 'label', 'split']).to_csv(path, index=False)
    asked, kept = [], {}
    monkeypatch.setattr(bench_accuracy, 'load_manifest', lambda path, *a: pd.read_csv(path))
    monkeypatch.setattr(bench_accuracy, 'pixels', lambda df, size: (asked.append(set(df.split)), (np.zeros((len(df), size, size, 3), np.uint8), np.arange(len(df)) % 2))[1])
    monkeypatch.setattr(bench_accuracy, 'fit_held_out', lambda x, y, n, cfg, reals: kept.update(learned=len(x), reals=[len(r) for r, _ in reals]))
    bench_accuracy.of_manifest(32, tmp_path/'run'/'artifacts'/'manifest.csv', tmp_path/'other.csv')
    assert asked == [{'train', 'val'}, {'train'}] and kept == dict(learned=24, reals=[6, 6])

def test_what_grows_with_the_data_set_is_a_row(tmp_path):
    "At its smallest size, through the program; the memory of a start is a process of its own."
    done = run_python(['-m', 'histogan.bench', '--rows', 'growth', '--tiny', '--json', tmp_path/'b.json'], env={'TMPDIR': str(tmp_path)})
    rows = json.loads((tmp_path/'b.json').read_text())['rows']
    assert done.rc == 0 and len(rows) == 3 and all(r['ours'] > 0 and r['ratio'] == r['low'] for r in rows), done.err
    assert '360 beside 180 random patches of 16 px' in done.out and 'memory of a start' in rows[2]['name']
