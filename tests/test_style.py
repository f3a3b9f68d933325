"How a notebook is written, as far as it can be measured. Each rule is a function; each has a cell that breaks it."
import ast, itertools, json, re, statistics
from dataclasses import dataclass

import pytest

from conftest import ROOT

NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))
EXPORTS = {'export', 'exports', 'exporti'}
IMPORT = (ast.Import, ast.ImportFrom)
LONGEST_CELL, LONGEST_COMMENT, WIDEST = 50, 88, 88  # lines; characters; characters
ABSOLUTE = re.compile(r'(?<![\w.:/<])/(home|root|work|tmp|mnt|Users|opt|usr|var)/\w')

@dataclass
class Cell:
    "A notebook cell and what the rules ask about it."
    raw: dict  # as stored

    @property
    def source(self): return ''.join(self.raw['source'])
    @property
    def code(self): return self.raw['cell_type'] == 'code'
    @property
    def lines(self): return self.source.splitlines()
    @property
    def outputs(self): return self.raw.get('outputs', [])
    @property
    def directives(self): return [l[2:].split() for l in self.lines if l.startswith('#|') and l[2:].split()]
    @property
    def exported(self): return self.code and any(d[0] in EXPORTS for d in self.directives)
    @property
    def body(self):
        "Statements other than a bare docstring; shell and magic lines left out."
        text = '\n'.join('' if l.lstrip().startswith(('%', '!')) else l for l in self.lines)
        return [n for n in ast.parse(text).body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]

TITLE = re.compile(r'# [A-Z][^—–:`?]{0,39}$', re.M)  # a few plain words: the side bar shows them

def rule_opening(cells, stem):
    "default_exp with the notebook's name, then a title and one sentence."
    first = [d for d in cells[0].directives] if cells and cells[0].code else []
    if stem[:1].isdigit() and first != [['default_exp', stem[3:]]]: yield f'the first cell is not `#| default_exp {stem[3:]}`'
    prose = next((c.source for c in cells if not c.code), '')
    if not re.match(r'# .+\n+> .+', prose): yield 'the first markdown cell is not a title and one sentence'
    if stem != 'index' and not TITLE.match(prose): yield f'a title of another form: {prose.splitlines()[:1]}'

def rule_closing(cells, stem):
    "The last cell, hidden, exports."
    last = cells[-1]
    if stem[:1].isdigit() and (['hide'] not in last.directives or 'nbdev_export()' not in last.source): yield 'the last cell does not export'

def rule_stored(cells, stem):
    "Sources are lists of lines; nothing of a particular run is kept; no output is an error."
    for c in cells:
        if isinstance(c.raw['source'], str) and '\n' in c.raw['source']: yield 'a source stored as one string'
        if c.raw.get('execution_count') or any(o.get('execution_count') for o in c.outputs): yield 'an execution count'
        if any(o['output_type'] == 'error' for o in c.outputs): yield f'a stored error: {c.source[:40]!r}'

def rule_paths(cells, stem):
    "No path of a particular machine, neither in sources nor in outputs."
    for c in cells:
        texts = [c.source, *(json.dumps([o.get('text'), {k: v for k, v in o.get('data', {}).items() if k.startswith('text')}]) for o in c.outputs)]
        for found in filter(None, map(ABSOLUTE.search, texts)): yield f'an absolute path: {found[0]}'

def rule_directives_lead(cells, stem):
    "A directive below anything else is ignored by nbdev."
    for c in filter(lambda c: c.code, cells):
        below = itertools.dropwhile(lambda l: l.startswith('#|') or not l.strip(), c.lines)
        if any(l.startswith('#|') for l in below): yield f'a directive that does not lead: {c.source[:40]!r}'

def rule_imports_alone(cells, stem):
    "Imports have cells of their own; exported code imports names."
    for c in filter(lambda c: c.code, cells):
        imports = [n for n in c.body if isinstance(n, IMPORT)]
        export_cell = 'nbdev_export()' in c.source
        if imports and len(imports) < len(c.body) and not export_cell: yield f'imports and code in one cell: {c.source[:40]!r}'
        if c.exported and any(a.name == '*' for n in imports for a in n.names): yield 'import * in exported code'

def rule_short(cells, stem):
    "An exported cell is at most 50 lines; imports alone may be more."
    for c in filter(lambda c: c.exported and not all(isinstance(n, IMPORT) for n in c.body), cells):
        n = sum(bool(l.strip()) and not l.startswith('#|') for l in c.lines)
        if n > LONGEST_CELL: yield f'an exported cell of {n} lines: {c.source[:40]!r}'

