"Evaluation in real processes: weights that are missing, wrong or hostile; what is computed again; copies that are found."
import hashlib, io, json, os, pickle, re, shutil

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from torchmetrics.image.fid import FrechetInceptionDistance

import histogan.eval as he
import histogan.features as hf
from conftest import Run, run_cli
from histogan.data import InputError, load_manifest, read_rgb, to_float
from histogan.encoder import random_encoder
from histogan.eval import FIDLPIPSEvaluator, evaluate_folders, main
from histogan.features import ALEXNET, INCEPTION, FeatureCache, Patches, encoder_extractor, features, inception_extractor, lpips_distance, lpips_network
from histogan.metrics import frechet
from histogan.phantom import render, stain_for

torch.set_num_threads(1)
COLUMNS = ['set', 'scope', 'class', 'metric', 'value', 'std', 'n', 'n_ref', 'extractor', 'trained_on', 'resize', 'reference', 'note']

def overall(df): return df[df.scope == 'all classes']

def refused(done, *words, lines=1):
    "Exit code 2 and `lines` lines of error, which together hold every word; no traceback."
    said = [l for l in done.err.splitlines() if l.startswith('error: ')]
    assert done.rc == 2 and len(said) == lines and 'Traceback' not in done.err, done.err
    for w in words: assert w in '\n'.join(said), said

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A run of two steps on the phantom at 32 px; its discriminator used random:0."
    out = tmp_path_factory.mktemp('eval')/'run'
    done = run_cli(['histogan.train', '--preset', 'smoke', '--phantom.per-class', '24', '--run.steps', '2', '--run.n-eval', '18', '--out', out])
    assert done.rc == 0, done.err
    return out

@pytest.fixture
def no_weights(monkeypatch, tmp_path): monkeypatch.setenv('TORCH_HOME', str(tmp_path/'empty'))

@pytest.fixture
def evaluate(run, capsys):
    "Evaluate in this process, where a second time costs no start."
    def call(*options):
        rc = main([str(run), '--per-class', '12', '--pairs', '6', *map(str, options)])
        return Run(rc, *capsys.readouterr())
    return call

def passes(done): return int(re.search(r'features: (\d+) computed', done.out)[1])

def test_a_run_is_evaluated_without_any_weights(run, tmp_path):
    done = run_cli(['histogan.eval', run, '--per-class', '12', '--pairs', '6'], env={'TORCH_HOME': str(tmp_path)})
    assert done.rc == 0, done.err
    assert 'left out: FID needs' in done.err and 'left out: LPIPS needs' in done.err and 'closer to training patches' in done.out
    df = pd.read_csv(run/'metrics'/'distribution.csv')
    assert list(df) == COLUMNS and set(df.set) == {'synthetic', 'real', 'real half'} and len(set(df['class'])) == 10
    assert 'FID' not in set(df.metric) and {f'{d}-{n}' for d in ('FD', 'KD') for n in ('cnn', 'random-0')} < set(df.metric)
    assert {'recall', 'coverage', 'radius ratio', 'nearest distance', 'dimensions', 'repeats', 'accuracy', 'frame', 'fine detail', 'checkerboard', 'diversity'} < set(df.metric)
    assert dict(df[df.extractor != 'pixels'].groupby('extractor').trained_on.first()) == {'cnn': 'no', 'random-0': 'yes'}  # features it never had beside those it had
    assert '* in features that the discriminator trained with' in done.out
    fd = overall(df[df.metric == 'FD-cnn']).set_index('set')
    assert fd.value['synthetic'] > 3*fd.value['real'] and fd.n['synthetic'] == fd.n['real'] == 108  # two steps of training
    assert 'fresh phantom' in fd.reference['synthetic'] and fd.note.str.contains('read the kernel distance').all()
    record = json.loads((run/'metrics'/'eval.json').read_text())
    assert record['extractors'][0]['note'].endswith('shares no patch with training') and len(record['generator']['weights']) == 16 and record['versions']['torch']
    for name in ('copying.json', 'copying_pairs.csv', 'copying_pairs.png'): assert (run/'metrics'/name).stat().st_size

def test_nothing_is_computed_twice(run, evaluate, no_weights):
    evaluate()
    again = evaluate()
    assert again.rc == 0 and passes(again) == 0
    table = (run/'metrics'/'distribution.csv').read_bytes()
    patch = sorted(run.glob('synth/*/ADI/*.png'))[3]
    whole = patch.read_bytes()
    patch.unlink()
    others = {p: p.read_bytes() for p in run.glob('synth/*/*/*.png')}
    assert passes(evaluate()) == 0 and patch.read_bytes() == whole  # drawn again, and known
    assert others == {p: p.read_bytes() for p in others} and (run/'metrics'/'distribution.csv').read_bytes() == table
    Image.fromarray(255 - read_rgb(patch)).save(patch)
    assert passes(evaluate('--no-copying')) == 2  # by each of two networks
    patch.write_bytes(whole)
    assert passes(evaluate()) == 0

