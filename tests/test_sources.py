"Other people's folders, tables, files and arrays: read, or told in one line what they are."
import io, os, shutil, unicodedata
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

import histogan.images
from histogan.arrays import list_arrays, open_array
from histogan.data import DataConfig, HistoDataset, open_data
from histogan.images import MIN_SIDE, read_rgb, resize
from histogan.folders import added_since, is_own, mark_cache, scan
from histogan.manifest import load_manifest, save_manifest
from histogan.core import InputError
from conftest import run_cli, run_python

def tissue(seed, px=64):
    rng = np.random.default_rng(seed)
    a = gaussian_filter(rng.normal(size=(px, px, 3)), (px/24, px/24, 0), mode='wrap')
    return (150 + 45*a/a.std()).clip(0, 255).astype(np.uint8)

def fill(root, seed=0, px=32, **counts):
    for c, (label, n) in enumerate(counts.items()):
        (root/label).mkdir(parents=True)
        for i in range(n): Image.fromarray(tissue(1000*seed + 100_000*c + i, px)).save(root/label/f'{label}-{i:04}.png')
    return root

def says(call, *args, **kw):
    "The one line of an `InputError`."
    with pytest.raises(InputError) as e: call(*args, **kw)
    line = str(e.value)
    assert line and '\n' not in line
    return line

def table(path, rows, header='path,label,split,group', sep=',', encoding='utf-8', end='\n'):
    path.write_bytes((header + end + ''.join(sep.join(r) + end for r in rows)).encode(encoding))
    return path

SMALL = dict(image_size=16, batch_size=4, samples_per_class=4)

@pytest.fixture
def toy(tmp_path): return fill(tmp_path/'toy', TUM=12, STR=12)

@pytest.fixture
def rows(toy):
    return [[f'toy/{l}/{l}-{i:04}.png', l, ('train', 'train', 'val', 'test')[i % 4], f'p{i//2}'] for l in ('TUM', 'STR') for i in range(12)]

# ---- what looks like classes and is not

def test_splits_are_not_classes(tmp_path):
    for s in ('train', 'Test_set'): fill(tmp_path/'r'/s, TUM=3, STR=3)
    line = says(scan, tmp_path/'r')
    assert 'splits, not classes' in line and f'--data.root {tmp_path/"r"/"train"}' in line and '--data.test-root' in line and 'STR' in line

def test_one_wrapper_folder(tmp_path):
    fill(tmp_path/'r'/'NCT-CRC-HE-100K', TUM=3, STR=3)
    line = says(scan, tmp_path/'r')
    assert 'holds one folder, NCT-CRC-HE-100K' in line and f'give {tmp_path/"r"/"NCT-CRC-HE-100K"}' in line

def test_split_words_with_images_in_them_are_warned_about(tmp_path, capsys):
    assert scan(fill(tmp_path/'r', train=3, tumour=3)).label.nunique() == 2
    assert 'look like splits' in capsys.readouterr().err

def test_organs_above_classes(tmp_path, capsys):
    for organ in ('breast', 'colon'): fill(tmp_path/'r'/organ, normal=3, tumour=3)
    assert sorted(set(scan(tmp_path/'r').label)) == ['breast', 'colon']
    assert 'every class (breast | colon) holds the folders normal | tumour' in capsys.readouterr().err

def test_one_class_with_images_in_it_is_a_class(tmp_path, capsys):
    assert len(scan(fill(tmp_path/'r', A=5))) == 5 and capsys.readouterr().err == ''

def test_the_classes_found_are_always_printed(toy, capsys):
    open_data(DataConfig(root=str(toy), **SMALL))
    assert f'2 classes in {toy}: STR 12, TUM 12' in capsys.readouterr().out

def test_own_output_is_no_class(toy, capsys):
    before = scan(toy)
    for name, files in {'outputs/smoke': ('config.json', 'checkpoints/x.pt', 'samples/step.png'), 'store': ('prepare.json', 'a.png'), 'half': ('.part/plan.json', 'a.png'),
                        'begun/run': ('samples/step.png', 'checkpoints/.x', 'artifacts/grid.png', 'metrics/x'), 'drawn': ('generate.json', 'TUM/a.png'),
                        'exported': ('generator.json', 'README.md'), 'table': ('ablation.csv', 'ablation_grids.jpg', 'grids/a.png'),
                        'made': ('patches.csv', 'TUM/a.png'), 'TUM/inner': ('config.json', 'artifacts/grid.png')}.items():
        for f in files: (toy/name/f).parent.mkdir(parents=True, exist_ok=True); Image.fromarray(tissue(1)).save(toy/name/f, format='PNG')
    mark_cache(toy/'outputs/cache'); (toy/'outputs/cache/X').mkdir(); Image.fromarray(tissue(1)).save(toy/'outputs/cache/X/a.png')
    assert scan(toy).equals(before) and is_own(toy/'made') and not is_own(toy)
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and all(w in err for w in ('left out what histogan wrote', '(run)', '(prepared dataset)', '(samples)', '(generator)')), err
    assert all(is_own(toy/name) for name in ('begun/run', 'drawn', 'exported', 'table', 'half', 'store'))

