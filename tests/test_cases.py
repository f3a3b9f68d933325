"""Folders and tables of other people from training to report: labels that are words of the program, paths, numbers, or few patches.

Each case is trained for two steps, then evaluated, generated from and reported, on patches drawn here."""
import csv, json

import numpy as np
import pytest
from PIL import Image

from conftest import run_cli
from histogan.phantom import render

CASES = {
    'reserved words': (['all', 'hem'], 16),
    'paths': (['ER+/PR-', '..', 'tumour / invasive'], 16),
    'numbers': (['0', '1', '001'], 16),
    'missing values': (['NA', 'None', 'null'], 16),
    'seven of each': (['a', 'b'], 7),
}

def table(folder, labels, n):
    "A CSV of n patches of each label; a quarter is held out for the test."
    rows = []
    for k, label in enumerate(labels):
        (folder/f'c{k}').mkdir(parents=True)
        for i in range(n):
            path = folder/f'c{k}'/f'{i:03}.png'
            Image.fromarray(render(('TUM', 'STR', 'LYM')[k], i, 32)).save(path)
            rows.append([f'c{k}/{path.name}', label, 'test' if i % 4 == 0 else 'val' if i % 4 == 1 else 'train', f'patient{i // 2}'])
    with open(folder/'m.csv', 'w', newline='', encoding='utf-8') as f: csv.writer(f).writerows([['path', 'label', 'split', 'group'], *rows])
    return folder/'m.csv'

@pytest.mark.parametrize('case', CASES)
def test_from_training_to_report(tmp_path, case):
    labels, n = CASES[case]
    small = ['--preset', 'smoke', '--data.image-size', '32', '--data.batch-size', '4', '--run.steps', '2', '--run.n-eval', '18']
    run = run_cli(['histogan.train', *small, '--data.manifest', table(tmp_path/'data', labels, n), '--out', 'run'], cwd=tmp_path)
    assert run.rc == 0, run.err
    inside = {p.name for p in tmp_path.iterdir()} | {'synth'}
    for args in (['histogan.eval', 'run', '--extractors', 'random:0', '--per-class', '6'],
                 ['histogan.generate', 'run', '--per-class', '2', '--out', 'synth'],
                 ['histogan.report', 'run']):
        done = run_cli(args, cwd=tmp_path)
        assert done.rc in (0, 2) and 'Traceback' not in done.err, f'{args}: {done.err}'
        if done.rc == 2: assert done.err.strip().splitlines()[-1].startswith('error: ') and case == 'seven of each'
    assert {p.name for p in tmp_path.iterdir()} <= inside  # nothing beside what was asked for
    with open(tmp_path/'synth'/'patches.csv', newline='', encoding='utf-8') as f: drawn = list(csv.DictReader(f))
    assert sorted({r['label'] for r in drawn}) == sorted(labels) and len(drawn) == 2 * len(labels)
    assert all((tmp_path/'synth'/r['path']).resolve().is_relative_to(tmp_path/'synth') for r in drawn)
    report = (tmp_path/'run'/'MODEL_CARD.md').read_text(encoding='utf-8')
    assert all(label in report for label in labels) and 'procedural' not in report

# ---- options that name a file: looked at before any work

