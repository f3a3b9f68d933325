"Stain normalisation with real files, hostile pixels, other processes and other processors, without SPAMS, and beside `staintools`."
import hashlib, json, os, warnings
from functools import partial
from io import BytesIO
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image

from histogan.data import InputError, read_rgb
from histogan.phantom import render, stain_for
from histogan.stain import METHODS, StainConfig, StainNormalizer, light_of, pick_target, separate, stain_matrix
from conftest import ROOT, run_python

STAINS = ('vahadane', 'macenko')

def degrees(a, b): return np.degrees(np.arccos(np.clip((a * b).sum(-1), -1, 1)))

@pytest.fixture(scope='module')
def target(): return render('TUM', 3, 96)

@pytest.fixture(scope='module')
def batch(): return np.stack([render(c, 70 + k, 96) for k, c in enumerate(('STR', 'LYM', 'BACK', 'NORM', 'MUC'))])

@pytest.fixture(params=METHODS)
def norm(request, target): return StainNormalizer(request.param).fit(target)

# ---- what goes in, and what must not change

RNG = np.random.default_rng(0)
HOSTILE = {
    'white': np.full((40, 40, 3), 255), 'black': np.zeros((40, 40, 3)), 'one colour': np.full((40, 40, 3), [200, 80, 160]), 'grey': np.full((31, 17, 3), 128),
    'one black pixel': np.zeros((1, 1, 3)), 'one white pixel': np.full((1, 1, 3), 255), 'one stained pixel': np.full((1, 1, 3), [150, 60, 140]),
    'a line': np.tile(RNG.integers(0, 256, (1, 1, 3)), (1, 500, 1)), 'noise': RNG.integers(0, 256, (33, 47, 3)), 'red and blue': np.tile([[[255, 0, 0]], [[0, 0, 255]]], (20, 40, 1)),
    'one bright pixel in black': np.pad(np.full((1, 1, 3), 255), ((9, 9), (9, 9), (0, 0))), 'one dark pixel in white': np.pad(np.zeros((1, 1, 3)), ((9, 9), (9, 9), (0, 0)), constant_values=255),
    'green ramp': np.stack([0 * np.indices((64, 64))[0], 4 * np.indices((64, 64))[0], 0 * np.indices((64, 64))[0]], -1)}

@pytest.mark.parametrize('standardise', [True, False])
@pytest.mark.parametrize('name', HOSTILE)
def test_hostile_pixels_come_out_or_pass_through(norm, name, standardise):
    norm = StainNormalizer(norm.method, StainConfig(standardise=standardise)).fit(render('TUM', 3, 96))
    img = HOSTILE[name].astype(np.uint8)
    with warnings.catch_warnings(), np.errstate(all='raise'):
        warnings.simplefilter('error')
        out, report = norm.transform(img, report=True)
    assert (out.shape, out.dtype) == (img.shape, np.uint8)
    assert sum(report.counts.values()) == 1
    if not report.changed[0]: assert report.reasons[0] and np.array_equal(out, img)
    if name not in ('noise', 'red and blue', 'green ramp'): assert not report.changed[0], 'a matrix was made of nothing'

def test_flat_patches_are_counted_and_not_dropped(norm):
    flat = np.stack([np.full((32, 32, 3), v, np.uint8) for v in (0, 255, 90)])
    out, report = norm.transform(flat, report=True)
    assert np.array_equal(out, flat) and len(report.reasons) == 3 and report.counts.get('normalised', 0) == 0