def test_a_first_run_in_the_patches_own_folder(toy):
    "The folder of a run is there before its patches are looked for."
    run = run_cli(['histogan.train', '--preset', 'smoke', '--data.root', '.', '--data.image-size', '16', '--run.steps', '1', '--run.n-eval', '18'], cwd=toy)
    assert run.rc == 0 and '2 classes in .: STR 12, TUM 12' in run.out and 'outputs (run)' not in run.out, run.err

def test_files_below_the_folder_that_was_given_are_where_it_says(toy, tmp_path, capsys):
    "One class: the folder that its files share is below the root, not another place."
    one = scan(toy).query('label == "TUM"').assign(split='train', root=0)
    path = save_manifest(one, tmp_path/'m.csv')
    assert len(load_manifest(path, toy)) == 12 and capsys.readouterr().err == ''
    fill(tmp_path/'other', TUM=1)
    load_manifest(path, tmp_path/'other')
    assert 'its files are not below --data.root' in capsys.readouterr().err

def test_wrappers_within_wrappers(tmp_path):
    fill(tmp_path/'r'/'download'/'v2'/'NCT-CRC-HE-100K', TUM=3, STR=3)
    assert f'give {tmp_path/"r/download/v2/NCT-CRC-HE-100K"}' in says(scan, tmp_path/'r')
    (tmp_path/'s'/'loop').mkdir(parents=True); (tmp_path/'s'/'loop'/'again').symlink_to('.')
    assert 'without images' in says(scan, tmp_path/'s')

def test_a_class_that_is_a_link_to_what_is_gone_is_not_lost_in_silence(toy):
    (toy/'LYM').symlink_to('/another/disk/LYM')
    assert f'{toy/"LYM"}: is a link to /another/disk/LYM, which does not exist' in says(scan, toy)
    (toy/'LYM').unlink()
    (toy/'TUM'/'more').symlink_to('/another/disk/more'); (toy/'STR'/'notes.txt').symlink_to('/gone')
    assert len(scan(toy)) == 25
    assert 'is a link to /another/disk/more' in says(open_data, DataConfig(root=str(toy), **SMALL), progress=False)

def test_what_a_mac_leaves_in_a_zip_is_no_class(toy):
    before = scan(toy)
    for name in ('__MACOSX/TUM/._a.png', 'TUM/__MACOSX/._a.png', 'TUM/._a.png', '.DS_Store'):
        (toy/name).parent.mkdir(parents=True, exist_ok=True); (toy/name).write_bytes(b'Mac')
    assert scan(toy).equals(before)

def test_what_systems_leave_is_no_class_and_no_patch(toy):
    "A network disk keeps a thumbnail of every picture, named as a picture."
    before = scan(toy)
    for name in ('TUM/@eaDir/TUM-0000.png/SYNOPHOTO_THUMB_M.jpg', '@eaDir/x/SYNOPHOTO_THUMB_M.jpg', '$RECYCLE.BIN/S-1/a.png', 'TUM/.ipynb_checkpoints/a.png'):
        (toy/name).parent.mkdir(parents=True, exist_ok=True); Image.fromarray(tissue(1)).save(toy/name)
    for name in ('lost+found', 'System Volume Information'): (toy/name).mkdir()
    assert scan(toy).equals(before)

def test_a_users_own_list_of_patches_is_no_output(toy, capsys):
    before = scan(toy)
    for label in ('TUM', 'STR'): (toy/label/'patches.csv').write_text('path')
    assert scan(toy).equals(before) and capsys.readouterr().err == ''
    for p in (toy/'TUM').glob('*.png'): p.rename(toy/'TUM'/f'cnn-{p.name}')  # as an old cache was called
    (toy/'TUM'/'patches.csv').unlink()
    assert len(scan(toy)) == 24 and capsys.readouterr().err == ''

def test_a_pipe_is_not_waited_for(toy):
    if not hasattr(os, 'mkfifo'): pytest.skip('this system has no named pipes')
    os.mkfifo(toy/'TUM'/'pipe'); os.mkfifo(toy/'TUM'/'pipe.png')
    assert len(scan(toy)) == 25
    assert 'pipe.png: is not a regular file' in says(open_data, DataConfig(root=str(toy), **SMALL), progress=False)