def public(cell):
    "Public functions and classes of a cell, and the public methods and `__init__` of those classes."
    for node in cell.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith('_'):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from (m for m in node.body if isinstance(m, ast.FunctionDef) and (m.name == '__init__' or m.name[0] != '_'))

def comment_of(cell, arg):
    "The comment behind a parameter, or on the lines directly above it, as nbdev reads them."
    behind = cell.lines[arg.end_lineno - 1][arg.end_col_offset:].partition('#')[2].strip()
    above = itertools.takewhile(lambda l: l.strip().startswith('#'), reversed(cell.lines[:arg.lineno - 1]))
    return behind or ' '.join(l.strip('# ') for l in reversed(list(above)))

def documented(cell):
    "(function, parameter, comment) of every public parameter of a cell."
    for node in public(cell):
        if isinstance(node, ast.ClassDef): continue
        a = node.args
        for arg in [*a.posonlyargs, *a.args, *filter(None, [a.vararg]), *a.kwonlyargs, *filter(None, [a.kwarg])]:
            if arg.arg not in ('self', 'cls'): yield node.name, arg.arg, comment_of(cell, arg)

def rule_documented(cells, stem):
    "Public functions and classes have a docstring, their parameters a comment; a module's `forward` is described by its class."
    for c in filter(lambda c: c.exported, cells):
        for node in public(c):
            if node.name not in ('__init__', 'forward', 'backward') and not ast.get_docstring(node): yield f'{node.name} has no docstring'
        for name, arg, comment in documented(c):
            if not comment: yield f'{name}: the parameter {arg} has no comment'

def rule_plain_comments(cells, stem):
    "A parameter's comment becomes a cell of a table on the site."
    for c in filter(lambda c: c.exported, cells):
        for name, arg, comment in documented(c):
            if '`' in comment: yield f'{name}: a backtick in the comment of {arg} is raw markup on the site'

def shown(cell):
    "Lines of code that a reader sees."
    hidden = {'hide', 'hide_input', 'default_exp', 'exporti'}
    if not cell.code or any(d[0] in hidden for d in cell.directives): return []
    return [l for l in cell.lines if l.strip() and not l.startswith('#|')]

def rule_narrow(cells, stem):
    "At most one visible line in a hundred is wider than a page of the site."
    lines = [l for c in cells for l in shown(c)]
    wide = [l for l in lines if len(l) > WIDEST]
    if len(wide) > .01 * len(lines): yield f'{len(wide)} of {len(lines)} visible lines have more than {WIDEST} characters: {wide[0].strip()[:60]!r}'

def rule_one_statement_a_line(cells, stem):
    "No chains of `;` in visible cells."
    for c in filter(shown, cells):
        if 'nbdev_export()' in c.source: continue
        for node in ast.walk(ast.parse('\n'.join('' if l.lstrip().startswith(('%', '!')) else l for l in c.lines))):
            for block in (getattr(node, f, None) for f in ('body', 'orelse', 'finalbody')):
                starts = [n.lineno for n in block] if isinstance(block, list) else []
                for line in {l for l in starts if starts.count(l) > 1}: yield f'several statements on one line: {c.lines[line - 1].strip()[:60]!r}'

TRIES = re.compile(r'^(?:#+\s*|\*\*)?(?:Try|Exercise|Your turn)\b', re.M)

def rule_something_to_do(cells, stem):
    "A numbered page has two or three boxes that begin with **Try**."
    n = sum(len(TRIES.findall(c.source)) for c in cells if not c.code)
    if stem[:1].isdigit() and n < 2: yield f'{n} Try boxes'

def rule_conclusion(cells, stem):
    "What a figure shows is said where Jupyter shows it, in a title or in the prose behind it; captions have at most 160 characters."
    for at, c in enumerate(cells):
        caption = next((' '.join(d[1:]) for d in c.directives if d[0] == 'fig-cap:'), '') if c.code else ''
        if not caption: continue
        if len(caption.strip('"')) > 160: yield f'a caption of {len(caption)} characters: {caption[:40]}'
        behind = next((d for d in cells[at + 1:] if not d.code or ['hide'] not in d.directives), None)
        told = 'title' in c.source or (behind and not behind.code and not behind.source.startswith('#'))
        if not told: yield f'only the caption says what this shows: {caption[:40]}'

def rule_finished(cells, stem):
    "Nothing is left for later."
    for c in cells:
        for word in re.findall(r'\b(TODO|FIXME|XXX|NotImplementedError)\b', c.source): yield f'{word}: {c.source[:40]!r}'

