"Patches from a checkpoint as a user draws them: stopped runs, odd labels, folders drawn into twice, ONNX, the Hub's folder."
import sys, types

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT, run_python
from histogan.checkpoint import checkpoint_path, export_generator, load_generator, save_checkpoint
from histogan.core import read_table
from histogan.generate import draw, export_onnx, flat_noise, generate, latents, main, patch_seed
from histogan.generator import PRETRAINED, Generator, GeneratorConfig

CFG = GeneratorConfig(num_classes=3, img_res=16, z_dim=16, w_dim=16, n_layers=2, fmap_base=16, fmap_min=8, noise_init=.1)

def made(classes=('ADI', 'MUS', 'TUM'), cfg=CFG, **card):
    torch.manual_seed(0)
    G = Generator(cfg).eval().requires_grad_(False)
    G.classes, G.card = list(classes), card
    return G

def test_a_run_without_a_scored_checkpoint_draws_its_ema_generator(tmp_path, capsys):
    from dataclasses import asdict
    G, run = made(), tmp_path/'run'
    (run/'checkpoints').mkdir(parents=True)
    state = dict(config=dict(g=asdict(CFG), preset='demo'), classes=G.classes, G_ema=G.state_dict())
    for step in (5, 40): save_checkpoint(checkpoint_path(run, step), state | dict(step=step))
    assert main([str(run), '--out', str(tmp_path/'s'), '--per-class', '2']) == 0
    said = capsys.readouterr().err
    assert 'no cgan_best_model.pt' in said and 'EMA generator of step 40' in said
    assert len(list((tmp_path/'s').glob('*/*.png'))) == 6