# ---- links and kinds of file

def test_a_link_upwards_adds_nothing(toy, capsys):
    before = scan(toy)
    (toy/'TUM'/'back').symlink_to('..'); (toy/'STR'/'other').symlink_to(toy/'TUM'); (toy/'up').symlink_to('..')
    assert scan(toy).equals(before)
    assert 'a link to a folder above it or to another class' in capsys.readouterr().err

def test_a_link_to_nowhere_is_listed_and_refused_by_name(toy):
    (toy/'TUM'/'x.png').symlink_to('/nowhere/x.png')
    assert len(scan(toy)) == 25
    assert 'is a link to /nowhere/x.png, which does not exist' in says(open_data, DataConfig(root=str(toy), **SMALL), progress=False)

def test_one_picture_under_two_labels(toy, capsys):
    shutil.copy(toy/'TUM/TUM-0000.png', toy/'STR/again.png')
    open_data(DataConfig(root=str(toy), **SMALL), progress=False)
    assert '1 pictures stand under two labels' in capsys.readouterr().err

@pytest.mark.parametrize('name', ['x.jp2', 'x.gif', 'x.svs', 'x.ndpi', 'x.npy', 'x.dcm', 'x.HEIC', 'x.zip', 'nameless'])
def test_other_kinds_are_named(toy, name, capsys):
    before = scan(toy)
    (toy/'TUM'/name).write_bytes(b'\x89PNG\r\n\x1a\n' + bytes(200))
    (toy/'TUM'/'notes.txt').write_text('x'); (toy/'TUM'/'README').write_text('x')
    assert scan(toy).equals(before)
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and '1 files of kinds that are not read' in err and name in err

def test_a_class_of_other_kinds_alone(toy):
    (toy/'MUC').mkdir(); (toy/'MUC/a.svs').write_bytes(b'x')
    assert 'without images that can be read (.svs 1)' in says(scan, toy)

def test_jfif_is_a_jpeg(toy):
    Image.fromarray(tissue(5)).save(toy/'TUM/a.jfif', 'JPEG')
    assert len(scan(toy)) == 25 and read_rgb(toy/'TUM/a.jfif').shape == (64, 64, 3)

# ---- damage that decodes

def jpeg(a, **kw):
    out = io.BytesIO(); Image.fromarray(a).save(out, 'JPEG', **({'quality': 92} | kw)); return out.getvalue()

WAYS = dict(plain={}, progressive=dict(progressive=True), optimised=dict(optimize=True), full_colour=dict(subsampling=0), restarts=dict(restart_marker_rows=1))

@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('share', [.3, .6, .9])
def test_a_jpeg_that_was_cut_and_closed(way, share, tmp_path):
    whole = jpeg(tissue(3, 224), **WAYS[way]); f = tmp_path/'x.jpg'
    f.write_bytes(whole[:int(len(whole)*share)] + b'\xff\xd9')
    Image.open(f).load()  # silent: the decoder fills what is missing
    assert 'cut off, then closed' in says(read_rgb, f)
    f.write_bytes(whole); read_rgb(f)

@pytest.mark.parametrize('way', WAYS)
def test_zeros_in_a_jpeg(way, tmp_path):
    whole = jpeg(tissue(4, 224), **WAYS[way]); f = tmp_path/'x.jpg'
    for n, at in ((64, .5), (512, .4), (2048, .6)):
        k = int(len(whole)*at); f.write_bytes(whole[:k] + bytes(n) + whole[k + n:])
        assert 'x.jpg' in says(read_rgb, f)

@pytest.mark.parametrize('kw', [*WAYS.values(), dict(quality=50), dict(quality=100)])
def test_glass_and_one_colour_are_not_damaged(kw, tmp_path):
    for k, a in enumerate([*(np.full((224, 224, 3), v, np.uint8) for v in (0, 128, 243, 255)),
                           *(np.random.default_rng(s).normal(240, s, (224, 224, 3)).clip(0, 255).astype(np.uint8) for s in (0, 1, 3))]):
        (tmp_path/'x.jpg').write_bytes(jpeg(a, **kw)); read_rgb(tmp_path/'x.jpg')

def test_lost_sectors_and_checksums(tmp_path):
    a = tissue(6, 224)
    for name, kw in (('x.png', {}), ('x.tif', {}), ('x.bmp', {}), ('l.tif', dict(compression='tiff_lzw')), ('x.webp', dict(quality=90))):
        Image.fromarray(a).save(tmp_path/name, **kw); read_rgb(tmp_path/name)
        b = (tmp_path/name).read_bytes(); k = len(b)//1024*512
        (tmp_path/name).write_bytes(b[:k] + bytes(512) + b[k + 512:])
        assert name in says(read_rgb, tmp_path/name)

