"Reading, splitting and handing out patches: what notebook 00 promises, with real files."
import io, os, random, struct, sys, time, zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch.utils.data import DataLoader

from histogan.data import (HASH_BITS, SPLITS, BalancedSampler, DataConfig, HistoDataset, Inspected, InputError, inspect,
                           linked_groups, load_manifest, near_duplicates, open_data, orient, read_rgb, resize, save_manifest, scan, split)
from histogan.core import read_json
from histogan.images import _candidates
from histogan.prepare import PrepareConfig, QualityOptions, StainOptions, prepare
from histogan.splits import _place_groups
from conftest import run_python

def tissue(seed, px=32):
    rng = np.random.default_rng(seed)
    a = gaussian_filter(rng.normal(size=(px, px, 3)), (px / 24, px / 24, 0), mode='wrap')
    return (150 + 45 * a / a.std()).clip(0, 255).astype(np.uint8)

def fill(root, seed=0, **counts):
    for c, (label, n) in enumerate(counts.items()):
        (root / label).mkdir(parents=True)
        for i in range(n): Image.fromarray(tissue(1000 * seed + 100_000 * c + i)).save(root / label / f'{label}-s{i // 4}-{i:04}.png')
    return root

def quiet(df, *args, **kw): return inspect(df, *args, progress=False, **kw)

def says(call):
    "The one line of an `InputError`."
    with pytest.raises(InputError) as e: call()
    line = str(e.value)
    assert line and '\n' not in line
    return line

@pytest.fixture
def toy(tmp_path): return fill(tmp_path / 'toy', A=20, B=12, C=9)

# ---- reading one file

RGB = Image.fromarray(tissue(7, 48))

def chunk(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

def png(w, h, bits, colour, rows=b'', extra=b''):
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, bits, colour, 0, 0, 0)) + extra + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')

def encoded(im, fmt, **kw):
    out = io.BytesIO(); im.save(out, fmt, **kw); return out.getvalue()

def see_through(im):
    im = im.convert('RGBA'); im.putpixel((3, 3), (0, 0, 0, 254)); return im

GIF_LIKE = RGB.quantize(8)
REFUSED = {
    'empty.png': (b'', '0 bytes'), 'text.png': (b'hello, I am text', 'no readable'), 'text.tif': (b'II*\0', None), 'zeros.jpg': (bytes(1000), 'no readable'),
    'half.png': (encoded(RGB, 'PNG')[:1500], 'cut off'), 'half.jpg': (encoded(RGB, 'JPEG')[:700], 'cut off'), 'half.bmp': (encoded(RGB, 'BMP')[:2000], 'cut off'),
    'half.tif': (encoded(RGB, 'TIFF')[:2000], None), 'half-lzw.tif': (encoded(RGB, 'TIFF', compression='tiff_lzw')[:2000], None),
    'half.webp': (encoded(RGB, 'WEBP', lossless=True)[:1500], None), 'header.png': (encoded(RGB, 'PNG')[:20], None),
    'grey.png': (encoded(RGB.convert('L'), 'PNG'), 'greyscale'), 'grey-alpha.png': (encoded(RGB.convert('LA'), 'PNG'), 'greyscale'), 'grey.jpg': (encoded(RGB.convert('L'), 'JPEG'), 'greyscale'),
    'onebit.png': (encoded(RGB.convert('1'), 'PNG'), '1 bit'), 'cmyk.jpg': (encoded(RGB.convert('CMYK'), 'JPEG'), 'CMYK'), 'cmyk.tif': (encoded(RGB.convert('CMYK'), 'TIFF'), 'CMYK'),
    'lab.tif': (encoded(RGB.convert('LAB'), 'TIFF'), 'LAB'), 'ycbcr.tif': (encoded(RGB.convert('YCbCr'), 'TIFF'), 'YCbCr'),
    'grey16.png': (encoded(Image.fromarray(np.zeros((9, 9), np.uint16)), 'PNG'), '16 bits'), 'grey16.tif': (encoded(Image.fromarray(np.zeros((9, 9), np.uint16)), 'TIFF'), '16 bits'),
    'rgb16.png': (png(4, 4, 16, 2, (b'\0' + bytes(24)) * 4), '16 bits'), 'rgba16.png': (png(4, 4, 16, 6, (b'\0' + bytes(32)) * 4), '16 bits'),
    'int.tif': (encoded(Image.fromarray(np.zeros((9, 9), np.int32)), 'TIFF'), '32-bit'), 'float.tif': (encoded(Image.fromarray(np.zeros((9, 9), np.float32)), 'TIFF'), 'floats'),
    'alpha.png': (encoded(see_through(RGB), 'PNG'), 'transparent'), 'alpha.webp': (encoded(see_through(RGB), 'WEBP', lossless=True), 'transparent'),
    'keyed.png': (png(16, 16, 8, 2, (b'\0' + bytes([9, 9, 9]) * 16) * 16, chunk(b'tRNS', struct.pack('>HHH', 9, 9, 9))), 'transparent'),
    'palette-alpha.png': (encoded(GIF_LIKE, 'PNG', transparency=bytes([0] + [255] * 7)), 'transparent'),
    'animated.webp': (encoded(RGB, 'WEBP', save_all=True, append_images=[Image.fromarray(tissue(8, 48))]), '2 frames'),
    'animated.png': (encoded(RGB, 'PNG', save_all=True, append_images=[Image.fromarray(tissue(8, 48))]), '2 frames'),
    'pages.tif': (encoded(RGB, 'TIFF', save_all=True, append_images=[RGB, RGB]), '3 frames'), 'gif.png': (encoded(GIF_LIKE, 'GIF'), 'no readable'),
    'bomb.png': (png(60_000, 60_000, 8, 2), 'cut it into patches'), 'large.png': (png(4097, 4096, 8, 2), '4,097 x 4,096'),
    'bomb.bmp': (encoded(RGB, 'BMP')[:18] + struct.pack('<ii', 60_000, 60_000) + encoded(RGB, 'BMP')[26:], 'cut it into patches'),
}

