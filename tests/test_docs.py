"The documentation as nbdev hands it to Quarto: processed in a copy of the tree and checked without Quarto."
import json

import pytest

from conftest import ROOT, copy_tree, run_python
from docsite import listed, load, problems

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
    ([FRONT, md('[x](a.ipynb#none)')], 'a.ipynb#none has no such anchor'),
    ([FRONT, md('::: {.callout-note}\nnever closed')], 'unclosed'),
    ([FRONT, md('text\n::: closes nothing')], 'opens nothing'),
    ([FRONT, FIGURE, FIGURE], 'fig-a is given twice'),
    ([FRONT, code('plot()', PICTURE)], 'figure without a caption'),
    ([FRONT, code('#| fig-cap: "A line."\nplot()', PICTURE)], 'without a fig- label'),
    ([FRONT, code('#| label: fig-a\n#| fig-cap: "A line."\nplot()')], 'caption without a stored figure'),
    ([FRONT, code('1/0', [{'output_type': 'error'}])], 'a stored error'),
    ([md('no front matter')], 'no title'),
])
def test_a_fault_is_found(tmp_path, cells, fault):
    found = problems(site(tmp_path, *cells))
    assert any(fault in line for line in found), found

@pytest.mark.parametrize('contents, fault', [('', 'not listed'), ('a.ipynb, b.ipynb', 'is no page'), ('a.ipynb, a.ipynb', 'listed twice')])
def test_a_wrong_sidebar_is_found(tmp_path, contents, fault):
    assert any(fault in line for line in problems(site(tmp_path, FRONT, contents=contents)))