def test_no_false_alarm_on_real_patches(shared):
    files = [p for p in (shared/'data').rglob('*') if p.suffix in ('.jpg', '.png', '.webp', '.tif')][::9]
    for p in files: read_rgb(p)
    assert len(files) > 300

# ---- tables

@pytest.mark.parametrize('how', [dict(sep=';', header='path;label;split;group'), dict(sep='\t', header='path\tlabel\tsplit\tgroup'), dict(sep=', ', header='path, label, split, group'),
                                 dict(header='Path,LABEL,Split,Group'), dict(encoding='utf-8-sig'), dict(encoding='utf-16'), dict(end='\r\n'), dict(end='\r')])
def test_tables_of_other_programs(rows, tmp_path, how):
    df = load_manifest(table(tmp_path/'m.csv', rows, **how))
    assert df.label.value_counts().to_dict() == dict(TUM=12, STR=12) and df.columns.tolist()[:4] == ['path', 'label', 'split', 'group']

def test_separators_at_the_ends_of_lines(rows, tmp_path):
    line = says(load_manifest, table(tmp_path/'m.csv', [[*r, ''] for r in rows]))
    assert 'rows have 5 fields, the header 4' in line and 'm.csv' in line
    assert load_manifest(table(tmp_path/'m.csv', [[*r, ''] for r in rows], 'path,label,split,group,')).shape[0] == 24

def test_labels_with_blanks_and_two_spellings(rows, tmp_path, capsys):
    odd = [[r[0], r[1] + ' '*(i % 2), r[2].title() + ' ', r[3]] for i, r in enumerate(rows)]
    assert set(load_manifest(table(tmp_path/'m.csv', odd)).label) == {'TUM', 'STR'}
    assert "taken as one class, TUM" in capsys.readouterr().err
    two = [[r[0], unicodedata.normalize('NFC' if i % 2 else 'NFD', 'größe') if r[1] == 'TUM' else r[1], *r[2:]] for i, r in enumerate(rows)]
    assert set(load_manifest(table(tmp_path/'m.csv', two)).label) == {'größe', 'STR'}
    assert 'how accents are written' in capsys.readouterr().err

@pytest.mark.parametrize('line', ['sep=;', 'SEP=;', '"sep=;"'])
def test_the_first_line_of_excel(rows, tmp_path, line):
    (tmp_path/'m.csv').write_text('\n'.join([line, 'path;label;split;group', *(';'.join(r) for r in rows)]))
    assert len(load_manifest(tmp_path/'m.csv')) == 24

@pytest.mark.parametrize('two', [('TUM', 'tum'), ('TUM', 'TUM.'), ('①', '1'), ('a\u200bb', 'ab')])
def test_labels_that_look_alike_are_said(rows, tmp_path, capsys, two):
    names = dict(zip(('TUM', 'STR'), two))
    t = table(tmp_path/'m.csv', [[r[0], names[r[1]], *r[2:]] for r in rows])
    d = open_data(DataConfig(manifest=str(t), **SMALL), progress=False)
    assert set(d.classes) == set(two) and capsys.readouterr().err.count('taken as 2 classes, though they look alike') == 1

@pytest.mark.parametrize('end', ['\n', '\r\n', '\t', '\x1b', '\u2028'])
def test_a_label_is_one_line(rows, tmp_path, end):
    df = load_manifest(table(tmp_path/'m.csv', [[r[0], f'"in{end}situ"' if r[1] == 'TUM' else r[1], *r[2:]] for r in rows]))
    assert set(df.label) == {'in situ', 'STR'}

def test_one_file_under_two_spellings(rows, tmp_path):
    for again in ('./' + rows[0][0], rows[0][0].replace('/TUM/', '/STR/../TUM/')):
        assert 'twice; remove one' in says(load_manifest, table(tmp_path/'m.csv', [*rows, [again, 'STR', 'train', '']]))

def test_paths_of_windows_joined_by_hand(rows, tmp_path):
    assert len(load_manifest(table(tmp_path/'m.csv', [[r[0].replace('/', '\\', 1), *r[1:]] for r in rows]))) == 24

def test_no_patient_is_not_one_patient_in_silence(rows, tmp_path, capsys):
    t = table(tmp_path/'m.csv', [[*r[:3], 'NA'] for r in rows])
    open_data(DataConfig(manifest=str(t), **SMALL), progress=False)
    assert "24 patches have the group 'NA' and are taken for one patient; leave the cell empty" in capsys.readouterr().err

