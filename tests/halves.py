"""Two halves of a set of real patches, for a training and for its held-out classifier: `python tests/halves.py MANIFEST.csv --out FOLDER`.

Reads a manifest with path, label, split, group and source_path (as that of `histo5_128`) and splits its training rows into two
halves that share no group. A class that has only one group is split by source image instead, and said so; so are all classes
with --by source. Writes `train.csv` (one half as train and val, and the manifest's own test rows; for `histogan.train
--data.manifest`) and `judge.csv` (the other half; for `bench_accuracy.py --classifier`). Paths that do not exist as they are written
are looked for beside the manifest and one folder above it.
"""
import argparse
from pathlib import Path

import numpy as np
import pandas as pd

def located(path, manifest):
    "The first place where a file of the manifest is."
    places = [Path(path), manifest.parent/path, manifest.parent.parent/path]
    return str(next((p.resolve() for p in places if p.is_file()), path))

def halved(groups):
    "Bool per patch: every group goes whole to the half that is behind; largest first."
    first, count = set(), [0, 0]
    for group, n in groups.value_counts(sort=True).sort_index().sort_values(ascending=False, kind='stable').items():
        side = int(count[0] > count[1])
        count[side] += n
        if side == 0: first.add(group)
    return groups.isin(first)

def held_back(images, share, seed=0):
    "Bool per patch: about a share of them, by whole source images."
    order = pd.Series(sorted(images.unique())).sample(frac=1, random_state=seed)
    n = images.value_counts().reindex(order)
    return images.isin(order[np.r_[0, n.cumsum()[:-1]] < share*len(images)])

def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('manifest', type=Path)
    ap.add_argument('--out', type=Path, default=Path('.'))
    ap.add_argument('--by', choices=('group', 'source'), default='group', help='what no half shares: groups, or source images alone')
    a = ap.parse_args()
    df = pd.read_csv(a.manifest, dtype=str).assign(path=lambda d: [located(p, a.manifest) for p in d.path])
    test, df = df[df.split == 'test'], df[df.split == 'train'].copy()
    for label, rows in df.groupby('label'):
        by = 'group' if a.by == 'group' and rows.group.nunique() > 1 else 'source_path'
        first = halved(rows[by])
        df.loc[rows.index, 'first'] = first
        val = held_back(rows.source_path[first], .15)
        df.loc[val.index[val], 'split'] = 'val'
        print(f'{label}: by {by}, {first.sum()} of {len(rows)} to train.csv, {val.sum()} of them val')
    a.out.mkdir(parents=True, exist_ok=True)
    first = df['first'].astype(bool)
    for name, rows in (('train', pd.concat([df[first], test])), ('judge', df[~first])):
        rows[['path', 'label', 'split', 'group']].to_csv(a.out/f'{name}.csv', index=False)

if __name__ == '__main__': main()
