"Names of version 0.1: each loads, from where it was, or says what does its work now."
import ast, importlib, json, re, warnings

import pytest

from conftest import ROOT, run_python

TEXT = (ROOT/'tests'/'old_names.txt').read_text(encoding='utf-8').partition('\n\n')[2]
OLD = {m: names.split() for m, names in re.findall(r'^(\w+):((?:.|\n    )*)$', TEXT, re.M)}  # module -> its public names, -NAME: gone

def lookup(module, name):
    "What a name gives, and the warnings on the way."
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter('always')
        return getattr(importlib.import_module(f'histogan.{module}'), name), [str(w.message) for w in heard if issubclass(w.category, DeprecationWarning)]

def test_the_list_is_whole():
    assert len(OLD) == 27 and sum(map(len, OLD.values())) == 675 and {'judge', 'gates', 'train'} <= set(OLD)

@pytest.mark.parametrize('module', OLD)
def test_each_old_name_loads(module):
    for name in OLD[module]:
        if name[0] != '-': assert lookup(module, name)[0] is not None, name
        else:
            with pytest.raises(AttributeError, match='is gone; see ') as e: lookup(module, name[1:])
            home, new = str(e.value).rpartition(' ')[2].split('.')
            assert hasattr(importlib.import_module(f'histogan.{home}'), new), e.value

def test_a_moved_name_warns_in_one_line():
    from histogan.classifier import HeldOutClassifier
    run = run_python(['-W', 'always', '-c', 'from histogan.judge import Judge; from histogan.judge import Judge'])
    assert run.rc == 0 and run.err.count('DeprecationWarning: judge.Judge is now classifier.HeldOutClassifier') == 1, run.err
    import histogan.judge
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert histogan.judge.Judge is HeldOutClassifier

def test_a_name_that_never_was_is_an_error():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"): lookup('gates', 'nothing')
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"): lookup('train', 'nothing')

def test_old_names_point_at_something():
    "No line of the table is stale."
    from histogan.core import OLD_NAMES
    for module, table in OLD_NAMES.items():
        for old, new in table.items():
            for target in new.lstrip('-').split(','):
                home, _, name = target.partition('.')
                there = importlib.import_module(f'histogan.{home}')
                assert not name or hasattr(there, name), f'{module}.{old} -> {target}'

# the project itself uses the new ones

def imported(text):
    "(module, name) of what a text imports from modules of the package."
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.ImportFrom): continue
        found = re.fullmatch(r'(?:\.|histogan\.)(\w+)', '.' * node.level + (node.module or ''))
        if found: yield from ((found[1], a.name) for a in node.names)

def code_of(path):
    "The Python of a file; magics of a notebook left out."
    text = path.read_text(encoding='utf-8')
    if path.suffix == '.py': return text
    cells = [''.join(c['source']) for c in json.loads(text)['cells'] if c['cell_type'] == 'code']
    return '\n'.join('pass' if l.startswith(('%', '!')) else l for c in cells for l in c.splitlines())

def not_there(pairs): return [f'{m}.{n}' for m, n in pairs if n not in vars(importlib.import_module(f'histogan.{m}'))]

@pytest.mark.parametrize('folder', ['histogan', 'nbs', 'tests'])
def test_the_project_uses_no_old_name(folder):
    "Neither a module, at its top or within a function, nor a page, nor a test."
    wrong = {}
    for path in sorted([*(ROOT/folder).glob('*.py'), *(ROOT/folder).glob('*.ipynb')]):
        if path.name == 'test_names.py': continue
        if old := not_there(imported(code_of(path))): wrong[path.name] = old
    assert not wrong, wrong

def test_the_use_of_an_old_name_is_found():
    assert sorted(not_there(imported('def f():\n    from .eval import deal, EvalArgs\nfrom histogan.judge import Judge\n'))) == ['eval.deal', 'judge.Judge']