def test_accents_in_file_names(tmp_path):
    (tmp_path/unicodedata.normalize('NFD', 'größe')).mkdir()
    Image.fromarray(tissue(1)).save(tmp_path/unicodedata.normalize('NFD', 'größe')/'a.png')
    df = load_manifest(table(tmp_path/'m.csv', [[unicodedata.normalize('NFC', 'größe/a.png'), 'A', 'train', '']]))
    assert os.path.isfile(df.path[0])

def test_labels_are_text_and_no_paths(rows, tmp_path):
    names = {'TUM': '001', 'STR': '../NA'}
    df = load_manifest(table(tmp_path/'m.csv', [[r[0], names[r[1]], *r[2:]] for r in rows]))
    save_manifest(df, tmp_path/'n.csv')
    assert load_manifest(tmp_path/'n.csv').label.tolist() == df.label.tolist() == [names[r[1]] for r in rows]

# ---- one base, written down

def test_one_base_for_a_whole_table(tmp_path, monkeypatch):
    "Half of the files below the working folder, half beside the table: neither is the base."
    (tmp_path/'here').mkdir(); (tmp_path/'there').mkdir()
    fill(tmp_path/'here', A=4); fill(tmp_path/'there', B=2)
    t = table(tmp_path/'there'/'m.csv', [[f'{l}/{l}-{i:04}.png', l, 'train', ''] for l, n in (('A', 4), ('B', 2)) for i in range(n)])
    monkeypatch.chdir(tmp_path/'here')
    line = says(load_manifest, t)
    assert f'{tmp_path/"there"} (2 found)' in line and f'{tmp_path/"here"} (4 found)' in line and 'one base for all of them' in line
    shutil.copytree(tmp_path/'here'/'A', tmp_path/'there'/'A')
    assert all(p.startswith(str(tmp_path/'there')) for p in load_manifest(t).path)  # its own folder comes first

def test_a_root_that_is_not_used_is_said(rows, tmp_path, capsys):
    (tmp_path/'empty').mkdir()
    assert len(load_manifest(table(tmp_path/'m.csv', rows), tmp_path/'empty')) == 24
    assert 'are not below --data.root' in capsys.readouterr().err

def test_a_run_and_its_patches_move(toy, tmp_path):
    (tmp_path/'disk').mkdir(); shutil.move(toy, tmp_path/'disk'/'toy')
    d = open_data(DataConfig(root=str(tmp_path/'disk'/'toy'), **SMALL), progress=False)
    (tmp_path/'disk/run/artifacts').mkdir(parents=True); m = tmp_path/'disk/run/artifacts/manifest.csv'
    save_manifest(d.manifest, m)
    assert not any(os.path.isabs(p) for p in pd.read_csv(m).path)
    (tmp_path/'disk').rename(tmp_path/'other'); m = tmp_path/'other/run/artifacts/manifest.csv'
    assert all(map(os.path.isfile, load_manifest(m).path))  # both moved together
    (tmp_path/'other'/'toy').rename(tmp_path/'new name')
    assert 'give their folder with --data.root' in says(load_manifest, m)
    back = load_manifest(m, tmp_path/'new name')
    again = open_data(DataConfig(root=str(tmp_path/'new name'), **SMALL), manifest=back, progress=False)
    assert again.manifest.split.tolist() == d.manifest.split.tolist()

def test_two_roots_move_apart(toy, tmp_path):
    second = fill(tmp_path/'second', 1, TUM=6, STR=6)
    d = open_data(DataConfig(root=str(toy), test_root=str(second), **SMALL), progress=False)
    save_manifest(d.manifest, tmp_path/'m.csv')
    toy.rename(tmp_path/'a'); second.rename(tmp_path/'b')
    back = load_manifest(tmp_path/'m.csv', tmp_path/'a', test_root=tmp_path/'b')
    assert [os.path.basename(p) for p in back.path] == [os.path.basename(p) for p in d.manifest.path] and all(map(os.path.isfile, back.path))

def test_absolute_manifests_of_older_runs(toy, tmp_path):
    d = open_data(DataConfig(root=str(toy), **SMALL), progress=False).manifest.drop(columns=['size', 'mtime_ns'])
    d.to_csv(tmp_path/'m.csv', index=False)
    assert load_manifest(tmp_path/'m.csv').path.tolist() == d.path.tolist()
    toy.rename(tmp_path/'moved')
    back = load_manifest(tmp_path/'m.csv', tmp_path/'moved')
    assert back.unit.tolist() == d.unit.tolist()
    open_data(DataConfig(root=str(tmp_path/'moved'), **SMALL), manifest=back, progress=False)

# ---- what the patches are

