"The tree: what lies at its top, that modules and notebooks belong together, and who may import whom."
import ast, json, os, re

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
        if isinstance(node, ast.Import): yield from (a.name[9:] for a in node.names if a.name.startswith('histogan.'))
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
    for name in {'_modidx', *NUMBER}: (tree/'histogan'/f'{name}.py').unlink()  # __init__ is written by hand
    nbdev(('doclinks', 'nbdev_export'), tree)
    assert changed(contents(ROOT/'histogan', '*.py'), contents(tree/'histogan', '*.py')) == []

def test_a_new_version_changes_the_version_alone(tree):
    "`__init__` is written by hand: nbdev puts the number into it and keeps its other lines."
    nbdev(('release', 'nbdev_bump_version'), tree)
    assert changed(contents(ROOT/'histogan', '*.py'), contents(tree/'histogan', '*.py')) == ['__init__.py']
    old, new = ((top/'histogan'/'__init__.py').read_text(encoding='utf-8').splitlines() for top in (ROOT, tree))
    assert old[0] != new[0] and new[0].startswith('__version__ = ') and old[1:] == new[1:] and new[-1].startswith('old_modules()')
    run = run_python(['-W', 'ignore', '-c', 'import histogan; from histogan.judge import Judge; print(histogan.__version__)'], env={'PYTHONPATH': str(tree)})
    assert run.rc == 0 and f'__version__ = "{run.out.strip()}"' == new[0], run.err

def test_notebooks_are_clean(tree):
    nbdev(('clean', 'nbdev_clean'), tree)
    assert changed(contents(ROOT/'nbs', '*.ipynb'), contents(tree/'nbs', '*.ipynb')) == []

# who knows whom

MODELS = {'generator', 'discriminator', 'encoder'}
KNOW_NO_MODEL = {'losses', 'augment', 'guards'}  # the objective and its guards

def module_graph():
    "Module -> the modules of this package that it imports, in the order of the notebooks."
    return {m: sorted(set(imported(m)), key=NUMBER.get) for m in sorted(NUMBER, key=NUMBER.get)}

def drawn(graph):
    "The graph as text: one line for each room, what it imports by number."
    chapter, lines = '', []
    for module, others in graph.items():
        if (number := NUMBER[module])[0] != chapter: lines.append(f'chapter {(chapter := number[0])}')
        lines.append(f'  {number:<18} <- ' + (' '.join(NUMBER[o] for o in others) or 'nothing'))
    return '\n'.join(lines)

def test_no_page_reads_outside_the_project():
    "What a reader does not have must not change what a page shows."
    outside = re.compile(r"""['"](?:\.\./|/(?:home|root|work|tmp|mnt|data)\b|shared/)""")
    for path in sorted((ROOT/'nbs').glob('*.ipynb')):
        for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
            if cell['cell_type'] != 'code': continue
            found = outside.search(''.join(cell['source']))
            assert not found, f'{path.name}: {found.group()}'

def test_the_module_graph_has_no_arrow_up():
    "No import of a later chapter, nor of a later number; `pytest -s` prints the graph."
    graph = module_graph()
    print('\n' + drawn(graph))
    assert set(graph) == set(NUMBER) and graph['core'] == []
    up = [f'{NUMBER[m]} -> {NUMBER[o]}' for m, others in graph.items() for o in others if NUMBER[o] >= NUMBER[m]]
    assert not up, '\n'.join([*up, drawn(graph)])

@pytest.mark.parametrize('module', sorted(KNOW_NO_MODEL))
def test_the_objective_and_its_guards_know_no_model(module):
    "Neither by themselves nor through what they import."
    graph, known = module_graph(), set()
    todo = [module]
    while todo:
        new = set(graph[todo.pop()]) - known
        known |= new
        todo += new
    assert not known & MODELS, f'{module} reaches {sorted(known & MODELS)}'

def test_the_graph_finds_an_arrow_up(tmp_path, monkeypatch):
    "The test above can fail: every way to import is seen."
    ways = ['from .train import train', 'from histogan.train import train', 'import histogan.train', 'from . import train', 'def f():\n    from .train import train']
    (tmp_path/'histogan').mkdir()
    monkeypatch.setattr('test_tree.ROOT', tmp_path)
    for way in ways:
        (tmp_path/'histogan'/'core.py').write_text(way)
        assert list(imported('core')) == ['train'], way

# what a step may do

FILE_WORDS = {'open', 'Path', 'json', 'csv', 'os', 'shutil', 'tempfile', 'pathlib', 'io', 'write_file', 'write_json', 'read_json', 'write_table', 'read_table', 'print', 'tqdm'}

def names_used(source):
    "Names that a module imports or uses, and attributes that write files."
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name): yield node.id
        if isinstance(node, (ast.Import, ast.ImportFrom)): yield from (a.name.split('.')[0] for a in node.names)
        if isinstance(node, ast.Attribute) and node.attr in ('write_text', 'write_bytes', 'read_text', 'read_bytes', 'to_csv', 'save', 'load'): yield f'.{node.attr}'

@pytest.mark.parametrize('module', ['state', 'step'])
def test_a_step_touches_no_files(module):
    source = (ROOT/'histogan'/f'{module}.py').read_text(encoding='utf-8')
    found = {n for n in names_used(source) if n in FILE_WORDS or n[0] == '.'}
    assert not found, f'{module} uses {sorted(found)}'