def rule_leaves_no_trace(cells, stem):
    "A worker runs many notebooks: what one switches off for all of torch it switches on again."
    said = [m for c in cells if c.code for m in re.findall(r'set_grad_enabled\((True|False)\)', c.source)]
    if said and said[-1] == 'False': yield 'torch.set_grad_enabled(False) is left for the next notebook'

RULES = [f for name, f in list(globals().items()) if name.startswith('rule_')]

@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_keeps_the_rules(path):
    cells = [Cell(c) for c in json.loads(path.read_text(encoding='utf-8'))['cells']]
    found = [fault for rule in RULES for fault in rule(cells, path.stem)]
    assert not found, '\n'.join(found)

def test_exported_cells_are_short():
    "Half of them have at most nine lines."
    sizes = [sum(bool(l.strip()) and not l.startswith('#|') for l in c.lines) for p in NOTEBOOKS
             for c in map(Cell, json.loads(p.read_text(encoding='utf-8'))['cells']) if c.exported]
    assert statistics.median(sizes) <= 9, statistics.median(sizes)

def code(source, **stored): return Cell({'cell_type': 'code', 'source': source.splitlines(True), 'outputs': [], **stored})

def md(source): return Cell({'cell_type': 'markdown', 'source': source.splitlines(True)})

SOUND = [code('#| default_exp x'), md('# X\n\n> A sentence.'), md('**Try**: this.\n\n**Try**: that.'), code('#| export\nimport math'),
         code('#| exports\ndef f(\n    a:int, # a count\n):\n    "Returns it."\n    return a'),
         code('#| hide\nimport nbdev; nbdev.nbdev_export()')]

def test_a_comment_above_a_parameter_counts():
    cell = code('#| export\ndef f(\n    a,  # a count\n    # the other,\n    # in steps\n    b,\n): return a')
    assert list(documented(cell)) == [('f', 'a', 'a count'), ('f', 'b', 'the other, in steps')]

def test_a_sound_notebook_passes(): assert [fault for rule in RULES for fault in rule(SOUND, '00_x')] == []

@pytest.mark.parametrize('rule, at, cell', [
    (rule_opening, 0, code('#| default_exp y')),
    (rule_opening, 1, md('# X')),
    (rule_opening, 1, md('# x — one of them\n\n> A sentence.')),
    (rule_opening, 1, md('# Speed: and beside what?\n\n> A sentence.')),
    (rule_closing, 5, code('nbdev.nbdev_export()')),
    (rule_stored, 4, code('1', execution_count=3)),
    (rule_stored, 4, code('1', outputs=[{'output_type': 'error'}])),
    (rule_stored, 4, Cell({'cell_type': 'code', 'source': 'a\nb'})),
    (rule_paths, 4, code("open('/home/me/x')")),
    (rule_paths, 4, code('1', outputs=[{'output_type': 'stream', 'text': ['in /tmp/abc']}])),
    (rule_directives_lead, 4, code('x = 1\n#| export')),
    (rule_imports_alone, 4, code('import math\nx = 1')),
    (rule_imports_alone, 3, code('#| export\nfrom math import *')),
    (rule_short, 4, code('#| export\n' + 'x = 1\n' * 51)),
    (rule_documented, 4, code('#| export\ndef f(\n    a, # a count\n):\n    return a')),
    (rule_documented, 4, code('#| export\ndef f(\n    a,\n):\n    "Returns it."\n    return a')),
    (rule_plain_comments, 4, code('#| export\ndef f(\n    a, # as for `g`\n):\n    "Returns it."\n    return a')),
    (rule_documented, 4, code('#| export\ndef f(\n    # a count\n\n    a,\n):\n    "Returns it."\n    return a')),
    (rule_narrow, 4, code('x = ' + '1 + ' * 30 + '1')),
    (rule_one_statement_a_line, 4, code('x = 1; y = 2')),
    (rule_one_statement_a_line, 4, code('def f():\n    a = 1; return a')),
    (rule_something_to_do, 2, md('**Try**: this.')),
    (rule_conclusion, 4, code('#| label: fig-a\n#| fig-cap: "A line."\nplot()')),
    (rule_conclusion, 4, code('#| label: fig-a\n#| fig-cap: "' + 'A line. ' * 21 + '"\nset_title("up")')),
    (rule_finished, 4, code('x = 1 # TODO')),
])
def test_a_broken_rule_is_found(rule, at, cell):
    assert list(rule([*SOUND[:at], cell, *SOUND[at + 1:]], '00_x'))
