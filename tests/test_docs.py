"The documentation as nbdev hands it to Quarto: processed in a copy of the tree and checked without Quarto."
import ast, json, re
from configparser import ConfigParser

import pytest

from conftest import ROOT, copy_tree, run_python
from docsite import automatic_links, cells_of, is_meant, listed, load, problems

PROCESS = '''
from nbdev.doclinks import _build_modidx
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs
refresh_quarto_yml(); _build_modidx(); proc_nbs(force=True, n_workers=1)
'''

@pytest.fixture(scope='module')
def processed(tmp_path_factory):
    "A copy of the tree whose notebooks nbdev has processed into _proc/."
    tree = copy_tree(tmp_path_factory.mktemp('docs')/'tree')
    run = run_python(['-c', PROCESS], cwd=tree, env={'PYTHONPATH': str(tree)}, timeout=1200)
    assert run.rc == 0, run.err
    return tree

def test_every_notebook_is_processed(processed):
    assert sorted(p.name for p in (processed/'_proc').glob('*.ipynb')) == sorted(p.name for p in (ROOT/'nbs').glob('*.ipynb'))

def test_the_site_has_no_faults(processed):
    found = problems(processed/'_proc')
    assert not found, '\n'.join(found)

def dataclasses_in(text):
    "Class -> its fields, of the dataclasses that a text defines."
    classes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ClassDef) and any('dataclass' in ast.unparse(d) for d in n.decorator_list)]
    return {c.name: [f.target.id for f in c.body if isinstance(f, ast.AnnAssign)] for c in classes}

MODULES = {p.stem: p.read_text(encoding='utf-8') for p in sorted((ROOT/'histogan').glob('*.py')) if p.stem != '_modidx'}
FIELDS = {f for text in MODULES.values() for fields in dataclasses_in(text).values() for f in fields}

def test_automatic_links_lead_to_what_is_meant(processed):
    found = []
    for page in sorted((processed/'_proc').glob('*.ipynb')):
        source = ROOT/'nbs'/page.name
        found += [f'{page.name}: {word} -> {to}' for word, to in automatic_links(page, source) if not is_meant(word, to, source, FIELDS)]
    assert not found, '\n'.join(found)

# what a reader of the field types into the search box, and the words that this project keeps to
WORDS = ('mode collapse', 'overfitting', 'memorization', 'gradient clipping', 'two-time-scale update rule', 'TTUR',
    'feature map', 'pretrained', 'hyperparameter', 'embedding', 'FID', 'augmentation', 'rotation', 'discriminator', 'regularization',
    'held-out classifier', 'classified as', 'classifier accuracy', 'quality threshold', 'selection score', 'original recipe',
    'evaluate', 'encode', 'encoded batch', 'cached features', 'EMA generator', 'ImageNet-pretrained encoder', 'split', 'group',
    'prepared dataset', 'fix', 'real-vs-real baseline', 'override', 'local_rows', 'gather_batch', 'weighted_sum', 'optimizer_step')

@pytest.mark.parametrize('word', WORDS)
def test_the_words_of_the_field_are_found(processed, word):
    seen = re.compile(rf'\b{word}', re.I if word.islower() else 0)
    prose = {p.name: ' '.join(' '.join(cells_of(p, 'markdown')).split()) for p in (processed/'_proc').glob('*.ipynb')}
    assert [name for name, text in prose.items() if seen.search(text)], f'no page says {word}'

@pytest.mark.parametrize('name', [n for text in MODULES.values() for n in dataclasses_in(text) if n.endswith(('Config', 'Args')) and n not in ('MadeConfig', 'TrainArgs')])
def test_a_configuration_shows_its_fields(name):
    module = next(m for m, text in MODULES.items() if name in dataclasses_in(text))
    page = next((ROOT/'nbs').glob(f'[0-9][0-9]_{module}.ipynb'))
    assert f'field_table({name})' in '\n'.join(cells_of(page, 'code'))

