"README.md is made from the landing page, by whichever command, and carries the two commands that everybody starts with."
import json, os, shutil, stat

import pytest

import readme
from conftest import run_python

COMMANDS = ['pip install -e . && python -m histogan.train',
            "pip install -e '.[dev]' && nbdev_export && nbdev_test && pytest tests"]

def page(*cells):
    "A notebook of (type, source) pairs."
    return {'cells': [{'cell_type': kind, 'source': source.splitlines(True)} for kind, source in cells]}

def test_readme_says_what_the_landing_page_says():
    assert readme.current(), 'README.md is stale: run `python tests/readme.py`'

@pytest.mark.parametrize('command', COMMANDS)
def test_command_is_a_whole_line_of_a_shell_block(command):
    text = readme.README.read_text(encoding='utf-8')
    blocks = [n['c'] for n in readme.nodes(json.loads(readme.pandoc(text, 'gfm', 'json'))) if n['t'] == 'CodeBlock']
    assert [b for b in blocks if 'sh' in b[0][1] and command in b[1].splitlines()]
    assert command in text.splitlines()

def test_a_changed_landing_page_makes_it_stale(tmp_path, monkeypatch):
    nb = json.loads(readme.INDEX.read_text(encoding='utf-8'))
    nb['cells'].append({'cell_type': 'markdown', 'source': ['one more line']})
    (tmp_path/'index.ipynb').write_text(json.dumps(nb), encoding='utf-8')
    monkeypatch.setattr(readme, 'INDEX', tmp_path/'index.ipynb')
    assert not readme.current()

def test_a_dead_link_makes_it_wrong(tmp_path, monkeypatch):
    text = readme.README.read_text(encoding='utf-8')
    monkeypatch.setattr(readme, 'README', tmp_path/'README.md')
    readme.README.write_text(text.replace('](nbs/', ']('), encoding='utf-8')
    assert not readme.current()

def test_relative_links_start_at_the_top():
    text = readme.render(page(('markdown', '[a](03_data.ipynb) [b](https://example.org) [c](#start)\n\n`d[0](e)`')))
    for link in ('[a](nbs/03_data.ipynb)', '[b](https://example.org)', '[c](#start)', 'd[0](e)'): assert link in text

def test_code_is_shown_and_hidden_code_is_not():
    text = readme.render(page(('code', '#| label: x\nshown = 1'), ('code', '#| hide\nhidden = 1')))
    assert '```python\nshown = 1\n```' in text and 'hidden' not in text and 'label' not in text

# Quarto is a program of its own, which machines that test need not have. This stands in for it: it renders the page that nbdev
# processed with pandoc and with the filters that _quarto.yml names for GitHub Markdown, into the place where Quarto puts it.
QUARTO = '''#!{python}
import json, pathlib, subprocess, sys, yaml
sys.path.insert(0, {tests!r})
import pypandoc, readme
here = pathlib.Path.cwd()
settings = yaml.safe_load((here/'_quarto.yml').read_text())
out = here/yaml.safe_load((here/'nbdev.yml').read_text())['project']['output-dir']
out.mkdir(exist_ok=True)
if '-t' in sys.argv:
    kind = sys.argv[sys.argv.index('-t') + 1]
    filters = [f'--lua-filter={{here/f}}' for f in settings['format'][kind].get('filters', [])]
    cells = [c for c in json.loads(pathlib.Path(sys.argv[2]).read_text())['cells'] if c['cell_type'] != 'raw']
    text = '# A title\\n\\n' + '\\n\\n'.join(map(readme.markdown, cells))
    run = [pypandoc.get_pandoc_path(), '-f', 'markdown-smart-implicit_figures', '-t', kind, *filters, '-o', str(out/'README.md')]
    subprocess.run(run, input=text, text=True, check=True)
else: (out/'index.html').write_text('<p>a site</p>')
'''

@pytest.mark.skipif(os.name == 'nt', reason='the stand-in for Quarto is a shell script')
@pytest.mark.parametrize('command', ['quarto:nbdev_readme', 'quarto:nbdev_docs', 'quarto:prepare'])
def test_nbdev_s_own_commands_leave_it_right(tree, monkeypatch, command):
    "What a contributor runs by habit writes the same text, with links that lead somewhere."
    import sys
    for notebook in (tree/'nbs').glob('[0-9t]*.ipynb'):  # one notebook to export and test is enough
        if notebook.stem != '43_dist': notebook.unlink()
    shutil.copytree(readme.ROOT/'histogan', tree/'histogan', dirs_exist_ok=True)
    (tree/'bin').mkdir()
    program = tree/'bin'/'quarto'
    program.write_text(QUARTO.format(python=sys.executable, tests=str(readme.ROOT/'tests')))
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    os.utime(tree/'README.md', (0, 0))  # older than the landing page: it has to be made
    module, function = command.split(':')
    env = {'PYTHONPATH': str(tree), 'PATH': f"{tree/'bin'}{os.pathsep}{os.environ['PATH']}"}
    code = f'if __name__ == "__main__":\n from nbdev.{module} import {function} as f\n getattr(f, "__wrapped__", f)()'
    (tree/'command.py').write_text(code)
    run = run_python([tree/'command.py'], cwd=tree, env=env, timeout=900)
    assert run.rc == 0, run.err
    made = (tree/'README.md').read_text(encoding='utf-8')
    assert '# A title' in made  # it was written anew
    assert readme.meaning(made) == readme.meaning(readme.expected())
    assert readme.dead_links(made) == []
