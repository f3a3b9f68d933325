"The tree: what lies at its top, that modules and notebooks belong together, and who may import whom."
import ast, os, re

import pytest

from conftest import ROOT, run_python

TOP = set('''nbs histogan settings.ini setup.py _quarto.yml tests README.md
    pyproject.toml MANIFEST.in LICENSE CITATION.cff .github .ci .gitignore .gitattributes'''.split())
GENERATED = {'__init__', '_modidx'}
NUMBER = {p.stem[3:]: p.stem for p in (ROOT/'nbs').glob('[0-9][0-9]_*.ipynb')}  # module name -> its notebook; within a number the alphabet counts

def nbdev(command, tree):
    "Run an nbdev command of the Python API in a copy of the tree."
    module, function = command
    run = run_python(['-c', f'from nbdev.{module} import {function} as f; f.__wrapped__()'], cwd=tree, env={'PYTHONPATH': str(tree)})
    assert run.rc == 0, run.err

def contents(folder, pattern):
    "What the files of a folder hold, by name."
    return {p.name: p.read_text(encoding='utf-8') for p in folder.glob(pattern)}

def changed(before, after):
    "Names of the files that differ or exist on one side only."
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))

def imported(module):
    "Modules of this package that a module imports, anywhere in it."
    for node in ast.walk(ast.parse((ROOT/'histogan'/f'{module}.py').read_text(encoding='utf-8'))):
        if not isinstance(node, ast.ImportFrom): continue
        name = '.' * node.level + (node.module or '')
        found = re.fullmatch(r'(?:\.|histogan\.)(\w+)', name)
        if found: yield found[1]
        elif name in ('.', 'histogan'): yield from (alias.name for alias in node.names)

def test_top_level_is_the_agreed_one(tree):
    assert {p.name for p in tree.iterdir()} == TOP

def test_the_site_configuration_is_one_file():
    assert os.readlink(ROOT/'nbs'/'_quarto.yml') == os.path.join('..', '_quarto.yml')

def test_each_notebook_has_its_module_and_each_module_its_notebook():
    assert {p.stem for p in (ROOT/'histogan').glob('*.py')} == GENERATED | set(NUMBER)

def test_modules_are_what_the_notebooks_export(tree):
    for path in (tree/'histogan').glob('*.py'): path.unlink()
    nbdev(('doclinks', 'nbdev_export'), tree)
    assert changed(contents(ROOT/'histogan', '*.py'), contents(tree/'histogan', '*.py')) == []

def test_notebooks_are_clean(tree):
    nbdev(('clean', 'nbdev_clean'), tree)
    assert changed(contents(ROOT/'nbs', '*.ipynb'), contents(tree/'nbs', '*.ipynb')) == []

@pytest.mark.parametrize('module', sorted(NUMBER, key=NUMBER.get))
def test_a_module_imports_earlier_notebooks_only(module):
    "The objective and its guards know no model (chapters 1 and 2)."
    for other in imported(module):
        assert NUMBER[other] < NUMBER[module], f'{module} imports {other}, which comes later'
        assert not ((NUMBER[module][0] == '3' or module == 'guards') and NUMBER[other][0] in '12'), f'{module} imports the model {other}'