BAD_FILES = {
    'thresholds: a word': (['histogan.prepare', 'data', '--quality.thresholds', 'off'], '--quality.thresholds off: is no file'),
    'thresholds: no JSON': (['histogan.prepare', 'data', '--quality.thresholds', 'text'], 'text: is no JSON'),
    'thresholds: other classes': (['histogan.prepare', 'data', '--quality.thresholds', 'nct'], 'class c0 is missing'),
    'quantile': (['histogan.prepare', 'data', '--quality.quantile', '2'], '--quality.quantile'),
    'stain target': (['histogan.prepare', 'data', '--stain.target', 'lost.png'], '--stain.target'),
    'encoder: no file': (['histogan.train', '--encoder', 'pathoduet:lost.pth'], 'lost.pth: no such file'),
    'encoder: no weights': (['histogan.train', '--encoder', 'cnn+timm:resnet18:text'], 'text'),
    'encoder: no folder': (['histogan.train', '--encoder', 'timm:some/folder'], 'no such folder'),
    'encoder: unknown': (['histogan.train', '--encoder', 'resnet'], 'must be one of'),
    'walk: a kind': (['histogan.generate', 'run', '--walk', 'w.jpg'], 'ends in .png or .gif'),
    'walk: no folder': (['histogan.generate', 'run', '--walk', 'lost/w.gif'], 'there is no folder lost'),
    'onnx: no folder': (['histogan.generate', 'run', '--onnx', 'lost/g.onnx'], 'there is no folder lost'),
    'bench: no folder': (['histogan.bench', '--json', 'lost/b.json'], 'there is no folder lost'),
}

@pytest.mark.parametrize('case', BAD_FILES)
def test_a_file_that_an_option_names_is_looked_at_before_any_work(case, tmp_path, monkeypatch, capsys):
    from histogan import bench, generate, prepare, train
    args, line = BAD_FILES[case]
    table(tmp_path/'data', ['a', 'b'], 3)
    (tmp_path/'text').write_text('no numbers, no weights')
    def too_late(*args, **kw): raise AssertionError('work began')
    for module, name in ((prepare, '_work'), (prepare, '_pool'), (train, 'open_patches'), (generate, 'load_generator'), (bench, 'machine')):
        monkeypatch.setattr(module, name, too_late)
    monkeypatch.chdir(tmp_path)
    data = ['--preset', 'smoke', '--data.manifest', 'data/m.csv', '--out', 'run'] if 'train' in args[0] else []
    code = {'prepare': prepare, 'train': train, 'generate': generate, 'bench': bench}[args[0].split('.')[1]].main([*args[1:], *data])
    said = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and line in said[-1] and said[-1].startswith('error: '), said

@pytest.mark.parametrize('place', ['text', 'text/deeper', 'x' * 300])
def test_a_file_where_a_folder_is_needed_is_one_line(place, tmp_path, monkeypatch, capsys):
    from histogan import generate
    from histogan.generator import Generator, GeneratorConfig
    monkeypatch.chdir(tmp_path)
    (tmp_path/'text').write_text('a file')
    G = Generator(GeneratorConfig(img_res=16, num_classes=2, z_dim=8, w_dim=8, fmap_base=16, fmap_min=8))
    G.classes = ['a', 'b']
    G.save_pretrained(tmp_path/'G')
    for option in ('--export', '--out'):
        assert generate.main(['G', '--per-class', '1', option, place]) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith('error: ') and 'choose' in line, line

@pytest.mark.parametrize('steps', [1, 2, 3, 4, 5, 9])
def test_a_training_of_any_length_has_a_schedule(steps):
    "With four steps, the warm-up of torch's cycle ended where it began: a division by zero."
    import torch
    from histogan.baseline import DownstreamConfig, fit
    from histogan.small_cnn import CNNConfig, train_cnn
    x, y = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8), torch.arange(8) % 2
    train_cnn(x.permute(0, 2, 3, 1).numpy(), y.numpy(), 2, CNNConfig(steps=steps, batch_size=4, widths=(4, 8)))
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 2))
    fit(net, ((x.float(), y) for _ in range(steps)), DownstreamConfig(steps=steps, lr=1e-3))

# ---- numbers that are none, names that are empty

@pytest.mark.parametrize('name', ['optim.lr_g', 'loss.r1_gamma', 'run.max_hours', 'optim.betas', 'ema.half_life_img'])
@pytest.mark.parametrize('value', ['nan', 'inf'])
def test_no_option_takes_what_is_no_number(name, value):
    "NaN passes every comparison that is written as a refusal."
    import json
    from dataclasses import asdict
    from histogan.config import PRESETS, Config, from_dict
    data = json.loads(json.dumps(asdict(PRESETS['smoke'])))
    part, leaf = name.split('.')
    data[part][leaf] = [float(value)] * 2 if leaf == 'betas' else float(value)
    with pytest.raises(ValueError, match=f'{leaf}|{name}'): from_dict(Config, data)