@pytest.mark.parametrize('page', sorted(p.name for p in (ROOT/'nbs').glob('tutorial_*.ipynb')))
def test_a_tutorial_opens_in_colab(page):
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT/'settings.ini')
    git, branch = ini['DEFAULT']['git_url'], ini['DEFAULT']['branch']
    badge, setup = (cells_of(ROOT/'nbs'/page, kind) for kind in ('markdown', 'code'))
    there = git.replace('https://github.com/', 'https://colab.research.google.com/github/')
    assert f'({there}/blob/{branch}/nbs/{page})' in badge[1]
    assert setup[0].startswith('#| hide\n#| eval: false\n') and f'-b {branch} {git}\n' in setup[0] and 'pip install' in setup[0]

def test_site_settings_are_current(processed):
    assert (processed/'nbs'/'nbdev.yml').read_text() == (ROOT/'nbs'/'nbdev.yml').read_text()

def test_sidebar_lists_every_notebook():
    contents = load(ROOT/'nbs'/'sidebar.yml')['website']['sidebar']['contents']
    numbered = sorted(p.name for p in (ROOT/'nbs').glob('[0-9]*.ipynb'))
    others = sorted(p.name for p in (ROOT/'nbs').glob('*.ipynb') if p.name not in numbered)
    shown = list(listed(contents))
    assert shown[:2] == ['index.ipynb', 'tour.ipynb']  # what one reads first
    assert [n for n in shown if n in numbered] == numbered and sorted(n for n in shown if n in others) == others

def test_landing_page_links_every_notebook():
    page = (ROOT/'nbs'/'index.ipynb').read_text(encoding='utf-8')
    assert [p.name for p in sorted((ROOT/'nbs').glob('[0-9]*.ipynb')) if f']({p.name})' not in page] == []

def test_the_landing_page_is_read_in_two_minutes():
    "At most 900 words, code among them; the picture and the first command come within the first 150."
    text = '\n\n'.join(cells_of(ROOT/'nbs'/'index.ipynb', 'markdown'))
    count = lambda part: sum(bool(re.search(r'\w', w)) for w in re.sub(r'\]\([^)]*\)', ']', part).split())
    assert count(text) <= 900 and count(text.split('python -m histogan.train')[0]) <= 150 and '![' in text.split('python -m')[0]

FRONT = {'cell_type': 'raw', 'source': '---\ntitle: A\ndescription: B\noutput-file: a.html\n---'}
PICTURE = [{'output_type': 'display_data', 'data': {'image/png': ''}}]

def site(folder, *cells, contents='a.ipynb'):
    "A site of one page."
    (folder/'_quarto.yml').write_text('metadata-files: [nbdev.yml, sidebar.yml]')
    (folder/'nbdev.yml').write_text('website: {site-url: "https://example.org/x"}')
    (folder/'sidebar.yml').write_text('website: {sidebar: {contents: [{section: S, contents: [%s]}]}}' % contents)
    (folder/'a.ipynb').write_text(json.dumps({'cells': list(cells)}))
    return folder

def md(text): return {'cell_type': 'markdown', 'source': text}

def code(text, outputs=()): return {'cell_type': 'code', 'source': text, 'outputs': list(outputs)}

FIGURE = code('#| label: fig-a\n#| fig-cap: "A line."\nplot()', PICTURE)

def test_a_sound_page_passes(tmp_path):
    prose = md('## Head {#sec-h}\n\n@fig-a, @sec-h, @eq-e, [head](#sec-h), [page](https://example.org/x/a.html#sec-h)\n\n$$a$$ {#eq-e}')
    assert problems(site(tmp_path, FRONT, prose, FIGURE)) == []