def test_a_touched_file_is_found():
    assert {n for n in names_used('import json\nopen(p)\ntorch.save(x)') if n in FILE_WORDS or n[0] == '.'} == {'json', 'open', '.save'}

# no room too large

LONGEST_MODULE, MOST_NAMES = 600, 40

@pytest.mark.parametrize('module', sorted(NUMBER, key=NUMBER.get))
def test_a_module_can_be_read_in_one_sitting(module):
    text = (ROOT/'histogan'/f'{module}.py').read_text(encoding='utf-8')
    public = next((ast.literal_eval(n.value) for n in ast.parse(text).body if isinstance(n, ast.Assign) and n.targets[0].id == '__all__'), [])
    assert text.count('\n') <= LONGEST_MODULE, f'{module} has {text.count(chr(10))} lines'
    assert len(public) <= MOST_NAMES, f'{module} has {len(public)} public names'

# one of everything

ONCE = re.compile(r'os\.replace|fsync|sha256\(|read_csv|lockf|flock|os\._exit|to_csv|msvcrt')
BESIDES = {  # module -> what it may name, and why
    'ablate': ('to_csv',),  # four digits: a table to read
    'core': ('os.replace', 'fsync', 'sha256(', 'read_csv', 'lockf', 'to_csv', 'msvcrt'),  # the one writer, hash, table reader and lock
    'process': ('os._exit',),  # a second signal, and a worker whose parent is gone
}

def named_once(text):
    "What of the things that exist once a module names, comments and docstrings aside."
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)) and ast.get_docstring(node): node.body[0].value.value = ''
        if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') in ('__all__', 'OLD_NAMES'): node.value = ast.Constant(None)
    return sorted(set(ONCE.findall(ast.unparse(tree))))

@pytest.mark.parametrize('module', sorted(NUMBER, key=NUMBER.get))
def test_there_is_one_of_everything(module):
    "One writer, one lock, one hash, one table reader, one end of a process: all in core."
    found = named_once((ROOT/'histogan'/f'{module}.py').read_text(encoding='utf-8'))
    allowed = BESIDES.get(module, ())
    assert set(found) <= set(allowed), f'{module} has its own {", ".join(sorted(set(found) - set(allowed)))}; core has one'

def test_a_second_of_everything_is_found():
    assert named_once('"""os.replace"""\nimport os\nos.replace(a, b)  # fsync\nh = hashlib.sha256(x)') == ['os.replace', 'sha256(']

def six_lines(text, n=6):
    "Every run of n lines of code, without comments, blank lines and what differs in layout only."
    lines = [' '.join(l.split('  #')[0].split()) for l in text.splitlines()]
    lines = [l for l in lines if len(l) > 3 and not l.startswith(('#', '"', 'import ', 'from '))]
    return {'\n'.join(lines[i:i + n]) for i in range(len(lines) - n + 1)}

def test_no_six_lines_stand_twice():
    seen, twice = {}, []
    for module in NUMBER:
        for block in six_lines((ROOT/'histogan'/f'{module}.py').read_text(encoding='utf-8')):
            if block in seen: twice.append(f'{seen[block]} and {module}:\n{block}')
            seen[block] = module
    assert not twice, '\n\n'.join(twice)
    assert six_lines('a = 11\n' * 6) and not six_lines('a = 11\n' * 5)

# any system

SYSTEM = re.compile(r'^\s*import (fcntl|resource|pwd|grp|termios)|os\.(fork|geteuid|getpgid|killpg|sync|nice|uname)\b|signal\.(SIGKILL|SIGALRM|SIGHUP|SIGUSR\d)|[\'"]/(dev|proc|tmp)/', re.M)

@pytest.mark.parametrize('module', sorted(NUMBER, key=NUMBER.get))
def test_no_module_needs_one_system(module):
    "Modules of POSIX alone are imported in a `try`, calls of it stand behind a test that they exist."
    text = (ROOT/'histogan'/f'{module}.py').read_text(encoding='utf-8')
    assert not (found := SYSTEM.search(text)), f'{module}: {found[0]}'

PROGRAMS = sorted(re.findall(r'=(histogan\.\w+):main', (ROOT/'settings.ini').read_text(encoding='utf-8')))
NO_POSIX = '''
import os, runpy, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in ('fcntl', 'resource', 'pwd', 'grp', 'termios'): raise ModuleNotFoundError(f'No module named {name!r}', name=name)
for name in ('fcntl', 'resource', 'pwd', 'grp', 'termios'): sys.modules.pop(name, None)
sys.meta_path.insert(0, Missing())
for name in ('getloadavg', 'geteuid', 'sched_getaffinity'):
    if hasattr(os, name): delattr(os, name)
module, *sys.argv[1:] = sys.argv[1:]
runpy.run_module(module, run_name='__main__')
'''

@pytest.mark.parametrize('module', PROGRAMS)
def test_help_without_posix(module):
    "As on Windows: the modules of POSIX are not there."
    run = run_python(['-c', NO_POSIX, module, '--help'])
    assert run.rc == 0 and '--' in run.out, run.err[-600:]

def test_help_without_posix_can_fail():
    run = run_python(['-c', NO_POSIX.split('module, *sys.argv')[0] + 'import fcntl'])
    assert run.rc == 1 and "No module named 'fcntl'" in run.err
