"Start-up: what is loaded by `import histogan`, and by --help: no torch, neither before nor after its text is known."
import os

import pytest

from conftest import ROOT, run_python

PROGRAMS = 'train prepare audit generate eval downstream report ablate bench'.split()
HEAVY = 'torch numpy pandas tyro scipy PIL'.split()
REAL = {'torch._C', 'pandas._libs', 'PIL._imaging', 'safetensors._safetensors_rust', 'scipy._lib'}  # no stand-in has them
WITH_TORCH = 'import sys, torch, importlib; importlib.import_module("histogan." + sys.argv[1]).main(["--help"])'
BY_NEED = 'torchvision timm torchmetrics torch_fidelity lpips scipy.linalg scipy.sparse scipy.stats sklearn matplotlib staintools IPython'.split()

def loaded(args, cache):
    "What a program prints, and every module it loads."
    run = run_python(['-X', 'importtime', *args], env={'XDG_CACHE_HOME': str(cache), 'PYTHONPATH': str(ROOT)})
    assert run.rc == 0, run.err
    return run.out, {line.split('|')[-1].strip() for line in run.err.splitlines() if line.startswith('import time:')}

def test_the_package_alone_loads_nothing_heavy(tmp_path):
    assert not loaded(['-c', 'import histogan'], tmp_path)[1] & {*HEAVY, *BY_NEED}

@pytest.mark.parametrize('name', PROGRAMS)
def test_help_never_loads_torch(name, tmp_path):
    "The first time a stand-in takes its place, the second time next to nothing is loaded; the words are those of torch's modules."
    first, second = (loaded(['-m', f'histogan.{name}', '--help'], tmp_path) for _ in 'ab')
    assert first[0] == second[0] == run_python(['-c', WITH_TORCH, name], env={'PYTHONPATH': str(ROOT)}).out
    assert f'python -m histogan.{name}' in first[0] and 'tyro' in first[1]
    assert not first[1] & REAL and not first[1] & set(BY_NEED)
    assert not second[1] & {*HEAVY, *BY_NEED} and len(second[1]) < 150

def test_a_console_script_does_as_well(tmp_path):
    script = tmp_path/'histogan-eval'
    script.write_text('import sys\nfrom histogan.eval import main\nsys.exit(main())\n')
    out, modules = loaded([str(script), '--help'], tmp_path/'cache')
    assert out.startswith('usage: python -m histogan.eval') and not modules & REAL

def test_where_a_stand_in_will_not_do_torch_is_loaded(tree, tmp_path):
    "A module that computes with torch while it is imported: the help is the same, and later."
    path, ask = tree/'histogan'/'audit.py', ['-m', 'histogan.audit', '--help']
    answer = lambda cache: run_python(['-X', 'importtime', *ask], env={'XDG_CACHE_HOME': str(tmp_path/cache), 'PYTHONPATH': str(tree)})
    light = answer('a')
    text = path.read_text(encoding='utf-8')
    path.write_text(text.replace('from . import startup', 'from . import startup, generator, losses\nTWO = generator.torch.ones(2).sum().item() + 1', 1), encoding='utf-8')
    whole = answer('b')
    assert light.rc == whole.rc == 0 and light.out == whole.out
    assert 'torch._C' in whole.err and 'torch._C' not in light.err

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