@pytest.mark.parametrize('program, args', [('train', ['--preset', 'smoke', '--out', '']), ('train', ['--preset', 'smoke', '--resume', '']), ('prepare', ['']), ('prepare', ['data', '--out', '']),
                                           ('eval', ['']), ('generate', ['']), ('generate', ['run', '--out=']), ('downstream', ['']), ('report', ['']), ('ablate', ['--out', ''])])
def test_an_unset_variable_is_not_the_working_folder(program, args, tmp_path, monkeypatch, capsys):
    import importlib
    monkeypatch.chdir(tmp_path)
    assert importlib.import_module(f'histogan.{program}').main(args) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and 'empty; name' in said[0] and not list(tmp_path.iterdir()), said

def test_a_table_that_grows_is_read_to_its_last_whole_line(tmp_path):
    "A killed run, or one under way: its last line may end in the middle of a number."
    from histogan.card import read_run
    from histogan.config import PRESETS, save_config
    from histogan.core import InputError, read_table
    save_config(PRESETS['smoke'], tmp_path/'config.json')
    (tmp_path/'metrics_gan.csv').write_text('step,d_loss\n1,0.5\n2,0.25e-')
    with pytest.raises(InputError, match='line 3'): read_table(tmp_path/'metrics_gan.csv', numbers=['d_loss'])
    assert read_run(tmp_path).log.d_loss.tolist() == [0.5]

# ---- what is not ours is not removed and not written over

def test_an_ablation_leaves_a_run_beside_it_alone(tmp_path, monkeypatch):
    "`--out outputs`, where a run lies in outputs/run."
    from histogan import ablate
    from histogan.config import PRESETS
    (tmp_path/'run').mkdir(); (tmp_path/'run'/'config.json').write_text('{}')
    def stopped(cfg): raise KeyboardInterrupt
    monkeypatch.setattr(ablate, 'train_row', stopped)
    with pytest.raises(KeyboardInterrupt): ablate.run_row(tmp_path, 'modern', PRESETS['smoke'], None, None, 1)
    assert (tmp_path/'run'/'config.json').exists()

def test_files_of_others_stay_where_a_run_begins(tmp_path):
    from histogan.core import clear_torn
    from histogan.train import claim
    (tmp_path/'artifacts').mkdir(); (tmp_path/'artifacts'/'encoder.safetensors').write_text('mine')
    for name in ('.notes.tmp', '.x.tmp'): (tmp_path/name).write_text('mine')
    claim(tmp_path)
    assert clear_torn(tmp_path) == [] and (tmp_path/'artifacts'/'encoder.safetensors').exists()
    claim(tmp_path)  # now the folder is that of a start that failed
    assert not (tmp_path/'artifacts'/'encoder.safetensors').exists()

def test_prepare_takes_no_folder_of_another_program_for_its_own(tmp_path):
    from histogan.core import InputError
    from histogan.prepare import _claim
    (tmp_path/'.part').mkdir(); _claim(tmp_path)
    (tmp_path/'.part'/'film.mkv').write_text('mine')
    with pytest.raises(InputError, match='is not empty and holds no prepared dataset'): _claim(tmp_path)
    (tmp_path/'.part'/'.lock-1').write_text(''); _claim(tmp_path)

def test_an_export_writes_over_no_other_readme(tmp_path, monkeypatch, capsys):
    from histogan import generate
    from histogan.generator import Generator, GeneratorConfig
    monkeypatch.chdir(tmp_path)
    G = Generator(GeneratorConfig(img_res=16, num_classes=2, z_dim=8, w_dim=8, fmap_base=16, fmap_min=8))
    G.classes = [0, 1]  # numbers are written as text into the card for people
    G.save_pretrained('G')
    (tmp_path/'mine').mkdir(); (tmp_path/'mine'/'README.md').write_text('mine')
    assert generate.main(['G', '--export', 'mine']) == 2 and 'README.md of something else' in capsys.readouterr().err
    assert (tmp_path/'mine'/'README.md').read_text() == 'mine' and not (tmp_path/'mine'/'generator.json').exists()
    assert [generate.main(['G', '--export', 'new']) for _ in '12'] == [0, 0]

