"""Write README.md from the landing page: `python tests/readme.py` writes it, `--check` compares and exits 1 when it is stale.

`nbdev_readme`, `nbdev_docs` and `nbdev_prepare` write it too, with Quarto. Both ways use the filter nbs/readme.lua for links,
lay the text out differently and say the same, which is what `--check` compares."""
import json, re, subprocess, sys
from pathlib import Path

import pypandoc

ROOT = Path(__file__).resolve().parent.parent
INDEX, README, FILTER = ROOT/'nbs'/'index.ipynb', ROOT/'README.md', ROOT/'nbs'/'readme.lua'
NOTE = '<!-- Made from nbs/index.ipynb by tests/readme.py: edit that notebook, not this file. -->\n\n'

def pandoc(text, source, target, warnings=None, filters=()):
    "Convert `text` with the pandoc that pypandoc_binary carries; its warnings are appended to `warnings`."
    args = [pypandoc.get_pandoc_path(), '-f', source, '-t', target, '--wrap=none', *(f'--lua-filter={f}' for f in filters)]
    done = subprocess.run(args, input=text, capture_output=True, text=True, encoding='utf-8', check=True)
    if warnings is not None: warnings += re.findall(r'^\[WARNING\] (.+)', done.stderr, re.M)
    return done.stdout

def nodes(tree):
    "Every element of a pandoc document, parents first."
    if isinstance(tree, dict):
        if 't' in tree: yield tree
        tree = list(tree.values())
    if isinstance(tree, list):
        for branch in tree: yield from nodes(branch)

def fence(text, language=''): return f'```{language}\n{text.rstrip()}\n```'

def output(out):
    "Markdown of one stored output; a picture becomes a line that says where to see it."
    if out['output_type'] == 'stream': return fence(''.join(out['text']))
    data = out.get('data', {})
    if any(kind.startswith('image/') for kind in data): return '*The figure is in [the notebook](index.ipynb).*'
    if 'text/markdown' in data: return ''.join(data['text/markdown'])
    return fence(''.join(data.get('text/plain', '')))

def markdown(cell):
    "Markdown of one notebook cell: prose as it stands, code without its directives and with its outputs."
    source = ''.join(cell['source'])
    if cell['cell_type'] != 'code': return source if cell['cell_type'] == 'markdown' else ''
    options = set(re.findall(r'^#\|\s*(.+?)\s*$', source, re.M))
    if options & {'hide', 'export'}: return ''
    code = re.sub(r'^#\|.*\n?', '', source, flags=re.M).strip()
    shown = [fence(code, 'python')] if code and 'echo: false' not in options else []
    return '\n\n'.join(shown + [output(o) for o in cell.get('outputs', [])])

def render(nb):
    "GitHub Markdown of a notebook, its relative links made to start at the top of the project."
    text = pandoc('\n\n'.join(map(markdown, nb['cells'])), 'markdown-smart-implicit_figures', 'gfm', filters=[FILTER])
    return NOTE + re.sub(r'^(`{3,}) (\w)', r'\1\2', text, flags=re.M)

def expected(): return render(json.loads(INDEX.read_text(encoding='utf-8')))

def words(block):
    "The text of a piece of a document, links and layout left out."
    kinds = dict(Str=lambda c: c, Code=lambda c: c[1], CodeBlock=lambda c: c[1], Math=lambda c: c[1], Space=lambda c: ' ', SoftBreak=lambda c: ' ')
    return ''.join(kinds[n['t']](n['c'] if 'c' in n else None) for n in nodes(block) if n['t'] in kinds)

def meaning(text):
    "What a Markdown text says, whoever laid it out: title, sentence and generated notes left out."
    blocks = json.loads(pandoc(text, 'gfm', 'json'))['blocks']
    said = [b for b in blocks if b['t'] not in ('RawBlock', 'BlockQuote') and not (b['t'] == 'Header' and b['c'][0] == 1)]
    return [re.sub(r'\s+', ' ', words(b)).strip() for b in said]

def dead_links(text):
    "Relative links and pictures of a Markdown text that lead to no file from the top of the project."
    targets = [n['c'][2][0] for n in nodes(json.loads(pandoc(text, 'gfm', 'json'))['blocks']) if n['t'] in ('Link', 'Image')]
    return [t for t in targets if not re.match(r'[a-z]+:|#', t) and not (ROOT/t.partition('#')[0]).exists()]

def current():
    "README.md says what the landing page says, and its links lead somewhere."
    if not README.exists(): return False
    text = README.read_text(encoding='utf-8')
    return meaning(text) == meaning(expected()) and not dead_links(text)

def main(argv):
    if '--check' not in argv: README.write_text(expected(), encoding='utf-8')
    elif not current(): sys.exit('README.md does not say what nbs/index.ipynb says: run `python tests/readme.py`')

if __name__ == '__main__': main(sys.argv[1:])
