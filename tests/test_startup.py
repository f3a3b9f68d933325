"Start-up: what is loaded by `import histogan`, and by --help before and after its text is known."
import os

import pytest

from conftest import ROOT, run_python

PROGRAMS = 'train prepare audit generate eval downstream report ablate bench'.split()
HEAVY = 'torch numpy pandas tyro scipy PIL'.split()
BY_NEED = 'torchvision timm torchmetrics torch_fidelity lpips scipy.linalg scipy.sparse scipy.stats sklearn matplotlib staintools IPython'.split()

def loaded(args, cache):
    "What a program prints, and every module it loads."
    run = run_python(['-X', 'importtime', *args], env={'XDG_CACHE_HOME': str(cache), 'PYTHONPATH': str(ROOT)})
    assert run.rc == 0, run.err
    return run.out, {line.split('|')[-1].strip() for line in run.err.splitlines() if line.startswith('import time:')}

def test_the_package_alone_loads_nothing_heavy(tmp_path):
    assert not loaded(['-c', 'import histogan'], tmp_path)[1] & {*HEAVY, *BY_NEED}

@pytest.mark.parametrize('name', PROGRAMS)
def test_a_help_that_was_printed_before_loads_nothing_heavy(name, tmp_path):
    "The first time nothing is loaded that only some calls need, the second time next to nothing; the words are the same."
    first, second = (loaded(['-m', f'histogan.{name}', '--help'], tmp_path) for _ in 'ab')
    assert f'python -m histogan.{name}' in first[0] and second[0] == first[0]
    assert not first[1] & set(BY_NEED) and 'tyro' in first[1]
    assert not second[1] & {*HEAVY, *BY_NEED} and len(second[1]) < 150

def test_another_width_is_another_text(tmp_path):
    narrow, wide = (run_python(['-m', 'histogan.prepare', '--help'], env={'XDG_CACHE_HOME': str(tmp_path), 'COLUMNS': str(n)}).out for n in (60, 120))
    assert (boxed := lambda text: max(len(s) for s in text.splitlines() if s[:1] == '╭'))(narrow) <= 60 < boxed(wide)
    assert len(list((tmp_path/'histogan').iterdir())) == 2

def test_an_edited_default_shows_at_once(tree, tmp_path):
    "A text is never stale: its key knows the sources."
    ask = lambda: run_python(['-m', 'histogan.prepare', '--help'], env={'XDG_CACHE_HOME': str(tmp_path/'cache'), 'PYTHONPATH': str(tree)}).out
    words, path = 'folder to make', tree/'histogan'/'prepare.py'
    assert words in ask() and words in ask()
    text = path.read_text(encoding='utf-8')
    assert text.count('# ' + words) == 1
    path.write_text(text.replace('# ' + words, '# another word for it'), encoding='utf-8')
    assert words not in (said := ask()) and 'another word for it' in said

@pytest.mark.skipif(os.name == 'nt' or not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root writes anywhere')
def test_a_cache_that_cannot_be_written_costs_time_alone(tmp_path):
    tmp_path.chmod(0o500)
    assert 'usage:' in loaded(['-m', 'histogan.audit', '--help'], tmp_path)[0]

def test_bad_options_are_not_kept(tmp_path):
    run = run_python(['-m', 'histogan.audit', '--helq'], env={'XDG_CACHE_HOME': str(tmp_path)})
    assert run.rc == 2 and not list(tmp_path.iterdir())