def test_folders_of_a_mac_and_jfif_are_compared(tmp_path):
    from histogan.eval import _files
    for i in range(3): Image.fromarray(render('TUM', i, 32)).save(tmp_path/f'{i}.jfif', 'JPEG')
    (tmp_path/'._0.png').write_bytes(b'Mac OS X')
    assert len(_files(tmp_path)[0]) == 3

# ---- too much for the machine

@pytest.mark.parametrize('said', ['CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 7 GiB', "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes",
                                  'Unable to allocate 8.00 TiB for an array', '[Errno 12] Cannot allocate memory'])
def test_too_little_memory_is_one_line(said, capsys):
    from histogan.process import run_program
    def full(argv): raise RuntimeError(said)
    assert run_program(full, []) == 2
    line, = capsys.readouterr().err.strip().splitlines()
    assert line.startswith('error: not enough memory (') and 'take a smaller batch' in line
    def wrong(argv): raise RuntimeError('shapes do not fit')
    with pytest.raises(RuntimeError): run_program(wrong, [])

@pytest.mark.parametrize('option', ['run.threads', 'data.num_workers'])
def test_so_many_threads_that_none_starts(option):
    from histogan.config import PRESETS, override
    with pytest.raises(ValueError, match='1024'): override(PRESETS['smoke'], {option: 100_000})

def test_a_device_that_holds_no_numbers():
    from histogan.config import PRESETS, override, pick_device
    from histogan.core import InputError
    from histogan.generate import check_device
    for check in (lambda: pick_device(override(PRESETS['smoke'], {'run.device': 'meta'})), lambda: check_device('meta')):
        with pytest.raises(InputError, match='device meta: not available on this machine'): check()

@pytest.mark.parametrize('res', [-1, 0, 1])
def test_a_side_that_has_no_logarithm(res):
    from histogan.generator import GeneratorConfig
    with pytest.raises(ValueError, match='img_res must be a power of two'): GeneratorConfig(img_res=res)

# ---- patches that moved

def test_a_prepared_dataset_that_is_gone_is_not_replaced_by_its_sources(tmp_path, capsys):
    "The files that it was made of are there still: a resume would train on other colours, with no word."
    from dataclasses import replace
    from histogan.core import InputError
    from histogan.data import DataConfig, load_manifest, open_data, save_manifest
    from histogan.prepare import PrepareConfig, StainOptions, prepare
    from histogan.reals import told_by_run
    table(tmp_path/'data', ['a', 'b'], 12)
    prepare(PrepareConfig(str(tmp_path/'data'), out=str(tmp_path/'p'), image_size=16, workers=1, stain=StainOptions(method='none')), progress=False)
    cfg = DataConfig(root=str(tmp_path/'p'), image_size=16, batch_size=4)
    d = open_data(cfg, progress=False)
    save_manifest(d.manifest, tmp_path/'m.csv')
    (tmp_path/'p').rename(tmp_path/'q')
    kept = load_manifest(tmp_path/'m.csv')
    with pytest.raises(InputError, match='the prepared dataset that the run began with is not there; give its folder with --data.root'): open_data(cfg, kept, progress=False)
    with pytest.raises(InputError, match='with histogan.train --resume RUN --data.root FOLDER --allow-change data.root'), told_by_run('RUN'): open_data(cfg, kept, progress=False)
    again = open_data(replace(cfg, root=str(tmp_path/'q')), kept, progress=False)
    assert again.manifest.split.tolist() == kept.split.tolist()

