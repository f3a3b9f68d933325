"README.md is made from the landing page and carries the two commands that everybody starts with."
import json

import pytest

import readme

COMMANDS = ['pip install -e . && python -m histogan.train',
            "pip install -e '.[dev]' && nbdev_export && nbdev_test && pytest tests"]

def page(*cells):
    "A notebook of (type, source) pairs."
    return {'cells': [{'cell_type': kind, 'source': source.splitlines(True)} for kind, source in cells]}

def test_readme_says_what_the_landing_page_says():
    assert readme.current(), 'README.md is stale: run `python tests/readme.py`'

@pytest.mark.parametrize('command', COMMANDS)
def test_command_is_a_whole_line_of_a_shell_block(command):
    blocks = [n['c'] for n in readme.nodes(readme.meaning(readme.README.read_text(encoding='utf-8'))) if n['t'] == 'CodeBlock']
    assert [b for b in blocks if 'sh' in b[0][1] and command in b[1].splitlines()]
    assert command in readme.README.read_text(encoding='utf-8').splitlines()

def test_a_changed_landing_page_makes_it_stale(tmp_path, monkeypatch):
    nb = json.loads(readme.INDEX.read_text(encoding='utf-8'))
    nb['cells'].append({'cell_type': 'markdown', 'source': ['one more line']})
    (tmp_path/'index.ipynb').write_text(json.dumps(nb), encoding='utf-8')
    monkeypatch.setattr(readme, 'INDEX', tmp_path/'index.ipynb')
    assert not readme.current()

def test_relative_links_start_at_the_top():
    text = readme.render(page(('markdown', '[a](03_data.ipynb) [b](https://example.org) [c](#start)\n\n`d[0](e)`')))
    for link in ('[a](nbs/03_data.ipynb)', '[b](https://example.org)', '[c](#start)', 'd[0](e)'): assert link in text

def test_code_is_shown_and_hidden_code_is_not():
    text = readme.render(page(('code', '#| label: x\nshown = 1'), ('code', '#| hide\nhidden = 1')))
    assert '```python\nshown = 1\n```' in text and 'hidden' not in text and 'label' not in text