def test_two_processes_write_the_file_of_one(run, evaluate, tmp_path):
    options = ['--per-class', '12', '--pairs', '6', '--seed', '9', '--no-copying']
    done = run_cli(['torch.distributed.run', '--standalone', '--nproc-per-node', '2', '-m', 'histogan.eval', run, *options], env={'TORCH_HOME': str(tmp_path)})
    assert done.rc == 0, done.err
    assert passes(done) >= 108 and done.out.count('written:') == 1
    table = pd.read_csv(run/'metrics'/'distribution.csv')
    for file in (run.parent/'cache'/'features').rglob('*.npz'): file.unlink()
    assert passes(evaluate('--seed', '9', '--no-copying')) > 108
    pd.testing.assert_frame_equal(table, pd.read_csv(run/'metrics'/'distribution.csv'), rtol=1e-3, atol=1e-4)

def test_an_interrupted_pass_goes_on(tmp_path):
    encoder, images, seen = random_encoder(0), np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8), []
    ex = encoder_extractor(encoder, 'cnn')
    def breaks(x):
        seen.append(len(x))
        if sum(seen) > 25: raise KeyboardInterrupt
        return ex.encode(x)
    from dataclasses import replace
    with pytest.raises(KeyboardInterrupt): features(FeatureCache(tmp_path, shard=10, batch=5), replace(ex, encode=breaks), images)
    cache = FeatureCache(tmp_path)
    features(cache, ex, images)
    assert (cache.computed, cache.reused) == (20, 20)

def test_an_interruption_is_one_line(evaluate, no_weights, monkeypatch):
    def stop(*a, **k): raise KeyboardInterrupt
    monkeypatch.setattr(he, 'distribution', stop)
    done = evaluate()
    assert done.rc == 130 and done.err.splitlines()[-1].startswith('stopped: ')

def test_an_encoder_of_the_discriminator_is_marked(run, evaluate, no_weights):
    assert evaluate('--extractors', 'random:0', 'random:1', '--no-copying').rc == 0
    df = pd.read_csv(run/'metrics'/'distribution.csv')
    marked = df.note.fillna('').str.contains('seen in training').groupby(df.metric).any()
    assert marked['FD-random-0'] and not marked['FD-random-1']

def test_copies_are_found(run, evaluate, no_weights):
    evaluate('--seed', '5')
    assert json.loads((run/'metrics'/'copying.json').read_text())['verdict'] == 'no'
    train = load_manifest(run/'artifacts'/'manifest.csv').query('split == "train"')
    fakes = sorted(run.glob('synth/seed5-*/*/*.png'))
    for i, (fake, source) in enumerate(zip(fakes[::4], train.path[::5])):  # every fourth patch: turned, mirrored, compressed
        x, file = np.rot90(read_rgb(source)[:, ::-1] if i % 2 else read_rgb(source), i % 4), io.BytesIO()
        Image.fromarray(np.ascontiguousarray(x)).save(file, 'JPEG', quality=70)
        Image.open(file).save(fake)
    done, result = evaluate('--seed', '5'), json.loads((run/'metrics'/'copying.json').read_text())
    assert result['verdict'] == 'yes' and ': yes' in done.out, result['sentence']
    pairs = pd.read_csv(run/'metrics'/'copying_pairs.csv')
    closest = pairs[pairs.space == 'pixels'].head(20)
    assert set(closest.train_path) <= set(train.path[::5]) and {str(p.relative_to(run)) for p in fakes[::4]} >= set(closest.path)

@pytest.mark.parametrize('options, words, lines', [
    (['--extractors', 'inception'], ['FID needs', INCEPTION.names[0], '96 MB', '--inception PATH', '--allow-download'], 1),
    (['--inception', 'nowhere.pth', '--lpips', 'yes'], ['is not at nowhere.pth', ALEXNET.names[0], '244 MB', '--alexnet PATH'], 2),
    (['--extractors', 'pathoduet:nowhere.pth', 'timm:resnet18:gone.safetensors'], ['checkpoint_HE.pth', '343 MB', 'nowhere.pth', 'resnet18', '47 MB', 'gone.safetensors'], 2),
    (['--extractors', 'clip'], ['--extractors clip'], 1), (['--real', 'nowhere'], ['nowhere'], 1), (['--per-class', '2'], ['--per-class 2'], 1),
    (['--device', 'cuda:7'], ['--device cuda:7'], 1), (['--per-clas', '12'], ['--per-class'], 1)])