def test_a_manifest_replaces_the_phantom(rows, tmp_path):
    cfg = DataConfig(root='phantom', manifest=str(table(tmp_path/'m.csv', rows)), **SMALL)
    assert (cfg.source, cfg.is_phantom, cfg.folder) == ('manifest', False, '')
    d = open_data(cfg, progress=False)
    assert d.classes == ['STR', 'TUM'] and d.manifest.group.nunique() == 6  # the groups of the table
    assert DataConfig(root='phantom').is_phantom and not DataConfig(root='a').is_phantom
    assert '--data.test-root' in says(open_data, DataConfig(root='phantom', test_root='x'), progress=False)

def test_smallest_patch(tmp_path, toy):
    for w, h in ((1, 1), (128, 4), (15, 64)):
        Image.fromarray(tissue(1, 128)[:h, :w]).save(toy/'TUM/x.png')
        assert f'is {w} x {h} px, too small: at least {MIN_SIDE} x {MIN_SIDE}' in says(read_rgb, toy/'TUM/x.png')

def test_few_patches_are_said(tmp_path, capsys):
    d = open_data(DataConfig(root=str(fill(tmp_path/'r', A=7, B=7)), **SMALL), progress=False)
    assert len(d.classes) == 2 and 'fewer than 8 training patches (A 5 | B 5)' in capsys.readouterr().err

def test_what_was_added_is_said_on_resume(toy, capsys):
    cfg = DataConfig(root=str(toy), **SMALL); kept = open_data(cfg, progress=False).manifest; capsys.readouterr()
    fill(toy, 5, MUC=4); Image.fromarray(tissue(99)).save(toy/'TUM/new.png')
    assert added_since(toy, kept) == (['MUC'], 1)
    again = open_data(cfg, manifest=kept, progress=False)
    err = capsys.readouterr().err
    assert again.classes == ['STR', 'TUM'] and 'the class folders MUC were added after the run began' in err and '1 patches were added' in err

# ---- decoded once

@pytest.fixture
def decoded(monkeypatch):
    count, real = [], histogan.images._decode
    monkeypatch.setattr(histogan.images, '_decode', lambda path, check=True: count.append(path) or real(path, check))
    return count

def test_a_resume_and_the_other_processes_decode_nothing(toy, tmp_path, decoded):
    cfg = DataConfig(root=str(toy), **SMALL); cache = tmp_path/'cache'
    first = open_data(cfg, progress=False, cache_dir=cache, world=2); assert len(decoded) == 24; decoded.clear()
    second = open_data(cfg, progress=False, cache_dir=cache, rank=1, world=2)
    later = open_data(cfg, first.manifest, progress=False, cache_dir=cache)
    assert decoded == [] and is_own(cache)
    assert second.manifest.astype(str).equals(first.manifest.astype(str))
    plain = open_data(cfg, progress=False)
    for d in (first, second, later): assert (d.images[np.arange(24)] == plain.images).all()

def test_a_file_that_looks_new_is_decoded_and_one_that_is_new_refused(toy, tmp_path, decoded):
    cfg = DataConfig(root=str(toy), **SMALL); kept = open_data(cfg, progress=False, cache_dir=tmp_path/'cache').manifest
    open_data(cfg, kept, progress=False, cache_dir=tmp_path/'cache'); decoded.clear()
    os.utime(kept.path[3], ns=(1, 1)); open_data(cfg, kept, progress=False)
    assert decoded.count(kept.path[3]) == 2 and len(decoded) == 25  # looked at again, then all decoded: no cache
    Image.fromarray(tissue(77, 32)).save(kept.path[3])
    assert '1 of 24 patches have changed' in says(open_data, cfg, kept, progress=False, cache_dir=tmp_path/'cache')

@pytest.mark.parametrize('start', ['spawn', 'forkserver'])
def test_workers_map_the_cache_themselves(toy, tmp_path, start):
    done = run_python(['-c', f'''
import torch
from histogan.data import DataConfig, open_data
if __name__ == "__main__":
    d = open_data(DataConfig(root={str(toy)!r}, num_workers=1, **{SMALL!r}), progress=False, cache_dir={str(tmp_path/"cache")!r})
    d.train.multiprocessing_context = {start!r}
    print(sum(len(y) for _, y, _ in d.train))'''])
    assert done.rc == 0 and done.out.strip() == '8', done

# ---- magnification