@pytest.mark.parametrize('name', REFUSED)
def test_refused(name, tmp_path, capfd, recwarn):
    data, word = REFUSED[name]; path = tmp_path / name
    path.write_bytes(data)
    line = says(lambda: read_rgb(path))
    assert line.startswith(f'{path}: ') and ';' in line
    assert word is None or word in line
    out, err = capfd.readouterr()
    assert (out, err) == ('', '') and not len(recwarn)

def test_not_a_file(tmp_path):
    assert 'regular file' in says(lambda: read_rgb(tmp_path))
    assert 'does not exist' in says(lambda: read_rgb(tmp_path / 'nothing.png'))
    os.mkfifo(tmp_path / 'pipe.png')
    assert 'regular file' in says(lambda: read_rgb(tmp_path / 'pipe.png'))
    (tmp_path / 'dangling.png').symlink_to(tmp_path / 'gone')
    assert 'does not exist' in says(lambda: read_rgb(tmp_path / 'dangling.png'))

ACCEPTED = {'a.png': (RGB, 'PNG', {}), 'a.TIFF': (RGB, 'TIFF', {}), 'a.tif': (RGB, 'TIFF', dict(compression='tiff_lzw')), 'a.BMP': (RGB, 'BMP', {}), 'a.webp': (RGB, 'WEBP', dict(lossless=True)),
            'opaque.png': (RGB.convert('RGBA'), 'PNG', {}), 'opaque.tif': (RGB.convert('RGBA'), 'TIFF', {}), 'wrong-name.jpg': (RGB, 'PNG', {})}

@pytest.mark.parametrize('name', ACCEPTED)
def test_accepted_to_the_bit(name, tmp_path):
    im, fmt, kw = ACCEPTED[name]; im.save(tmp_path / name, fmt, **kw)
    a = read_rgb(tmp_path / name)
    assert a.dtype == np.uint8 and a.flags.c_contiguous and (a == np.array(RGB)).all()

def test_palettes_are_converted(tmp_path):
    GIF_LIKE.save(tmp_path / 'p.png'); GIF_LIKE.save(tmp_path / 'q.png', transparency=bytes([255] * 8))
    for name in 'pq': assert (read_rgb(tmp_path / f'{name}.png') == np.array(GIF_LIKE.convert('RGB'))).all()

@pytest.mark.parametrize('fmt,kw', [('PNG', {}), ('JPEG', {}), ('TIFF', {}), ('TIFF', dict(compression='tiff_lzw')), ('WEBP', dict(lossless=True)), ('BMP', {})])
def test_damage_is_never_a_traceback(fmt, kw, tmp_path, capfd):
    "Cut anywhere, or with bytes changed: an array or an InputError, and nothing on stderr (but libtiff's own remarks, printed in C)."
    whole, rng = encoded(RGB, fmt, **kw), random.Random(0); path = tmp_path / 'x.png'
    for k in range(80):
        data = bytearray(whole[:rng.randrange(len(whole))] if k % 2 else whole)
        for _ in range(0 if k % 2 else 4): data[rng.randrange(min(len(data), 400))] = rng.randrange(256)
        path.write_bytes(data)
        try: a = read_rgb(path); assert a.ndim == 3 and a.shape[2] == 3 and a.dtype == np.uint8
        except InputError as e: assert '\n' not in str(e) and str(path) in str(e)
    assert [line for line in capfd.readouterr().err.splitlines() if not line.startswith('tempfile.tif: ')] == []

def test_bomb_allocates_nothing(tmp_path):
    for name in ('bomb.png', 'bomb.bmp', 'large.png'): (tmp_path / name).write_bytes(REFUSED[name][0])
    done = run_python(['-c', f'''
import resource
from histogan.data import read_rgb, InputError
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try: read_rgb({str(tmp_path / "absent.png")!r})
except InputError: pass
before = peak()
for name in ("bomb.png", "bomb.bmp", "large.png"):
    try: read_rgb({str(tmp_path)!r} + "/" + name); print("read!")
    except InputError: pass
print((peak() - before) // 1024)'''])
    assert done.rc == 0 and int(done.out) < 20 and done.err == '', done

def test_imports_without_torch():
    done = run_python(['-c', 'import sys, histogan.data; print("torch" in sys.modules)'])
    assert done.out.strip() == 'False', done

# ---- folders and manifests

def test_scan(toy, tmp_path):
    df = scan(toy)
    assert list(df.columns) == ['path', 'label'] and df.label.value_counts().to_dict() == dict(A=20, B=12, C=9)
    assert df.label.is_monotonic_increasing and all(g.path.is_monotonic_increasing for _, g in df.groupby('label'))
    (toy / 'A/.hidden.png').write_bytes(b''); (toy / 'A/readme.md').write_text('x'); (toy / '.cache').mkdir(); (toy / 'notes.csv').write_text('x')
    (toy / 'A/.thumbs').mkdir(); (toy / 'A/.thumbs/x.png').write_bytes(b'')
    assert scan(toy).equals(df)
    (toy / 'B/deep/er').mkdir(parents=True); RGB.save(toy / 'B/deep/er/x.JPG')
    assert len(scan(toy)) == len(df) + 1