def test_what_is_missing_is_said_before_any_work(options, words, lines, run, evaluate, no_weights):
    before = {p: p.stat().st_mtime_ns for p in run.parent.rglob('*')}
    refused(evaluate(*options, '--seed', '77') if '--per-class' not in options else evaluate(*options), *words, lines=lines)
    assert before == {p: p.stat().st_mtime_ns for p in run.parent.rglob('*')}

def test_a_run_that_set_nothing_aside_needs_a_folder(run, tmp_path, capsys):
    poor = tmp_path/'run'
    shutil.copytree(run, poor)
    config = json.loads((poor/'config.json').read_text())
    config['data']['root'] = 'elsewhere'  # not the phantom: nothing can be drawn afresh
    (poor/'config.json').write_text(json.dumps(config))
    manifest = load_manifest(run/'artifacts'/'manifest.csv')
    manifest.assign(split='train').to_csv(poor/'artifacts'/'manifest.csv', index=False)
    refused(Run(main([str(poor), '--lpips', 'no']), *capsys.readouterr()), '--real FOLDER')
    few = tmp_path/'few'
    (few/'ADI').mkdir(parents=True)
    shutil.copy(manifest.path[0], few/'ADI')
    refused(Run(main([str(poor), '--real', str(few)]), *capsys.readouterr()), 'has no class BACK', str(few))

def test_a_folder_without_a_run(tmp_path, capsys):
    refused(Run(main([str(tmp_path)]), *capsys.readouterr()), str(tmp_path))

def inception_state(seed=0):
    "Random weights in exactly the layout of the published file."
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    class Bare(FeatureExtractorInceptionV3):
        def load_state_dict(self, state): pass
    empty = io.BytesIO()
    torch.save({}, empty), empty.seek(0)
    gen = torch.Generator().manual_seed(seed)
    net = Bare('bare', ['2048'], feature_extractor_weights_path=empty)
    return {k: torch.randn(v.shape, generator=gen)*(2/max(v[0].numel(), 1))**.5 if v.ndim > 1 else v for k, v in net.state_dict().items()}

@pytest.fixture(scope='module')
def inception(tmp_path_factory):
    "That state as a file, and what its publication would have said."
    path = tmp_path_factory.mktemp('inception')/INCEPTION.names[0]
    torch.save(inception_state(), path)
    return path, INCEPTION._replace(sha256=hashlib.sha256(path.read_bytes()).hexdigest())

def test_inception_gives_fid(inception, tmp_path):
    path, published = inception
    assert len(inception_state()) == 94*6 + 2  # 94 convolutions with their normalisation, one linear layer
    ex, rng = inception_extractor(path, published=published), np.random.default_rng(0)
    sets = [Patches(rng.integers(0, high, (12, 32, 32, 3), np.uint8), np.repeat(['A', 'B'], 6), 'reference') for high in (256, 128)]
    rows = pd.DataFrame(FIDLPIPSEvaluator(FeatureCache(tmp_path, batch=12), [ex], pairs=4).rows('synthetic', *sets, ['A', 'B']))
    assert {'FID', 'KID'} <= set(rows.metric) and not rows.metric.str.startswith('FD').any() and rows.resize[0] == '32 px, then 299 px, bilinear as in TensorFlow 1'
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    theirs = FeatureExtractorInceptionV3('x', ['2048'], feature_extractor_weights_path=str(path))
    x = torch.from_numpy(sets[0].x[:4]).permute(0, 3, 1, 2)
    assert_close(ex.encode(x), theirs(x)[0])

class Bomb:
    def __init__(self, flag): self.flag = flag
    def __reduce__(self): return os.mkdir, (str(self.flag),)

def test_wrong_weights_are_refused_before_they_are_opened(inception, tmp_path, evaluate, monkeypatch):
    path, published = inception
    def opened(*a, **k): raise AssertionError('it was opened')
    monkeypatch.setattr(hf, 'read_tensors', opened)
    with pytest.raises(InputError, match='is not the published file'): inception_extractor(path)
    refused(evaluate('--inception', path), 'is not the published file', INCEPTION.sha256[:16])
    monkeypatch.undo()
    hostile = tmp_path/'hostile.pth'
    hostile.write_bytes(pickle.dumps(Bomb(tmp_path/'ran')))
    sha = hashlib.sha256(hostile.read_bytes()).hexdigest()
    with pytest.raises(InputError, match='refused'): inception_extractor(hostile, published=published._replace(sha256=sha))  # even with the right checksum
    assert not (tmp_path/'ran').exists()
    other = tmp_path/'other.pth'
    torch.save({'fc.weight': torch.zeros(3)}, other)
    with pytest.raises(InputError, match='does not hold the tensors of Inception'): inception_extractor(other, published=published._replace(sha256=hashlib.sha256(other.read_bytes()).hexdigest()))