def test_mpp_of_option_table_and_file(toy, rows, tmp_path, capsys):
    assert np.isnan(open_data(DataConfig(root=str(toy), **SMALL), progress=False).mpp)
    assert open_data(DataConfig(root=str(toy), mpp=.5, **SMALL), progress=False).mpp == 1.  # 32 px files at 16 px
    t = table(tmp_path/'m.csv', [[*r, '0.25'] for r in rows], 'path,label,split,group,mpp')
    assert open_data(DataConfig(manifest=str(t), **SMALL), progress=False).mpp == .5
    for p in sorted(toy.rglob('*.png')): im = Image.open(p); im.load(); im.save(p, dpi=(101_600, 101_600))
    d = open_data(DataConfig(root=str(toy), mpp=2., **SMALL), progress=False)
    assert d.mpp == .5 and set(d.manifest.mpp) == {.25}  # the files know better
    capsys.readouterr()
    mixed = table(tmp_path/'x.csv', [[*r, '0.5' if i % 2 else '0.25'] for i, r in enumerate(rows)], 'path,label,split,group,mpp')
    for p in sorted(toy.rglob('*.png')): im = Image.open(p); im.load(); im.save(p, dpi=(72, 72))
    open_data(DataConfig(manifest=str(mixed), **SMALL), progress=False)
    assert 'different magnification' in capsys.readouterr().err
    assert 'which holds µm per pixel' in says(load_manifest, table(tmp_path/'y.csv', [[*r, '40x'] for r in rows], 'path,label,split,group,mpp'))

# ---- arrays

def medmnist(path, n=12, px=28, save=np.savez, **change):
    x = np.stack([tissue(k, px) for k in range(3*n)])
    arrays = {f'{s}_{w}': a[i*n:(i + 1)*n] for i, s in enumerate(('train', 'val', 'test')) for w, a in (('images', x), ('labels', np.arange(3*n)[:, None] % 9))}
    save(path, **(arrays | change)); return x

@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
def test_medmnist_layout(tmp_path, save, monkeypatch):
    monkeypatch.setenv('TMPDIR', str(tmp_path)); monkeypatch.setattr('tempfile.tempdir', None)
    x = medmnist(tmp_path/'pathmnist.npz', save=save)
    df = scan(tmp_path/'pathmnist.npz')
    assert df.label[:9].tolist() == 'ADI BACK DEB LYM MUC MUS NORM STR TUM'.split() and df.split.value_counts().to_dict() == dict(train=12, val=12, test=12)
    assert (read_rgb(df.path[17]) == x[17]).all()
    d = open_data(DataConfig(root=str(tmp_path/'pathmnist.npz'), **SMALL), progress=False)
    assert (d.images[20] == resize(x[20], 16)).all() and d.manifest.split.equals(df.split)
    save_manifest(d.manifest, tmp_path/'m.csv'); (tmp_path/'b').mkdir()
    shutil.move(tmp_path/'pathmnist.npz', tmp_path/'b'/'pathmnist.npz')
    again = open_data(DataConfig(root=str(tmp_path/'b'/'pathmnist.npz'), **SMALL), load_manifest(tmp_path/'m.csv', tmp_path/'b'), progress=False)
    assert (again.images == d.images).all()
    uncached = HistoDataset(d.manifest, d.classes, 16)
    assert (uncached.pixels(np.array([5])) == d.images[5]).all()

def test_names_of_an_arrays_classes(tmp_path, capsys):
    medmnist(tmp_path/'mine.npz')
    assert scan(tmp_path/'mine.npz').label[0] == '0' and '--data.class-names' in capsys.readouterr().err
    d = open_data(DataConfig(root=str(tmp_path/'mine.npz'), class_names='a, b,c,d,e,f,g,h,i', **SMALL), progress=False)
    assert d.classes == list('abcdefghi')
    assert '2 names for labels up to 8' in says(scan, tmp_path/'mine.npz', class_names=['a', 'b'])

X, Y = np.stack([tissue(k, 28) for k in range(12)]), np.arange(12)[:, None] % 2
@pytest.mark.parametrize('change,word', [
    (dict(train_images=X[..., 0]), 'not (N, H, W, 3) uint8'), (dict(train_images=X/255.), 'not (N, H, W, 3) uint8'), (dict(train_labels=Y[:5]), 'not one label for each of 12'),
    (dict(train_labels=np.repeat(Y, 14, 1)), 'not one label for each'), (dict(train_labels=Y - 1), 'negative labels'), (dict(train_labels=Y + .5), 'not whole numbers'),
    (dict(train_labels=np.array(['TUM', 'STR']*6)), 'give their names with --data.class-names'), (dict(train_labels=np.array(['2024-01-01']*12, 'M8[D]')), 'not whole numbers'),
    (dict(train_labels=np.where(Y, np.nan, 1.)), 'not whole numbers'), (dict(train_labels=np.where(Y, np.inf, 1.)), 'not whole numbers'), (dict(train_labels=3), 'not one label for each'), (dict(train_labels=Y[:0]), 'not one label for each'), (dict(train_images=np.array([None, 1], object)), 'pickled objects, which are never loaded'), (dict(train_images=X[:0], train_labels=Y[:0]), 'holds no patch')])