def test_scan_follows_links_once(toy, tmp_path):
    (toy / 'A/loop').symlink_to(toy / 'A'); (toy / 'D').symlink_to(fill(tmp_path / 'far', X=3) / 'X')
    df = scan(toy)
    assert df.label.value_counts().to_dict() == dict(A=20, B=12, C=9, D=3) and df.path.is_unique

def test_scan_refuses(toy, tmp_path):
    (tmp_path / 'void').mkdir(); (tmp_path / 'file').write_text('x')
    for root, word in ((tmp_path / 'nowhere', 'no such folder'), (tmp_path / 'file', 'is a file'), (tmp_path / 'void', 'no class folder')):
        line = says(lambda: scan(root)); assert word in line and str(root) in line
    (toy / 'EMPTY').mkdir(); (toy / 'EMPTY/readme.txt').write_text('x')
    assert f'{toy / "EMPTY"}: a class folder without images' in says(lambda: scan(toy))
    (toy / 'EMPTY/readme.txt').unlink(); (toy / 'EMPTY').rmdir(); RGB.save(toy / 'stray.png')
    assert 'stray.png' in says(lambda: scan(toy))

def test_odd_names_survive_a_manifest(tmp_path):
    root = fill(tmp_path / 'größe, "x"', NA=4, null=4)
    df = scan(root).assign(split='train'); save_manifest(df, tmp_path / 'm.csv')
    back = load_manifest(tmp_path / 'm.csv')
    assert back.label.tolist() == ['NA'] * 4 + ['null'] * 4 and back.path.tolist() == df.path.tolist()
    assert not list(tmp_path.glob('*.part'))

def test_names_that_are_not_utf8(toy):
    with open(os.fsencode(toy / 'A') + b'/\xff.png', 'wb') as f: f.write(b'x')
    assert 'not valid UTF-8' in says(lambda: scan(toy))

def test_relative_manifests(toy, tmp_path, monkeypatch):
    (toy / 'm.csv').write_text('path,label,split\nA/A-s0-0000.png,A,train\n')
    (tmp_path / 'n.csv').write_text('path,label,split\nA/A-s0-0000.png,A,val\n')
    assert os.path.samefile(load_manifest(toy / 'm.csv').path[0], toy / 'A/A-s0-0000.png')
    assert os.path.samefile(load_manifest(tmp_path / 'n.csv', toy).path[0], toy / 'A/A-s0-0000.png')
    monkeypatch.chdir(toy)
    assert os.path.samefile(load_manifest('../n.csv').path[0], toy / 'A/A-s0-0000.png')

@pytest.mark.parametrize('text,word', [
    ('path,label\nx,y\n', 'no column split'), ('label,split\nx,train\n', 'no column path'), ('', 'cannot be read'), ('path,label,split\n', 'no rows'),
    ('path,label,split\nx.png,A,dev\n', "line 2 has the split 'dev'"), ('path,label,split\nx.png,A,train\n', '1 of its 1 files are missing'),
    ('path,label,split\n"x', 'cannot be read')])
def test_bad_manifests(text, word, tmp_path):
    (tmp_path / 'm.csv').write_text(text)
    line = says(lambda: load_manifest(tmp_path / 'm.csv')); assert word in line and 'm.csv' in line

def test_missing_manifest(tmp_path):
    assert 'no such file' in says(lambda: load_manifest(tmp_path / 'none.csv'))
    (tmp_path / 'binary.csv').write_bytes(os.urandom(400))
    assert 'binary.csv' in says(lambda: load_manifest(tmp_path / 'binary.csv'))

# ---- one pass

def test_every_unreadable_file_is_named(toy):
    for k in range(14): (toy / f'A/A-s{k // 4}-{k:04}.png').write_bytes(b'' if k % 2 else b'text')
    line = says(lambda: quiet(scan(toy)))
    assert '14 of 41 files' in line and all(f'A-s{k // 4}-{k:04}.png' in line for k in range(10)) and 'and 4 more' in line
    assert 'A-s2-0010.png' not in line

def test_inspect_reads_once_and_the_same_in_any_number_of_threads(toy, monkeypatch):
    import histogan.images as data
    count, real = [], data._decode
    monkeypatch.setattr(data, '_decode', lambda path, check=True: count.append(path) or real(path, check))
    d = open_data(DataConfig(root=str(toy), image_size=16, batch_size=4, samples_per_class=8), progress=False)
    for _ in d.train: pass
    for _ in d.loader_real_eval: pass
    assert sorted(count) == sorted(d.manifest.path)
    a, b = quiet(scan(toy), 16, workers=1), quiet(scan(toy), 16, workers=7)
    assert a.df.equals(b.df) and (a.thumbs == b.thumbs).all() and (a.images == b.images).all()

def test_pixel_hash_sees_through_the_container(tmp_path):
    root = tmp_path / 'r'; (root / 'A').mkdir(parents=True)
    for name, kw in (('a.png', {}), ('b.bmp', {}), ('c.webp', dict(lossless=True)), ('d.tif', {})): RGB.save(root / 'A' / name, **kw)
    Image.fromarray(np.array(RGB).reshape(24, 96, 3)).save(root / 'A/e.png')  # the same bytes in another shape
    h = quiet(scan(root)).df.sha256
    assert h[:4].nunique() == 1 and h[4] != h[0]