def test_frechet_is_that_of_torchmetrics():
    encoder, rng = random_encoder(0), np.random.default_rng(0)
    class Net(torch.nn.Module):
        num_features = 96
        def forward(self, x): return encoder(to_float(x))
    real, fake = (torch.from_numpy(rng.integers(0, high, (300, 3, 16, 16), np.uint8)) for high in (256, 200))
    fid = FrechetInceptionDistance(feature=Net()).set_dtype(torch.float64)
    fid.update(real, real=True), fid.update(fake, real=False)
    ours = frechet(*(encoder(to_float(x)).numpy() for x in (real, fake)))
    assert ours == pytest.approx(float(fid.compute()), rel=1e-4)

def alexnet(shared): return shared/'weights'/'hub'/'checkpoints'/ALEXNET.names[0]

def test_lpips_gives_the_known_values(shared):
    gen = torch.Generator().manual_seed(42)
    a, b = (torch.rand(2, 3, 100, 100, generator=gen)*2 - 1 for _ in range(2))
    assert_close(lpips_network(alexnet(shared))(a, b).flatten(), torch.tensor([0.131169, 0.141963]), atol=2e-6, rtol=0)
    x = torch.randint(0, 256, (2, 3, 32, 32), generator=gen, dtype=torch.uint8)
    assert lpips_distance(alexnet(shared))(x, x).abs().max() == 0