def test_no_checkpoint_at_all_is_one_line(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.count('\n') == 1

def test_the_list_keeps_the_seeds_of_what_is_in_the_folder(tmp_path):
    G = made()
    generate(G, tmp_path/'s', per_class=5)
    assert len(generate(G, tmp_path/'s', per_class=2, classes=('TUM',))) == 2
    rows = read_table(tmp_path/'s'/'patches.csv')
    assert len(rows) == 15 and {str(p) for p in rows.path} == {str(p.relative_to(tmp_path/'s').as_posix()) for p in (tmp_path/'s').glob('*/*.png')}
    again = draw(G, [2], [int(rows[rows.path == 'TUM/TUM-00004.png'].seed.item())])
    pixels = np.asarray(Image.open(tmp_path/'s'/'TUM'/'TUM-00004.png')).astype(int)
    assert abs(pixels - ((again[0].permute(1, 2, 0) + 1) * 127.5).round().numpy()).max() <= 1

@pytest.mark.parametrize('names', [['ER+/PR-', '..', 'tumour / invasive'], ['CON', 'aux', 'NUL.txt'], ['a', 'A', 'a '],
                                   ['/etc', 'C:\\x', '~'], ['', ' ', '.'], ['größe', 'gro\u0308ße', 'x' * 300]])
def test_labels_never_become_paths(tmp_path, names):
    G, out = made(names), tmp_path/'deep'/'out'
    generate(G, out, per_class=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['deep'] and sorted(p.name for p in out.parent.iterdir()) == ['out']
    rows = read_table(out/'patches.csv')
    assert list(rows.label) == [n for n in names for _ in range(2)] and rows.path.nunique() == 6
    folders = {p.split('/')[0] for p in rows.path}
    assert len({f.lower() for f in folders}) == 3 and all((out/p).is_file() and len((out/p).relative_to(out).parts) == 2 for p in rows.path)

def test_the_scale_is_in_the_list(tmp_path):
    generate(made(mpp=.25), tmp_path/'a', per_class=1)
    generate(made(), tmp_path/'b', per_class=1)
    assert set(read_table(tmp_path/'a'/'patches.csv').mpp) == {'0.25'} and 'mpp' not in read_table(tmp_path/'b'/'patches.csv')

@pytest.mark.parametrize('cfg', [CFG, GeneratorConfig(num_classes=3, img_res=32, z_dim=16, w_dim=16, n_layers=2, channels=(16, 16, 8, 8), cond='concat', stem='linear',
                                                      up='conv_first', to_rgb='skip', noise_init=.1, output_clamp='none', map_lr_mul=.1, padding='replicate'),
                                 GeneratorConfig(num_classes=3, img_res=16, z_dim=16, w_dim=16, n_layers=2, channels=(128, 128, 128))], ids=['poc', 'modern', 'wide'])
def test_onnx_draws_what_torch_draws(tmp_path, cfg):
    pytest.importorskip('onnx')
    ort = pytest.importorskip('onnxruntime')
    G = made(cfg=cfg, mpp=.5)
    session = ort.InferenceSession(str(export_onnx(G, tmp_path/'g.onnx')))
    assert [i.name for i in session.get_inputs()] == ['z', 'y', 'noise']
    assert session.get_modelmeta().custom_metadata_map == dict(classes='ADI\nMUS\nTUM', mpp='0.5')
    for n in (1, 3, 8):
        y, seeds = [i % 3 for i in range(n)], [patch_seed(0, 0, i) for i in range(n)]
        z, noise = latents(G, seeds)
        image, = session.run(None, dict(z=z.numpy(), y=np.array(y), noise=flat_noise(noise).numpy()))
        assert abs(image - draw(G, y, seeds).numpy()).max() < 1e-4

def test_onnx_from_the_command_line(tmp_path, capsys, monkeypatch):
    export_generator(tmp_path/'g', made(), ['ADI', 'MUS', 'TUM'])
    monkeypatch.setitem(sys.modules, 'onnx', None)  # not installed
    assert main([str(tmp_path/'g'), '--onnx', str(tmp_path/'g.onnx')]) == 2
    assert 'pip install onnx' in capsys.readouterr().err

def test_a_walk_is_a_strip_or_a_loop(tmp_path, capsys):
    export_generator(tmp_path/'g', made(), ['ADI', 'MUS', 'TUM'])
    for name, along in (('a.gif', 'classes'), ('b.png', 'seeds')):
        assert main([str(tmp_path/'g'), '--walk', str(tmp_path/name), '--along', along, '--frames', '4']) == 0
    assert Image.open(tmp_path/'a.gif').n_frames == 10 and Image.open(tmp_path/'b.png').size == (160, 16)
    assert main([str(tmp_path/'g'), '--walk', str(tmp_path/'c.mp4')]) == 2

def test_the_exported_folder_is_the_hubs(tmp_path, capsys):
    export_generator(tmp_path/'g', made(), ['ADI', 'MUS', 'TUM'], mpp=.5, preset='demo')
    assert {p.name for p in (tmp_path/'g').iterdir()} == set(PRETRAINED)
    card = (tmp_path/'g'/'README.md').read_text()
    assert card.startswith('---\n') and '0.5 µm per pixel' in card and 'ADI, MUS, TUM' in card
    assert main([str(tmp_path/'g'), '--export', str(tmp_path/'h')]) == 0
    G, H = Generator.from_pretrained(tmp_path/'g'), load_generator(tmp_path/'h')
    assert torch.equal(draw(G, [1], [3]), draw(H, [1], [3])) and G.classes == H.classes and H.card['mpp'] == .5

def test_the_hub_is_asked_only_when_told(tmp_path, monkeypatch):
    folder, asked = export_generator(tmp_path/'g', made(), ['ADI', 'MUS', 'TUM']), []
    def snapshot_download(repo, **kw): asked.append((repo, kw['allow_patterns'])); return str(folder)
    class HfApi:
        def __init__(self, token=None): pass
        def create_repo(self, repo_id, **kw): asked.append(('create', repo_id, kw['private']))
        def upload_folder(self, repo_id, folder_path): asked.append(sorted(p.name for p in __import__('pathlib').Path(folder_path).iterdir())); return 'address'
    monkeypatch.setitem(sys.modules, 'huggingface_hub', types.SimpleNamespace(snapshot_download=snapshot_download, HfApi=HfApi))
    with pytest.raises(ValueError, match='download=True'): Generator.from_pretrained('someone/tissue')
    assert asked == []
    G = Generator.from_pretrained('someone/tissue', download=True)
    assert asked == [('someone/tissue', list(PRETRAINED))] and G.classes[0] == 'ADI'
    assert G.push_to_hub('someone/tissue') == 'address' and asked[1:] == [('create', 'someone/tissue', True), sorted(PRETRAINED)]

@pytest.mark.parametrize('module', ['generate', 'downstream', 'report', 'ablate'])
def test_help_without_posix(module):
    "No module of POSIX alone is needed to print help, as on Windows."
    code = (f'import sys; [sys.modules.__setitem__(m, None) for m in ("fcntl", "resource", "pwd", "grp", "termios")]; '
            f'sys.argv = ["x", "--help"]; from histogan.{module} import main; sys.exit(main())')
    run = run_python(['-c', code], env={'PYTHONPATH': str(ROOT)})
    assert run.rc == 0 and 'usage' in run.out.lower(), run.err