def test_arrays_that_are_refused(tmp_path, change, word):
    medmnist(tmp_path/'x.npz', **change); open_array.cache_clear()
    assert word in says(list_arrays, tmp_path/'x.npz')

def test_names_for_classes_that_have_theirs(toy, rows, tmp_path):
    "An option that would be ignored is refused."
    assert 'as its folders; leave it out' in says(open_data, DataConfig(root=str(toy), class_names='a,b', **SMALL), progress=False)
    assert 'a table names its classes' in says(open_data, DataConfig(manifest=str(table(tmp_path/'m.csv', rows)), class_names='a,b', **SMALL), progress=False)

def test_numbers_far_apart_are_two_names(tmp_path):
    "Numbers of patients, perhaps: a list up to the largest would fill the memory."
    np.savez(tmp_path/'x.npz', train_images=X, train_labels=np.where(Y, 10**9, 3))
    assert set(scan(tmp_path/'x.npz').label) == {'0000000003', '1000000000'}
    assert 'names a twice' in says(scan, medmnist_of(tmp_path/'y.npz'), class_names=['a', 'a'])

def test_a_hole_in_a_download(tmp_path):
    "Arrays that lie in a file uncompressed are mapped, so nothing else would read their checksum."
    b = bytearray(medmnist_of(tmp_path/'x.npz').read_bytes()); k = len(b)//3
    b[k:k + 4096] = bytes(4096); (tmp_path/'x.npz').write_bytes(b)
    assert "is damaged (Bad CRC-32 for file 'train_images.npy')" in says(scan, tmp_path/'x.npz')

def medmnist_of(path):
    np.savez(path, train_images=X, train_labels=Y)
    return path

@pytest.mark.parametrize('which', ['x', 'y'])
def test_a_group_where_an_array_should_be(tmp_path, which):
    h5py = pytest.importorskip('h5py')
    for key, a in (('x', X), ('y', Y)):
        with h5py.File(tmp_path/f't_{key}.h5', 'w') as f: f.create_group(key) if key == which else f.create_dataset(key, data=a)
    assert f'has no array {which} (found: {which})' in says(scan, tmp_path)

def test_files_that_are_no_arrays(tmp_path):
    np.savez(tmp_path/'x.npz', pictures=X); assert 'holds the arrays pictures' in says(scan, tmp_path/'x.npz')
    np.savez(tmp_path/'y.npz', train_images=X); assert 'has no array train_labels' in says(scan, tmp_path/'y.npz')
    (tmp_path/'z.npz').write_bytes(b'PK\3\4 broken'); assert 'no readable file of arrays' in says(scan, tmp_path/'z.npz')
    assert 'no such file' in says(scan, tmp_path/'none.npz')
    (tmp_path/'r').mkdir(); shutil.copy(tmp_path/'x.npz', tmp_path/'r')
    assert 'name the file itself' in says(scan, tmp_path/'r')

def test_patchcamelyon_layout(tmp_path):
    h5py = pytest.importorskip('h5py')
    for k, s in enumerate(('train', 'valid', 'test')):
        for key, a in (('x', X + k), ('y', Y.reshape(12, 1, 1, 1).astype(np.uint8))):
            with h5py.File(tmp_path/f'camelyonpatch_level_2_split_{s}_{key}.h5', 'w') as f: f[key] = a
    df = scan(tmp_path)
    assert df.split.value_counts().to_dict() == dict(train=12, val=12, test=12) and set(df.label) == {'normal', 'tumor'}
    assert (read_rgb(df.path[13]) == (X + 1)[1]).all()
    d = open_data(DataConfig(root=str(tmp_path/'camelyonpatch_level_2_split_train_x.h5'), **SMALL), progress=False)
    assert len(d.manifest) == 36 and d.manifest.split.nunique() == 3
    (tmp_path/'camelyonpatch_level_2_split_test_y.h5').unlink()
    assert 'are not beside it' in says(scan, tmp_path)

def test_h5_without_h5py_is_one_line(tmp_path):
    (tmp_path/'a_x.h5').write_bytes(b'x'); (tmp_path/'a_y.h5').write_bytes(b'x')
    done = run_python(['-c', f'''
import sys; sys.modules["h5py"] = None
from histogan.manifest import scan
scan({str(tmp_path/"a_x.h5")!r})'''])
    assert done.rc and 'pip install h5py' in done.err.splitlines()[-1], done

# ---- machines

def test_no_posix_only_module_is_needed():
    done = run_python(['-c', '''
import sys
for name in ("fcntl", "resource", "pwd", "grp", "termios"): sys.modules[name] = None
import histogan.data; print(histogan.data.scan.__name__)'''])
    assert done.out.strip() == 'scan', done