@pytest.mark.parametrize('args', [['generate', 'run', '--seed', '9' * 20], ['train', '--preset', 'smoke', '--run.seed', '9' * 20], ['downstream', 'run', '--lr', 'nan'], ['prepare', 'data', '--mpp', 'nan']])
def test_numbers_that_no_program_can_use(args, tmp_path, monkeypatch, capsys):
    import importlib
    monkeypatch.chdir(tmp_path)
    assert importlib.import_module(f'histogan.{args[0]}').main(args[1:]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and args[-2].lstrip('-') in said[0], said

# ---- the log of a run after somebody had it in a spreadsheet

def test_a_log_that_was_saved_again_or_lost(tmp_path, capsys):
    from histogan.core import InputError
    from histogan.log import continue_events, continue_table
    from histogan.step import COLUMNS
    log, row = tmp_path/'metrics_gan.csv', lambda k: ','.join(str(k) if c == 'step' else '' for c in COLUMNS) + '\n'
    whole = ','.join(COLUMNS) + '\n' + row(1) + row(2)
    log.write_bytes(whole.replace('\n', '\r\n').encode())
    assert continue_table(log, 2) == COLUMNS and log.read_text() == whole and capsys.readouterr().err == ''
    continue_table(log, 5)
    assert 'ends at step 2, the checkpoint is of step 5' in capsys.readouterr().err
    log.unlink()
    continue_table(log, 0)
    assert capsys.readouterr().err == ''
    for line, right in (('{"step": "3"}', True), ('[1]', False), ('{}', False), ('{"step": "three"}', False)):
        (tmp_path/'events.jsonl').write_text(line + '\n')
        if right: continue_events(tmp_path/'events.jsonl', 9)
        else:
            with pytest.raises(InputError, match='line 1: damaged'): continue_events(tmp_path/'events.jsonl', 9)

def test_a_table_that_replaced_the_phantom_is_not_looked_for_below_it(tmp_path, monkeypatch, capsys):
    from dataclasses import replace
    from histogan.config import PRESETS
    from histogan.data import DataConfig, open_data, save_manifest
    from histogan.train import open_patches
    m = table(tmp_path/'data', ['a', 'b'], 12)
    data = replace(PRESETS['smoke'].data, root='phantom', manifest=str(m), image_size=16, batch_size=4)
    (tmp_path/'run'/'artifacts').mkdir(parents=True)
    save_manifest(open_data(data, progress=False).manifest, tmp_path/'run'/'artifacts'/'manifest.csv')
    capsys.readouterr()
    open_patches(replace(PRESETS['smoke'], data=data, out=str(tmp_path/'run')), tmp_path/'run', resume=True)
    assert 'phantom' not in capsys.readouterr().err

def test_a_field_that_is_misspelt_is_not_allowed_to_change(tmp_path):
    from histogan.config import PRESETS, parse_args, save_config
    from histogan.core import InputError
    save_config(PRESETS['smoke'], tmp_path/'config.json')
    with pytest.raises(InputError, match="--allow-change run.stepz: no such field; did you mean 'run.steps'"): parse_args(['--resume', str(tmp_path), '--allow-change', 'run.stepz'])

@pytest.mark.parametrize('change', [dict(version=99), dict(classes=['a']), dict(classes=['a', 'a']), dict(classes=None), dict(classes=[0, 1])])
def test_a_card_that_somebody_wrote_by_hand(change, tmp_path):
    from histogan.core import InputError
    from histogan.generator import Generator, GeneratorConfig
    G = Generator(GeneratorConfig(img_res=16, num_classes=2, z_dim=8, w_dim=8, fmap_base=16, fmap_min=8))
    G.classes = ['a', 'b']
    G.save_pretrained(tmp_path)
    card = json.loads((tmp_path/'generator.json').read_text()) | change
    (tmp_path/'generator.json').write_text(json.dumps(card))
    if change == dict(classes=[0, 1]): assert Generator.from_pretrained(tmp_path).classes == ['0', '1']
    else:
        with pytest.raises(InputError, match='not a generator of this version'): Generator.from_pretrained(tmp_path)