@pytest.mark.parametrize('bad', [
    np.zeros((8, 8, 3)), np.zeros((8, 8, 3), np.float32), np.zeros((8, 8, 3), np.int16), np.zeros((8, 8, 3), np.uint16), np.zeros((8, 8, 3), bool),
    np.zeros((8, 8), np.uint8), np.zeros((8, 8, 1), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((3, 8, 8), np.uint8), np.zeros((0, 8, 3), np.uint8),
    np.zeros((2, 2, 8, 8, 3), np.uint8), np.zeros(3, np.uint8), None, 'patch.png', [[1, 2, 3]]], ids=lambda b: str(getattr(b, 'shape', b)) + str(getattr(b, 'dtype', '')))
def test_what_is_not_rgb_bytes_is_refused_by_shape_and_type(norm, bad):
    for call in (norm.transform, norm.fit, partial(stain_matrix, method='macenko')):
        with pytest.raises(ValueError, match='uint8'): call(bad)

def test_views_and_read_only_arrays_are_read_and_left_alone(norm, batch, tmp_path):
    kept = batch.copy()
    want = norm.transform(batch)
    file = np.lib.format.open_memmap(tmp_path/'images.npy', 'w+', np.uint8, batch.shape); file[:] = batch; file.flush()
    stored = np.load(tmp_path/'images.npy', mmap_mode='r')
    twice = np.repeat(batch, 2, 0)[::2]
    for x in (stored, np.asfortranarray(batch), twice, batch.view()):
        x.flags.writeable = False
        assert np.array_equal(norm.transform(x), want)
    out = norm.transform(batch)
    out[:] = 0  # also where a patch passed through
    assert np.array_equal(batch, kept)

def test_a_patch_alone_in_a_batch_and_in_another_order(norm, batch):
    want = norm.transform(batch)
    for k in range(len(batch)): assert np.array_equal(norm.transform(batch[k]), want[k])
    assert np.array_equal(norm.transform(batch[::-1]), want[::-1])
    assert np.array_equal(norm.transform(np.concatenate([batch, batch]))[len(batch):], want)

# ---- other processes, other processors

TRANSFORM = '''
import hashlib, sys, numpy as np
from histogan.stain import METHODS, StainNormalizer
x = np.load(sys.argv[1])
print(*(hashlib.sha256(StainNormalizer(m).fit(x[0]).transform(x).tobytes()).hexdigest() for m in METHODS))
'''

@pytest.mark.parametrize('env', [dict(OMP_NUM_THREADS='4', OPENBLAS_NUM_THREADS='4', PYTHONHASHSEED='7'), dict(OPENBLAS_CORETYPE='Nehalem')], ids=['four threads', 'another processor'])
def test_the_same_bytes_in_a_fresh_process(env, target, batch, tmp_path):
    x = np.stack([target, *batch])
    np.save(tmp_path/'x.npy', x)
    done = run_python(['-c', TRANSFORM, tmp_path/'x.npy'], env=env)
    assert done.rc == 0, done.err
    assert done.out.split() == [hashlib.sha256(StainNormalizer(m).fit(x[0]).transform(x).tobytes()).hexdigest() for m in METHODS]

def test_a_target_survives_json(norm, batch):
    other = StainNormalizer(norm.method)
    other.load_state_dict(json.loads(json.dumps(norm.state_dict())))
    assert np.array_equal(other.transform(batch), norm.transform(batch))

# ---- without SPAMS

WITHOUT = '''
import json, sys, numpy as np
from histogan.stain import StainNormalizer, stain_matrix, pick_target
from histogan.data import InputError
x = np.load(sys.argv[1])
out, report = StainNormalizer().fit(x[0]).transform(x, report=True)
assert np.array_equal(out, x) and report.counts == {'no spams': len(x)}, report
assert StainNormalizer('macenko').fit(x[0]).transform(x, report=True)[1].changed.any()
assert StainNormalizer('reinhard').fit(x[0]).transform(x, report=True)[1].changed.any()
try: stain_matrix(x[0])
except InputError as e: print(e)
'''

def test_a_worker_without_spams_says_so(target, batch, capsys):
    state = StainNormalizer().fit(target).state_dict()
    with patch.dict('sys.modules', spams=None):
        worker = StainNormalizer(); worker.load_state_dict(state)
        assert np.array_equal(worker.transform(batch), batch) and not worker.enabled
    assert capsys.readouterr().err.count('warning: stain:') == 1

@pytest.mark.parametrize('fault', ['raise ImportError("no module of that name")', 'raise OSError("libstdc++.so.6: wrong version\\nsecond line")'], ids=['absent', 'broken'])
def test_without_spams_one_warning_and_raw_pixels(fault, target, batch, tmp_path):
    (tmp_path/'spams.py').write_text(fault)
    np.save(tmp_path/'x.npy', np.stack([target, *batch]))
    done = run_python(['-c', WITHOUT, tmp_path/'x.npy'], env=dict(PYTHONPATH=os.pathsep.join(map(str, (tmp_path, ROOT)))))
    assert done.rc == 0, done.err
    assert done.err.count('\n') == 1 and done.err.startswith('warning: stain:') and 'pip install spams-bin' in done.err
    assert 'spams cannot be imported' in done.out and 'macenko' in done.out

# ---- against the truth and against `staintools`

@pytest.fixture(scope='module')
def known():
    keys = [('LYM', 100), ('NORM', 102), ('STR', 103), ('TUM', 104), ('DEB', 105), ('MUS', 106)]
    return [render(c, k, 96) for c, k in keys], np.array([stain_for(k).matrix for _, k in keys])

@pytest.fixture
def counted():
    "SPAMS stops after a number of updates where `staintools` would give it a second."
    spams = pytest.importorskip('spams')
    with patch.object(spams, 'trainDL', partial(spams.trainDL, iter=60)): yield

def bright(staintools, img): return staintools.LuminosityStandardizer.standardize(img.copy())

def test_stains_are_as_near_to_the_truth_as_those_of_staintools(known, counted):
    staintools = pytest.importorskip('staintools')
    images, truth = known
    theirs = dict(vahadane=staintools.VahadaneStainExtractor, macenko=staintools.MacenkoStainExtractor)
    for method in STAINS:  # of the same pixels: staintools measures the border too
        usual = np.array([theirs[method].get_stain_matrix(bright(staintools, im)) for im in images])
        assert np.median(degrees(np.array([stain_matrix(im, method, StainConfig(edge=0)) for im in images]), truth)) <= np.median(degrees(usual, truth)) + .5, method

def test_pictures_are_those_of_staintools(known, counted):
    staintools = pytest.importorskip('staintools')
    goal = render('NORM', 21, 96)
    theirs = staintools.StainNormalizer('vahadane'); theirs.fit(bright(staintools, goal))
    ours = StainNormalizer().fit(goal)
    gaps = [np.abs(ours.transform(im).astype(int) - theirs.transform(bright(staintools, im))).mean() for im in known[0][:4]]
    assert np.mean(gaps) <= 4, gaps

def test_rows_are_unit_vectors_haematoxylin_first(known):
    for im, truth in zip(*known):
        for method in STAINS:
            m, c = separate(im, method)
            assert m.shape == (2, 3) and np.allclose(np.linalg.norm(m, axis=1), 1) and m[0, 0] > m[1, 0] and (c >= 0).all()
            assert (np.diag(degrees(m[:, None], truth)) < np.diag(degrees(m[::-1, None], truth))).all(), 'the rows are swapped'

# ---- black, and which stain is which

PATCHES = ROOT/'nbs'/'patches'
TISSUE = ('oral_oscc', 'oral_normal')

def tissue_patches(n=6):
    "Real patches that are part of the project."
    return [read_rgb(p) for c in TISSUE for p in sorted((PATCHES/'histo5_128'/'train'/c).iterdir())[:n]]

def as_jpeg(x, quality=85):
    "Through JPEG and back."
    with BytesIO() as f:
        Image.fromarray(x).save(f, 'JPEG', quality=quality)
        return np.array(Image.open(f))

def brightness(x): return (x @ np.array([.299, .587, .114])).ravel()

def kept(before, after):
    "Correlation of brightness."
    return np.corrcoef(brightness(before), brightness(after))[0, 1]

def every_patch():
    "All real patches that are part of the project."
    return [read_rgb(p) for p in sorted(PATCHES.glob('*/*/*/*')) if p.suffix != '.csv']

def moved(norm, x, where):
    "Grey levels by which black at `where` moves the mean of the rest."
    edged, tissue = x.copy(), np.ones(x.shape[:2], bool)
    tissue[where] = False
    edged[~tissue] = 0
    out = norm.transform(edged)
    assert not out[~tissue].any()
    return np.abs((out.astype(int) - norm.transform(x))[tissue].mean(0)).max()

RIGHT, TOP = np.s_[:, -3:], np.s_[:3]

@pytest.mark.parametrize('method', METHODS)
def test_three_black_columns_leave_the_tissue_of_every_patch_as_it_was(method):
    norm, images = StainNormalizer(method).fit(render('TUM', 5, 128)), every_patch()
    assert len(images) > 200
    away = np.array([moved(norm, x, RIGHT) for x in images])
    assert away.max() <= 3, (away.max(), (away > 3).sum())
    assert max(moved(norm, x, TOP) for x in images[::12]) <= 3

@pytest.mark.parametrize('method', STAINS)
def test_a_measured_border_would_move_some_of_them(method):
    norm = StainNormalizer(method, StainConfig(edge=0)).fit(render('TUM', 5, 128))
    names = 'NCT-CRC-HE-100K/DEB/DEB_4.png', 'test/Adenocarcinoma/GT2012468-1-400-001.webp'
    images = [read_rgb(p) for n in names for p in PATCHES.glob(f'*/{n}')]
    assert len(images) == 2 and max(moved(norm, x, RIGHT) for x in images) > 5

@pytest.mark.parametrize('side', [1, 7, 8, 16, 31, 32, 96])
def test_the_border_left_out_is_never_more_than_an_eighth_of_a_side(side):
    counted = light_of(np.full((side, 2 * side, 3), 200, np.uint8)).clear.reshape(side, 2 * side)
    n = min(4, side // 8)
    assert counted[n:side - n, n:2 * side - n].all() and counted.sum() == (side - 2 * n) * (2 * side - 2 * n)

def test_patches_of_one_slide_each_lose_their_own_border():
    clear = light_of(np.full((3, 32, 32, 3), 200, np.uint8)).clear.reshape(3, 32, 32)
    assert clear[:, 4:28, 4:28].all() and clear.sum() == 3 * 24 * 24

@pytest.mark.parametrize('method', METHODS)
def test_black_does_not_count_at_all(method):
    norm = StainNormalizer(method, StainConfig(edge=0)).fit(render('TUM', 5, 128))
    limit = 8 if method == 'vahadane' else .01  # another random sample of pixels
    for x in tissue_patches(2):
        padded = np.zeros((160, 200, 3), np.uint8)
        padded[:128, :128] = x
        out = norm.transform(padded).astype(int)
        assert not out[128:].any() and not out[:, 128:].any()
        assert np.abs(out[:128, :128] - norm.transform(x)).mean() < limit

@pytest.mark.parametrize('method', METHODS)
def test_black_that_went_through_jpeg_stays_dark_and_out_of_the_measure(method):
    norm = StainNormalizer(method).fit(render('TUM', 5, 128))
    away = []
    for x in tissue_patches():
        edged = x.copy()
        edged[:, -3:] = 0
        out, without = norm.transform(as_jpeg(edged)).astype(int), norm.transform(as_jpeg(x))
        assert out[:, -1].mean() < 16
        away.append(np.abs((out[:, :-6] - without[:, :-6]).mean((0, 1))).max())
    assert np.median(away) < 2, away

@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('high', [1, 6, 20, 40])
def test_a_dark_noisy_tile_passes_through_with_a_reason(method, high):
    dark = np.random.default_rng(1).integers(0, high, (128, 128, 3), dtype=np.uint8)
    out, report = StainNormalizer(method).fit(render('TUM', 5, 128)).transform(dark, report=True)
    assert report.counts == {'too dark': 1} and np.array_equal(out, dark)

def test_a_pen_mark_is_black_and_glass_is_glass():
    norm = StainNormalizer().fit(render('TUM', 5, 128))
    marked = render('TUM', 6, 128)
    marked[40:60] = 5
    out = norm.transform(marked)
    assert np.array_equal(out[40:60], marked[40:60])
    glass = np.full((128, 128, 3), 244, np.uint8)
    glass[:40] = 0
    assert norm.transform(glass, report=True)[1].counts == {'little tissue': 1}

def worst_kept(method):
    "The least correlation over the patches of the pages, against a target of strong nuclei."
    norm = StainNormalizer(method, StainConfig(min_match=-1)).fit(render('NORM', 21, 128))
    return min(kept(x, norm.transform(x)) for x in tissue_patches(24))

@pytest.mark.parametrize('method', STAINS)
def test_nuclei_stay_the_darkest_where_red_alone_would_exchange_the_stains(method):
    with patch('histogan.stain._exchanged', lambda *a: False): assert worst_kept(method) < .7
    assert worst_kept(method) > .75
    norm = StainNormalizer(method).fit(render('NORM', 21, 128))
    assert min(kept(x, norm.transform(x)) for x in tissue_patches(24)) > .8

@pytest.mark.parametrize('method', STAINS)
def test_every_oral_and_colorectal_patch_keeps_its_brightness(shared, method):
    norms = [StainNormalizer(method).fit(render(*key, 128)) for key in (('TUM', 5), ('NORM', 21))]
    folders = [shared/'data'/'histo5_128'/'train'/c for c in TISSUE] + sorted((shared/'data'/'ebhi_128'/'train').iterdir())
    for x in (read_rgb(p) for f in folders for p in sorted(f.iterdir())[::4]):
        for norm in norms:
            out, report = norm.transform(x, report=True)
            assert kept(x, out) > .79, report

def test_a_stretch_that_turns_the_brightness_over_is_refused():
    x = render('STR', 3, 96)
    strict = StainNormalizer('macenko', StainConfig(min_match=1.)).fit(render('TUM', 5, 128))
    out, report = strict.transform(x, report=True)
    assert report.counts == {'brightness not kept': 1} and np.array_equal(out, x)

# ---- real files

def test_real_patches_of_every_format(shared, norm, tmp_path):
    paths = [p for suffix in ('jpg', 'webp') for p in sorted((shared/'data'/'histo5_128'/'train').glob(f'*/*.{suffix}'))[::40][:4]]
    assert {p.suffix for p in paths} == {'.jpg', '.webp'}
    images = [read_rgb(p) for p in paths]
    out, report = norm.transform(np.stack(images), report=True)
    assert report.changed.sum() >= 4 and not np.array_equal(out, images)
    for k, im in enumerate(images):
        Image.fromarray(im).save(tmp_path/'x.tif', compression='tiff_lzw')
        assert np.array_equal(norm.transform(read_rgb(tmp_path/'x.tif')), out[k])

def hue(images):
    "How far the directions of the mean densities lie from each other, degrees."
    d = np.array([-np.log(np.maximum(im, 1) / 255).mean((0, 1)) for im in images])
    d /= np.linalg.norm(d, axis=1, keepdims=True)
    return np.degrees(np.sqrt(((d - d.mean(0))**2).sum(1).mean()))

def test_real_oral_patches_lose_most_of_their_spread_in_hue(shared):
    paths = sorted((shared/'data'/'histo5_128'/'train').glob('oral_*/*'))
    images = [read_rgb(p) for p in paths[::len(paths) // 40]]
    for method in METHODS:
        after = StainNormalizer(method).fit(images[pick_target(images, method)]).transform(np.stack(images))
        assert hue(after) < .6 * hue(images), method

def test_real_background_and_fat_pass_or_change_but_are_all_there(shared):
    folder = shared/'data'/'nct-sample'/'CRC-VAL-HE-7K'
    norm = StainNormalizer().fit(read_rgb(sorted((folder/'NORM').iterdir())[0]))
    sample = shared/'data'/'nct-sample'/'NCT-CRC-HE-100K'
    for label, least in (('BACK', 2), ('ADI', 0), ('TUM', 0)):
        images = np.stack([read_rgb(p) for p in sorted((sample/label).iterdir())])
        out, report = norm.transform(images, report=True)
        assert out.shape == images.shape and sum(report.counts.values()) == len(images)
        passed = len(images) - report.changed.sum()
        assert passed >= least and (label != 'TUM' or not passed)
        assert np.array_equal(out[~report.changed], images[~report.changed])

def test_a_target_without_tissue_is_refused():
    glass = np.full((64, 64, 3), 244, np.uint8)
    with pytest.raises(InputError, match='choose a patch full of tissue'): StainNormalizer().fit(glass)
    with pytest.raises(InputError, match='none of 2'): pick_target([glass, glass])

# ---- the benchmark

def test_the_benchmark_runs_and_names_a_wrong_class(tmp_path):
    for label in ('a', 'b'):
        (tmp_path/label).mkdir()
        for k in range(2): Image.fromarray(render('TUM', k, 64)).save(tmp_path/label/f'{k}.png')
    bench = ROOT/'tests'/'bench_stain.py'
    done = run_python([bench, '--spread', '--images', tmp_path, '--size', '0'])
    assert done.rc == 0 and all(m in done.out for m in ('as they are', *METHODS)), done.err
    done = run_python([bench, '--images', tmp_path, '--match', 'c'])
    assert done.rc == 1 and done.err == "error: --match 'c': no such class; there are a, b\n"
