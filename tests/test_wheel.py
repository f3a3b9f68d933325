"The package as a stranger gets it: built into a wheel, installed into an empty folder, imported from there."
import configparser, json, tarfile
from importlib.metadata import Distribution

import pytest

from conftest import ROOT, copy_tree, run_python

CFG = configparser.ConfigParser(delimiters=['='])
CFG.read(ROOT/'settings.ini', encoding='utf-8')
CFG = CFG['DEFAULT']

OFFLINE = ['--no-deps', '--no-index', '--disable-pip-version-check', '--quiet']
LOADED = '''
import json, sys
before = set(sys.modules)
import histogan
new = {name.partition('.')[0] for name in set(sys.modules) - before}
print(json.dumps({'file': histogan.__file__, 'version': histogan.__version__, 'new': sorted(new - set(sys.stdlib_module_names))}))
'''

@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    "A folder into which the wheel of this tree was installed."
    base = tmp_path_factory.mktemp('wheel')
    built = run_python(['-m', 'pip', 'wheel', *OFFLINE, '--no-build-isolation', '-w', base, copy_tree(base/'tree')])
    assert built.rc == 0, built.err
    wheel, = base.glob('histogan-*.whl')
    put = run_python(['-m', 'pip', 'install', *OFFLINE, '--target', base/'site', wheel])
    assert put.rc == 0, put.err
    return base/'site'

@pytest.fixture(scope='module')
def meta(installed):
    "The metadata that the installed package carries."
    folder, = installed.glob('histogan-*.dist-info')
    return Distribution.at(folder)

def test_import_is_light_and_of_the_right_version(installed):
    run = run_python(['-c', LOADED], env={'PYTHONPATH': str(installed)})
    assert run.rc == 0, run.err
    seen = json.loads(run.out)
    assert seen['file'].startswith(str(installed)) and seen['version'] == CFG['version']
    assert seen['new'] == ['histogan'], 'import histogan pulls in other packages'

def test_every_module_is_in_it(installed):
    assert sorted(p.name for p in (installed/'histogan').glob('*.py')) == sorted(p.name for p in (ROOT/'histogan').glob('*.py'))

def test_the_licence_and_the_landing_page_are_in_it(meta):
    licence, = [f for f in meta.files if f.name == 'LICENSE']
    assert licence.read_text() == (ROOT/'LICENSE').read_text(encoding='utf-8')
    assert meta.metadata['Description'] or meta.metadata.get_payload()

def test_metadata_are_those_of_the_settings(meta):
    assert meta.version == CFG['version'] and meta.metadata['Requires-Python'] == f">={CFG['min_python']}"
    extras = [r for r in meta.requires if 'extra ==' in r]
    assert len(meta.requires) - len(extras) == len(CFG['requirements'].split())
    assert len(extras) == len(CFG['dev_requirements'].split())

def test_entry_points(meta):
    points = {(e.group, f'{e.name}={e.value}') for e in meta.entry_points}
    assert points == {('nbdev', 'histogan=histogan._modidx:d'), *(('console_scripts', s) for s in CFG['console_scripts'].split())}

@pytest.mark.parametrize('script', CFG['console_scripts'].split())
def test_each_program_can_be_called(installed, script):
    module, function = script.partition('=')[2].split(':')
    run = run_python(['-c', f'from {module} import {function} as f; assert callable(f)'], env={'PYTHONPATH': str(installed)})
    assert run.rc == 0, run.err

def test_the_source_archive_builds_the_same_wheel(tmp_path, installed):
    "What is uploaded is complete: the wheel made from the archive alone has every module."
    tree = copy_tree(tmp_path/'tree')
    built = run_python(['-m', 'build', '--no-isolation', '--outdir', tmp_path/'dist', tree], timeout=900)
    assert built.rc == 0, built.err
    archive, = (tmp_path/'dist').glob('histogan-*.tar.gz')
    with tarfile.open(archive) as tar: names = {n.partition('/')[2] for n in tar.getnames()}
    assert {'settings.ini', 'README.md', 'LICENSE', 'setup.py', 'pyproject.toml'} <= names
    wheel, = (tmp_path/'dist').glob('histogan-*.whl')
    put = run_python(['-m', 'pip', 'install', *OFFLINE, '--target', tmp_path/'site', wheel])
    assert put.rc == 0, put.err
    files = lambda site: {p.name: p.read_bytes() for p in (site/'histogan').glob('*.py')}
    assert files(tmp_path/'site') == files(installed)

def test_train_generate_report_run_from_the_wheel(tmp_path, installed):
    "Without the repository: the three commands of a first visit, from the installed package, in an empty folder."
    env = {'PYTHONPATH': str(installed)}
    for args in (['histogan.train', '--preset', 'smoke', '--out', 'run'],
                 ['histogan.generate', 'run', '--per-class', '2', '--out', 'synth'],
                 ['histogan.report', 'run']):
        run = run_python(['-m', *args], cwd=tmp_path, env=env)
        assert run.rc == 0, f'{args}: {run.err}'
    assert len(list((tmp_path/'synth').rglob('*.png'))) == 18
    assert (tmp_path/'run'/'report.html').stat().st_size > 10_000