@pytest.mark.parametrize('cells, fault', [
    ([FRONT, md('See @fig-none.')], '@fig-none has no target'),
    ([FRONT, md('[x](nowhere.ipynb)')], 'nowhere.ipynb leads to no page'),
    ([FRONT, md('[x](https://example.org/x/b.html)')], 'b.html leads to no page'),
    ([FRONT, md('[[`x`](https://example.org/x/a.html)](a.ipynb)')], 'a link within a link: x'),
    ([FRONT, md('[x](a.ipynb#none)')], 'a.ipynb#none has no such anchor'),
    ([FRONT, md('::: {.callout-note}\nnever closed')], 'unclosed'),
    ([FRONT, md('text\n::: closes nothing')], 'opens nothing'),
    ([FRONT, FIGURE, FIGURE], 'fig-a is given twice'),
    ([FRONT, code('plot()', PICTURE)], 'figure without a caption'),
    ([FRONT, code('#| fig-cap: "A line."\nplot()', PICTURE)], 'without a fig- label'),
    ([FRONT, code('#| label: fig-a\n#| fig-cap: "A line."\nplot()')], 'caption without a stored figure'),
    ([FRONT, code('1/0', [{'output_type': 'error'}])], 'a stored error'),
    ([md('no front matter')], 'no title'),
    ([FRONT, md('```python\ndef f(x): # as [`g`](https://example.org/x/a.html#g)\n```')], 'a link within code'),
    ([FRONT, md('As <code>x: [`g`](https://example.org/x/a.html)</code> has it.')], 'a link within code'),
    ([FRONT, md('$$\\\\frac{1}{2}$$')], 'doubled backslashes'),
    ([FRONT, md('See `52_train`.')], '52_train is no page'),
])
def test_a_fault_is_found(tmp_path, cells, fault):
    found = problems(site(tmp_path, *cells))
    assert any(fault in line for line in found), found

def test_a_page_that_is_named_and_not_linked_is_found(tmp_path):
    site(tmp_path, FRONT, contents='a.ipynb, 10_blocks.ipynb')
    (tmp_path/'10_blocks.ipynb').write_text(json.dumps({'cells': [FRONT, md('As [`10_blocks`](10_blocks.ipynb) and `10_blocks` say.')]}))
    assert problems(tmp_path) == ['10_blocks.ipynb: 10_blocks is named and not linked']

def test_a_source_that_names_a_page_names_one_that_is_there():
    "`n_eval … measured, 52_train` points to nothing once that page has another name."
    said = {(m, page) for m, text in MODULES.items() for page in re.findall(r'#.*?\bmeasured, (\d\d_\w+)', text)}
    assert len(said) > 5
    assert not [f'{m}: measured, {page}' for m, page in sorted(said) if not (ROOT/'nbs'/f'{page}.ipynb').exists()]

@pytest.mark.parametrize('contents, fault', [('', 'not listed'), ('a.ipynb, b.ipynb', 'is no page'), ('a.ipynb, a.ipynb', 'listed twice')])
def test_a_wrong_sidebar_is_found(tmp_path, contents, fault):
    assert any(fault in line for line in problems(site(tmp_path, FRONT, contents=contents)))

@pytest.mark.parametrize('prose, word, target, meant', [
    ('Switch `noise` off.', 'noise', 'drawing.html#noise', False),
    ('`noise()` draws.', 'noise()', 'drawing.html#noise', True),
    ('It is in `train`.', 'train', 'train.html#train', False),
    ('`drift` anchors.', 'drift', 'losses.html#drift', True),
    ('`open_data` opens.', 'open_data', 'data.html#open_data', True),
    ('Set `ema_beta`.', 'ema_beta', 'guards.html#ema_beta', False),
    ('A `PairTerm`.', 'PairTerm', 'losses.html#pairterm', True),
])
def test_a_link_that_leads_astray_is_found(tmp_path, prose, word, target, meant):
    (tmp_path/'a.ipynb').write_text(json.dumps({'cells': [md(prose), code('from histogan.losses import drift')]}))
    (tmp_path/'shown.ipynb').write_text(json.dumps({'cells': [md(re.sub('`[^`]+`', f'[`{word}`](https://example.org/{target})', prose))]}))
    (link,) = automatic_links(tmp_path/'shown.ipynb', tmp_path/'a.ipynb')
    assert link == (word, f'https://example.org/{target}') and is_meant(*link, tmp_path/'a.ipynb', FIELDS) == meant

def test_a_link_in_a_printed_table_is_found(tmp_path):
    out = {'output_type': 'display_data', 'data': {'text/markdown': '| [`ema_beta`](https://example.org/guards.html#ema_beta) | 0.9995 |'}}
    (tmp_path/'a.ipynb').write_text(json.dumps({'cells': []}))
    (tmp_path/'shown.ipynb').write_text(json.dumps({'cells': [code('#| output: asis\ntable()', [out]), code('#| output: asis\nshow_doc(f)', [out])]}))
    assert automatic_links(tmp_path/'shown.ipynb', tmp_path/'a.ipynb') == [('ema_beta', 'https://example.org/guards.html#ema_beta')]