def test_lpips_tells_repeated_patches(run, evaluate, shared, no_weights):
    assert evaluate('--alexnet', alexnet(shared), '--no-copying').rc == 0
    again = evaluate('--alexnet', alexnet(shared), '--no-copying')
    df = pd.read_csv(run/'metrics'/'distribution.csv')
    lpips = overall(df[df.metric == 'LPIPS']).set_index('set').value
    assert passes(again) == 0 and lpips['real'] > 0.05
    x = next(p for p in [np.stack([read_rgb(f) for f in sorted(run.glob('synth/seed0-*/LYM/*.png'))])])
    few = Patches(x[np.arange(12)//6], np.repeat('LYM', 12))  # two patches, six times each
    ev = FIDLPIPSEvaluator(FeatureCache(run.parent/'x'), [], lpips_distance(alexnet(shared)), pairs=30)
    whole, repeated = (ev.diversity(ev.lpips, p, ['LYM'])[0]['value'] for p in (Patches(x, np.repeat('LYM', 12)), few))
    assert repeated < 0.8*whole

def test_a_generator_that_repeats_and_an_honest_one(tmp_path):
    "Without a run: folders of anybody's patches, in three lines."
    def fill(name, start, n, same=0):
        for c in ('LYM', 'TUM'):
            (tmp_path/name/c).mkdir(parents=True)
            for i in range(n): Image.fromarray(render(c, start + (0 if i % 8 < same else i), 32, stain_for(start + i))).save(tmp_path/name/c/f'{i:03}.png')
    fill('real', 0, 112), fill('honest', 1000, 50), fill('repeats', 2000, 50, same=3)
    table = {name: overall(evaluate_folders(tmp_path/'real', tmp_path/name, lpips='no', extractors=('cnn', 'random:0'))) for name in ('honest', 'repeats')}
    for t in table.values():
        n = t[t.metric.isin(['FD-cnn', 'FD-random-0'])].n
        assert (n == n.iloc[0]).all()  # as many of each
    of = lambda name, ex: table[name][(table[name].metric == 'repeats') & (table[name].extractor == ex)].set_index('set').value
    for ex in ('cnn', 'random-0'):
        assert of('honest', ex)['synthetic'] < .22 and of('repeats', ex)['synthetic'] > .3 and of('honest', ex)['real half'] < .12, ex
    accuracy = table['honest'][table['honest'].metric == 'accuracy'].set_index('set').value
    assert accuracy['synthetic'] > .6

def test_folders_without_classes_and_without_a_run(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name, n in dict(real=40, fake=12, other=3).items():
        (tmp_path/name).mkdir()
        for i in range(n): Image.fromarray(rng.integers(0, 256, (24 if name == 'fake' else 32, 24 if name == 'fake' else 32, 3), np.uint8)).save(tmp_path/name/f'{i}.png')
    df = evaluate_folders(tmp_path/'real', tmp_path/'fake', lpips='no', extractors=('random:0',))
    assert set(df['class']) == {'', 'patches'} and df.resize[0].startswith('24 px')
    assert main([str(tmp_path/'fake'), '--real', str(tmp_path/'real'), '--lpips', 'no', '--extractors', 'random:0']) == 0 and 'FD-random-0' in capsys.readouterr().out
    with pytest.raises(InputError, match='6 in each set are needed'): evaluate_folders(tmp_path/'real', tmp_path/'other', lpips='no', extractors=('random:0',))
    with pytest.raises(InputError, match='nowhere'): evaluate_folders(tmp_path/'nowhere', tmp_path/'fake')
    with pytest.raises(InputError, match='two classes'): evaluate_folders(tmp_path/'real', tmp_path/'fake', lpips='no', extractors=('cnn',))

# ---- large sets

def test_a_classifier_that_is_not_asked_for_reserves_nothing():
    from histogan.features import Patches
    from histogan.reals import parts_for
    y = np.repeat(['A', 'B'], 64); p = Patches(np.zeros((128, 8, 8, 3), np.uint8), y, 'reals')
    sizes = lambda **kw: [len(q.y) for q in (lambda t, h: (t, *h))(*parts_for(p, np.arange(128), **kw))]
    assert sizes() == [64, 32, 32] and sizes(teach=False) == [0, 64, 64]

@pytest.mark.parametrize('ways', [dict(extractors=('random:0',)), dict(extractors=('random:0', 'cnn'))])
def test_folders_are_compared_with_all_reals_unless_cnn_is_asked_for(ways, tmp_path):
    from PIL import Image
    from histogan.eval import evaluate_folders
    rng = np.random.default_rng(0)
    for name, n in (('real', 64), ('fake', 64)):
        for c in 'AB':
            (tmp_path/name/c).mkdir(parents=True)
            for k in range(n): Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(tmp_path/name/c/f'{k}.png')
    df = evaluate_folders(tmp_path/'real', tmp_path/'fake', lpips='no', pairs=5, device='cpu', **ways)
    n = df[(df.metric == 'FD-random-0') & (df.scope == 'all classes')].n_ref
    assert set(n) == ({32} if 'cnn' in ways['extractors'] else {64}), set(n)

def test_neighbours_are_exact_whatever_the_blocks():
    "Against brute force in double precision; copies, and far from the origin, where single precision is coarse."
    from histogan.copying import nearest
    rng = np.random.default_rng(0)
    known = (1000 + rng.normal(size=(700, 24))).astype(np.float32)
    queries = [(1000 + rng.normal(size=(40, 24))).astype(np.float32) for _ in range(8)]
    queries[3][:5] = known[[3, 99, 500, 699, 0]]
    d = np.stack([np.linalg.norm(q[:, None].astype(float) - known[None].astype(float), axis=2) for q in queries])
    order = np.argsort(d.min(0), 1)[:, :21]
    for size in (13, 64, 700):
        dist, rows, pose = nearest(queries, [known[k:k + size] for k in range(0, 700, size)], 21)
        assert (rows == order).all() and (pose == d.argmin(0)[np.arange(40), order[:, 0]]).all()
        np.testing.assert_allclose(dist, np.take_along_axis(d.min(0), order, 1), rtol=1e-9, atol=1e-9)
    assert (dist[:5, 0] == 0).all() and (pose[:5] == 3).all()

def test_statistics_of_blocks_are_those_of_the_whole(monkeypatch):
    import histogan.selection as sel
    from histogan.metrics import manifold_metrics
    rng = np.random.default_rng(1)
    a, b = (rng.normal(size=(n, 12)).astype(np.float32) * s for n, s in ((300, 1), (260, 1.3)))
    whole = sel.frechet(a, b), manifold_metrics(a, b)
    monkeypatch.setattr(sel, 'ROWS', 37)
    parts = sel.frechet(a, b), manifold_metrics(a, b, block=41)
    np.testing.assert_allclose(parts[0], whole[0], rtol=1e-9)
    for k, v in whole[1].items(): np.testing.assert_allclose(parts[1][k], v, rtol=1e-9, err_msg=k)

def test_a_distance_takes_a_large_set_once():
    "Memory beyond the features themselves: blocks, not a second copy."
    import tracemalloc
    from histogan.selection import frechet
    a, b = (np.random.default_rng(k).random((60_000, 32), np.float32) for k in range(2))
    tracemalloc.start(); frechet(a, b); peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
    assert peak < a.nbytes + b.nbytes, peak