# ---- splits

def tied_together(df): return (df.groupby('unit').split.nunique() == 1).all()

def test_copies_never_straddle(tmp_path):
    "Each patch of B comes again re-encoded, turned or exactly, in another class folder or the same one."
    root = fill(tmp_path / 'r', A=40, B=40)
    for i in range(40):
        a = np.array(Image.open(root / f'B/B-s{i // 4}-{i:04}.png'))
        a = np.ascontiguousarray(np.rot90(a, i % 4)) if i % 3 else a
        Image.fromarray(np.array(Image.fromarray(a).resize((64, 64), Image.BICUBIC))).save(root / f'{"AB"[i % 2]}/copy-{i}.{"jpg" if i % 5 else "png"}', **({'quality': 92} if i % 5 else {}))
    df = scan(root); seen = quiet(df)
    for seed in range(5):
        s = split(df, seed=seed, seen=seen)
        assert tied_together(s) and set(s.split) == set(SPLITS)
        where = dict(zip(s.path.map(os.path.basename), s.split))
        assert all(where[f'B-s{i // 4}-{i:04}.png'] == where[f'copy-{i}.{"jpg" if i % 5 else "png"}'] for i in range(40))

@pytest.mark.parametrize('seed', range(30))
def test_random_linked_groups(seed):
    "Any mixture of families: together, every class trains, shares close, deterministic."
    rng = np.random.default_rng(seed); n = int(rng.integers(30, 400)); classes = int(rng.integers(1, 9))
    df = pd.DataFrame(dict(path=[str(i) for i in range(n)], label=rng.integers(0, classes, n).astype(str), sha256=[str(i) for i in range(n)]))
    if seed % 3: df['group'] = ['' if rng.random() < .3 else f'g{g}' for g in rng.integers(0, max(2, n // (2 if seed % 2 else 20)), n)]
    seen = Inspected(df, np.zeros((n, 32, 32), np.uint8), None)
    s = split(df, val_frac=.2, test_frac=.1, seed=seed, seen=seen)
    assert tied_together(s) and set(s.label[s.split == 'train']) == set(df.label)
    assert s.equals(split(df, val_frac=.2, test_frac=.1, seed=seed, seen=seen))
    if 'group' in df: assert (s[s.group != ''].groupby('group').split.nunique() == 1).all()
    else:
        for label, d in s.groupby('label'):
            want = max(1, round(len(d) * .2)) if len(d) > 2 else 0
            assert len(d) < 3 or (d.split == 'val').sum() == want

def test_shares_with_families_of_eight():
    df = pd.DataFrame(dict(path='', label=np.repeat(list('ABC'), 400), sha256=[str(i) for i in range(1200)], group=[f'g{i // 8}' for i in range(1200)]))
    s = split(df, seen=Inspected(df, np.zeros((1200, 32, 32), np.uint8), None))
    share = pd.crosstab(s.label, s.split, normalize='index')
    assert (share.val - .15).abs().max() <= .02 and (share.test - .15).abs().max() <= .02

def family_frame(sizes, label='A'):
    n = sum(sizes)
    df = pd.DataFrame(dict(path='', label=label, sha256=[str(i) for i in range(n)], group=np.repeat([f'g{i}' if s > 1 else '' for i, s in enumerate(sizes)], sizes)))
    return df, Inspected(df, np.zeros((n, 32, 32), np.uint8), None)

def test_singles_make_the_shares_exact():
    df, seen = family_frame([5] * 20 + [1] * 100)
    assert split(df, seen=seen).split.value_counts().to_dict() == dict(train=140, val=30, test=30)

def test_three_large_families_reach_every_split():
    "Dealing alone would give all three to training: each is far more than validation wants."
    df, seen = family_frame([10, 10, 10])
    assert split(df, seen=seen).split.value_counts().to_dict() == dict(train=10, val=10, test=10)

def test_a_single_family_trains():
    df, seen = family_frame([10])
    assert set(split(df, seen=seen).split) == {'train'}

def test_a_split_that_wants_nothing_gets_nothing():
    assert _place_groups(np.array([[4], [4], [1]]), np.array([[1], [0], [0]]), 0).tolist() == [0, 0, 0]
    assert _place_groups(np.array([[4], [4], [1]]), np.array([[0], [1], [0]]), 0).tolist()[:2] == [1, 1]

def test_no_evaluation_wanted():
    df = pd.DataFrame(dict(path='', label=list('AB') * 20, sha256=[str(i) for i in range(40)], group=[f'g{i // 4}' for i in range(40)]))
    seen = Inspected(df, np.zeros((40, 32, 32), np.uint8), None)
    assert set(split(df, val_frac=0, test_frac=0, seen=seen).split) == {'train'}
    assert set(split(df, val_frac=.2, test_frac=0, seen=seen).split) == {'train', 'val'}

def test_by_dataset(tmp_path, capsys):
    first, second = fill(tmp_path / 'a', A=20, B=20), fill(tmp_path / 'b', seed=1, A=11, B=8)
    Image.fromarray(np.array(Image.open(first / 'A/A-s0-0003.png'))[:, ::-1]).save(second / 'B/mirrored.jpg', quality=95)
    d = open_data(DataConfig(root=str(first), test_root=str(second), image_size=16, batch_size=4, samples_per_class=8), progress=False)
    t = pd.crosstab([d.manifest.root, d.manifest.label], d.manifest.split)[list(SPLITS)]
    assert t.values.tolist() == [[20, 0, 0], [20, 0, 0], [0, 6, 5], [1, 4, 4]]
    assert d.manifest.split[d.manifest.path.str.endswith('mirrored.jpg')].item() == 'train'
    assert '1 patches of --data.test-root' in capsys.readouterr().err

def test_by_dataset_needs_the_same_classes(tmp_path):
    first, second = fill(tmp_path / 'a', A=20, B=20), fill(tmp_path / 'b', seed=1, A=4, Z=4)
    cfg = DataConfig(root=str(first), test_root=str(second), image_size=16, batch_size=4, samples_per_class=8)
    assert '--data.test-root' in (line := says(lambda: open_data(cfg, progress=False))) and 'Z' in line

def test_manual_csv_is_kept_and_its_leak_reported(toy, tmp_path, capsys):
    df = scan(toy); df['split'] = ['train', 'val', 'test'] * 13 + ['train'] * 2
    (toy / 'A/copy.png').write_bytes((toy / 'A/A-s0-0000.png').read_bytes())
    df.loc[len(df)] = [str(toy / 'A/copy.png'), 'A', 'test']
    save_manifest(df, tmp_path / 'm.csv')
    d = open_data(DataConfig(manifest=str(tmp_path / 'm.csv'), image_size=16, batch_size=4, samples_per_class=8), progress=False)
    assert d.manifest.split.tolist() == df.split.tolist() and 'warning: 1 patches outside train' in capsys.readouterr().err
    save_manifest(df.assign(split=df.split.where(df.label != 'B', 'val')), tmp_path / 'm.csv')
    assert 'no training patch of B' in says(lambda: open_data(replace(d.cfg), progress=False))

def test_glass_is_no_family():
    u = np.linspace(-1, 1, 32); rng = np.random.default_rng(0)
    glass = (235 - 15 * (u[:, None] ** 2 + u ** 2) + rng.normal(0, .5, (3000, 32, 32))).round().astype(np.uint8)
    df = pd.DataFrame(dict(path='', label='A', sha256=[str(i) for i in range(3000)]))
    assert len(set(linked_groups(df, glass))) == 3000

def test_close_hashes_are_all_found():
    "Against brute force: complete up to 7 bits, nothing beyond the limit, whatever the bits."
    rng = np.random.default_rng(0); a = rng.integers(0, 2 ** 64, 600, dtype=np.uint64)
    for k in range(300):
        a[300 + k] = a[k] ^ np.bitwise_or.reduce(np.left_shift(np.uint64(1), rng.choice(64, k % 10, replace=False).astype(np.uint64)), initial=np.uint64(0))
    found = {(i, j) for p in _candidates(a, a) for i, j in zip(*p)}
    i, j = np.triu_indices(600, 1); d = np.bitwise_count(a[i] ^ a[j])
    assert set(zip(i[d <= 7], j[d <= 7])) <= found <= set(zip(i[d <= HASH_BITS], j[d <= HASH_BITS])) and (d <= 7).sum() >= 240

def test_search_is_not_quadratic():
    "20,000 patches have 200 million pairs; the planted turned copies are all found, in seconds."
    rng = np.random.default_rng(0)
    a = gaussian_filter(rng.normal(size=(20_000, 32, 32)).astype(np.float32), (0, 2, 2), mode='wrap')
    t = (128 + 50 * a / a.std()).clip(0, 255).astype(np.uint8)
    for o in range(8): t[-80 + 10 * o:20_000 - 70 + 10 * o] = orient(t[10 * o:10 * o + 10], o)
    start = time.process_time(); found = near_duplicates(t)
    assert time.process_time() - start < 60
    assert set(zip(found.i, found.j)) >= {(k, 20_000 - 80 + k) for k in range(80)} and len(found) < 100

# ---- handing out

def batches(loader): return [(x, y, i.tolist()) for x, y, i in loader]

@pytest.mark.parametrize('start', ['fork', 'spawn'])
@pytest.mark.parametrize('cache', [True, False])
def test_loader_workers(start, cache, toy):
    df = scan(toy); seen = quiet(df, 16)
    data = HistoDataset(df, ['A', 'B', 'C'], 16, seen.images if cache else None)
    kw = dict(sampler=[[0, 5, 40], [3], [7, 8]], batch_size=None)
    for (x, y, i), (u, v, j) in zip(batches(DataLoader(data, **kw)), batches(DataLoader(data, num_workers=2, multiprocessing_context=start, **kw))):
        assert torch.equal(x, u) and torch.equal(y, v) and i == j
        assert all((x[k].permute(1, 2, 0).numpy() == resize(read_rgb(df.path[r]), 16)).all() for k, r in enumerate(i))

def test_open_data_with_workers_is_the_same_and_resumes(toy):
    cfg = DataConfig(root=str(toy), image_size=16, batch_size=5, samples_per_class=15, group_regex=r'-(s\d+)-')
    alone, helped = open_data(cfg, progress=False), open_data(replace(cfg, num_workers=2), progress=False)
    for a, b in zip(batches(alone.train), batches(helped.train), strict=True): assert torch.equal(a[0], b[0]) and a[2] == b[2]
    whole = []
    for _ in range(3):
        for x, y, i in alone.train: whole.append(i.tolist()); alone.sampler.advance(len(y))
    for stop in (1, 4, 9, 13):  # batches used while the workers had fetched more
        d = open_data(replace(cfg, num_workers=2), manifest=alone.manifest, progress=False); got = []
        def run(d, upto):
            while True:
                for x, y, i in d.train:
                    got.append(i.tolist()); d.sampler.advance(len(y))
                    if len(got) == upto: return
        run(d, stop)
        e = open_data(cfg, manifest=alone.manifest, progress=False); e.sampler.load_state_dict(d.sampler.state_dict()); run(e, len(whole))
        assert got == whole

def test_evaluation_patches_are_never_trained_on(toy):
    d = open_data(DataConfig(root=str(toy), image_size=16, batch_size=5, samples_per_class=40), progress=False)
    used = {k for _ in range(3) for _, _, i in d.train for k in i.tolist()}
    held = [k for _, _, i in d.loader_real_eval for k in i.tolist()]
    assert used == set(d.manifest.index[d.manifest.split == 'train']) and held == d.manifest.index[d.manifest.split == 'val'].tolist()
    assert len(d.dataset('test')) == (d.manifest.split == 'test').sum() > 0

def test_global_random_state_is_left_alone(toy):
    cfg = DataConfig(root=str(toy), image_size=16, batch_size=5, samples_per_class=10)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    d = open_data(cfg, progress=False); batches(d.train); batches(d.loader_real_eval)
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all() and random.getstate() == before[2]

def test_no_cache_gives_the_same_batches(toy, capsys):
    cfg = DataConfig(root=str(toy), image_size=16, batch_size=5, samples_per_class=10)
    a, b = open_data(cfg, progress=False), open_data(replace(cfg, cache_mb=0), progress=False)
    assert b.images is None and '--data.cache-mb' in capsys.readouterr().err
    for x, y in zip(batches(a.train), batches(b.train), strict=True): assert torch.equal(x[0], y[0]) and x[2] == y[2]

def test_last_batch(toy):
    cfg = DataConfig(root=str(toy), image_size=16, batch_size=8, samples_per_class=10)
    d, e = open_data(cfg, progress=False), open_data(replace(cfg, drop_last=False), progress=False)
    assert [len(y) for _, y, _ in d.train] == [8] * 3 and [len(y) for _, y, _ in e.train] == [8, 8, 8, 6]

def test_too_large_a_batch(toy):
    cfg = DataConfig(root=str(toy), image_size=16, batch_size=64, samples_per_class=100)
    assert '--data.batch-size: 64 is more than the' in says(lambda: open_data(cfg, progress=False))
    assert '--data.samples-per-class' in says(lambda: open_data(replace(cfg, batch_size=16, samples_per_class=2), progress=False))
    assert '--data.root' in says(lambda: open_data(DataConfig(), progress=False))

def test_too_few_for_evaluation_is_one_warning_line(tmp_path, capsys):
    root = fill(tmp_path / 'r', A=30, B=1)
    open_data(DataConfig(root=str(root), image_size=16, batch_size=4, samples_per_class=8), progress=False)
    err = capsys.readouterr().err
    assert err.count('\n') == 2 and err.startswith('warning: 1 of 2 classes have fewer than 8') and 'none of B' in err

def test_a_rim_around_every_patch_is_told_and_can_be_cut_off(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for label in 'AB':
        (tmp_path/'raw'/label).mkdir(parents=True)
        for k in range(12):
            x = rng.integers(90, 200, (40, 40, 3), dtype=np.uint8)
            x[0] = x[-1] = x[:, 0] = x[:, -1] = 60
            Image.fromarray(x).save(tmp_path/'raw'/label/f'{k}.png')
    cfg = DataConfig(root=str(tmp_path/'raw'), image_size=32, batch_size=4, num_workers=0)
    open_data(cfg, progress=False)
    assert 'a rim, which the generator will draw too; histogan.prepare --trim 2' in capsys.readouterr().err
    how = dict(test_root='', image_size=32, quality=QualityOptions('none'), stain=StainOptions('none'), workers=1)
    out = prepare(PrepareConfig(str(tmp_path/'raw'), out=str(tmp_path/'cut'), trim=2, mpp=.5, **how), False)
    open_data(replace(cfg, root=str(out)), progress=False)
    assert 'a rim' not in capsys.readouterr().err
    card = read_json(Path(out, 'prepare.json'))
    assert card['config']['trim'] == 2 and card['mpp'] == .5*36/32
    says(lambda: prepare(PrepareConfig(str(tmp_path/'raw'), out=str(tmp_path/'cut'), trim=1, mpp=.5, **how), False))

def test_resume_notices_changed_files(toy):
    cfg = DataConfig(root=str(toy), image_size=16, batch_size=4, samples_per_class=8)
    kept = open_data(cfg, progress=False).manifest
    victim = kept.path[5]; a = np.array(Image.open(victim)); a[0, 0, 0] ^= 1; Image.fromarray(a).save(victim)
    assert os.path.basename(victim) in (line := says(lambda: open_data(cfg, manifest=kept, progress=False))) and '1 of 41' in line
    os.unlink(victim)
    assert 'does not exist' in says(lambda: open_data(cfg, manifest=kept, progress=False))

@pytest.mark.parametrize('kw', [dict(image_size=100), dict(image_size=8), dict(image_size=0), dict(batch_size=0), dict(batch_size=7, pairs=True), dict(num_workers=-1), dict(on_device='yes'), dict(samples_per_class=0),
                                dict(samples_per_class=7, pairs=True), dict(val_frac=1.), dict(val_frac=-.1), dict(test_frac=.9), dict(near_duplicate=1.1), dict(cache_mb=-1), dict(seed=-1)])
def test_config_refuses(kw): assert f'--data.{next(iter(kw))}'.replace('_', '-') in says(lambda: DataConfig(**kw))

# ---- on the device

@pytest.mark.parametrize('kw', [{}, dict(pairs=True, batch_size=6, samples_per_class=14), dict(drop_last=False, batch_size=7), dict(cache_mb=0)])
def test_patches_on_the_device_are_the_loaders_to_the_bit(toy, tmp_path, kw, capsys):
    "Epochs, a stop in the middle, two processes, files that are decoded each time."
    cfg = DataConfig(root=str(toy), **(dict(image_size=16, batch_size=5, samples_per_class=10) | kw))
    for rank, world in ((0, 1), (1, 2)) if cfg.batch_size % 2 == 0 else ((0, 1),):
        ways = [open_data(replace(cfg, on_device=w), progress=False, device='cpu', rank=rank, world=world) for w in ('off', 'on')]
        assert [type(d.train).__name__ for d in ways] == ['DataLoader', 'DeviceBatches']
        for e in range(3):
            for d in ways: d.sampler.set_epoch(e); d.sampler.advance(cfg.batch_size//world*(e % 2))
            assert len(ways[0].train) == len(ways[1].train)
            for a, b in zip(*(d.train for d in ways), strict=True):
                assert all(torch.equal(u, v) for u, v in zip(a, b)) and a[0].stride() == b[0].stride() and a[2].device.type == 'cpu'

def test_only_what_fits_goes_to_the_device(toy, monkeypatch):
    import histogan.batches as b
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda d: (1000, 10**6))
    for size, wanted, kept in ((500, 'auto', True), (501, 'auto', False), (10**9, 'on', True), (1, 'off', False)): assert b.fits_on_device(size, 'cuda', wanted) is kept
    assert not b.fits_on_device(1, 'cpu')
    plain = open_data(DataConfig(root=str(toy), image_size=16, batch_size=5, samples_per_class=10), progress=False, device='cpu')
    assert plain.train.num_workers == 0 and not plain.train.pin_memory

def test_a_run_on_the_cpu_pins_nothing_where_there_is_a_gpu(toy, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    cfg = DataConfig(root=str(toy), image_size=16, batch_size=5, samples_per_class=10, on_device='off')
    for device, pinned in (('cpu', False), ('cuda:0', True), (None, True)):
        made = open_data(cfg, progress=False, device=device)
        assert [d.pin_memory for d in (made.train, made.loader_real_eval)] == [pinned]*2 and (made.train.num_workers > 0) == pinned

def test_a_loader_for_cuda_is_pinned_and_its_workers_stay(toy):
    from histogan.batches import WORKERS, loader_of
    data = HistoDataset(scan(toy), ['A', 'B', 'C'], 16)
    made = loader_of(data, range(41), 4, pin=True)
    assert made.pin_memory and made.num_workers == min(WORKERS, os.cpu_count() - 1) and made.persistent_workers == (made.num_workers > 0)
    stay = loader_of(data, range(41), 4, workers=1, pin=False); first = [i.tolist() for _, _, i in stay]; pids = {w.pid for w in stay._iterator._workers}
    assert [i.tolist() for _, _, i in stay] == first and {w.pid for w in stay._iterator._workers} == pids

def test_patches_larger_than_memory_allows_are_kept_in_a_file(toy, tmp_path, capsys, monkeypatch):
    "With a place for it nothing is decoded again, whatever --data.cache-mb says; without room on the disk it is."
    cfg = DataConfig(root=str(toy), image_size=32, batch_size=5, samples_per_class=10, cache_mb=.01)
    whole = open_data(replace(cfg, cache_mb=1), progress=False); capsys.readouterr()
    d = open_data(cfg, progress=False, cache_dir=tmp_path/'cache')
    assert 'cache-mb' not in capsys.readouterr().err and (d.images[np.arange(41)] == whole.images).all() and d.manifest.equals(whole.manifest)
    file = next((tmp_path/'cache').glob('patches-*.npy')); before = file.stat()
    again = open_data(cfg, progress=False, cache_dir=tmp_path/'cache')
    assert file.stat().st_mtime_ns == before.st_mtime_ns and (again.images[np.arange(41)] == whole.images).all()
    import histogan.data as h
    monkeypatch.setattr(h, '_SPARE', 2**62)
    full = open_data(cfg, progress=False, cache_dir=tmp_path/'full')
    assert full.images is None and '--data.cache-mb' in capsys.readouterr().err

def test_plain_tables_are_read_alike(toy, tmp_path, monkeypatch):
    "The quick reader and the patient one: the same table or the same words."
    import histogan.manifest as m
    rows = [f'{p},{l},train,{k},{k % 3}' for k, (p, l) in enumerate(zip(scan(toy).path, scan(toy).label))]
    head = 'path,label,split,size,group'
    odd = {'plain': [], 'blank lines': ['', '', rows[0].replace(',A,', ',A ,')], 'short': ['x,A'], 'long': [rows[3] + ',9'], 'both': ['x,A,train,1', rows[3] + ',9'],
           'no number': [rows[3].replace(',3,', ',3.5,')], 'form feed': ['a\x0cb,A,train,1,2'], 'carriage': [rows[5] + '\r'], 'no split': [rows[1].replace('train', 'training')],
           'empty': [rows[1].replace(',A,', ',,')], 'NA': [rows[1].replace(',A,', ',NA,')], 'leading zeros': [rows[2].replace(',2,2', ',2,002')], 'large': [rows[2].replace(',2,2', f',{10**19},2')]}
    def read(slow):
        with monkeypatch.context() as patched:
            if slow: patched.setattr(m, '_plain_table', lambda *a: None)
            try: return load_manifest(tmp_path/'m.csv')
            except InputError as e: return str(e)
    kept = 0
    for name, more in odd.items():
        lines = rows[7:] + more
        (tmp_path/'m.csv').write_text('\n'.join([head, *lines]) + '\n' * (name != 'plain'))
        fast, slow = read(False), read(True)
        assert type(fast) is type(slow), (name, fast, slow)
        if isinstance(fast, str): assert fast == slow, name
        else: kept += 1; assert fast.equals(slow) and (fast.dtypes == slow.dtypes).all(), name
    assert kept >= 5
    (tmp_path/'m.csv').write_text('\n'.join(['path,label,split,size', *(','.join(r.split(',')[:4]).replace(',7', ',007') for r in rows[7:8])]))
    assert load_manifest(tmp_path/'m.csv', group_column='size').group.tolist() == ['007']

# ---- the sampler

@pytest.mark.parametrize('seed', range(40))
def test_sampler(seed):
    "Any classes, any epoch, any stop: exact counts, whole passes, nothing lost or doubled."
    rng = np.random.default_rng(seed); pairs = bool(seed % 2); unit = 1 + pairs
    labels = rng.permutation(np.repeat(np.arange(rng.integers(1, 6)), rng.integers(1, 30)).tolist() + [7] * int(rng.integers(1, 4)))
    m = int(rng.integers(1, 40)) * unit; batch = int(rng.integers(1, 5)) * unit; classes = len(set(labels))
    make = lambda **kw: BalancedSampler(labels, m, seed, pairs, **kw)
    s = make(); epochs = [s.order(e) for e in range(6)]
    for e in epochs: assert all((labels[e] == c).sum() == m for c in set(labels))
    for k, c in enumerate(np.unique(labels)):
        stream, n = np.concatenate([s._draw(k, e) for e in range(6)]), (labels == c).sum()
        assert all(sorted(stream[a:a + n]) == sorted(np.flatnonzero(labels == c)) for a in range(0, len(stream) - n + 1, n))
        for e in range(6): assert sorted(epochs[e][labels[epochs[e]] == c]) == sorted(stream[e * m:(e + 1) * m])
        if pairs and n > 1: assert all((p[:, 0] != p[:, 1]).all() for e in epochs for p in [e[labels[e] == c].reshape(-1, 2)])
    if pairs: assert all((labels[e[::2]] == labels[e[1::2]]).all() for e in epochs)
    if m * classes < batch: return
    cut = make(batch_size=batch); whole = np.concatenate([cut.order(e) for e in range(4)])
    assert len(cut) == m * classes // batch * batch and all((cut.order(e) == epochs[e][:len(cut)]).all() for e in range(4))
    stop = int(rng.integers(0, 3 * len(cut) // batch)) * batch
    a, b = make(batch_size=batch), make(batch_size=batch)
    for _ in range(stop // batch): a.advance(batch)
    b.load_state_dict(a.state_dict()); got = []
    while len(got) < len(whole) - stop:
        rest = list(b); got += rest; b.advance(len(rest))
    assert got == whole[stop:].tolist()

def test_sampler_orders_differ():
    labels = np.repeat([0, 1], 50); s = BalancedSampler(labels, 30, seed=1)
    assert (s.order(0) != s.order(1)).any() and (s.order(0) != BalancedSampler(labels, 30, seed=2).order(0)).any()
    assert (s.order(0) == BalancedSampler(labels, 30, seed=1).order(0)).all()

def test_sampler_shares_of_processes():
    labels = np.repeat([0, 1, 2], 9)
    for pairs in (False, True):
        parts = [BalancedSampler(labels, 8, 0, pairs, rank=r, world=3).order(2) for r in range(3)]
        assert len({len(p) for p in parts}) == 1 and sorted(np.concatenate(parts)) == sorted(BalancedSampler(labels, 8, 0, pairs).order(2))

# ---- real patches, where they lie beside the project

def test_real_patches(shared):
    root = shared / 'data/histo5_128/train'
    start = time.process_time()
    d = open_data(DataConfig(root=str(root), image_size=64, batch_size=16, pairs=True, group_regex=r'(.+)_x\d+_y\d+'), progress=False)
    assert time.process_time() - start < 30
    assert len(d.classes) == 5 and len(d.manifest) == 1440 and tied_together(d.manifest)
    assert set(zip(d.manifest.label, d.manifest.split)) == {(c, s) for c in d.classes for s in SPLITS}
    x, y, i = next(iter(d.train))
    assert x.shape == (16, 3, 64, 64) and (y[::2] == y[1::2]).all() and (i[::2] != i[1::2]).all()

def test_distinct_real_patches_are_not_glued(shared):
    seen = quiet(scan(shared / 'data/nct-sample/NCT-CRC-HE-100K'))
    assert len(set(linked_groups(seen.df, seen.thumbs))) == 90
