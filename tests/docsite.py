"""What can be wrong with the documentation before Quarto sees it: Quarto ends with success on most of these faults.

`problems(folder)` reads the pages that nbdev processed into a folder and returns one line for each fault."""
import json, re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from readme import nodes, pandoc

XREF = re.compile(r'(fig|tbl|sec|eq|lst|thm)-')

@dataclass
class Page:
    "What one processed notebook offers to links and asks of them."
    name: str                                   # file name in the folder
    meta: dict = field(default_factory=dict)    # its front matter
    anchors: set = field(default_factory=set)   # what a link may point to
    links: list = field(default_factory=list)   # targets of links and pictures
    refs: list = field(default_factory=list)    # names after an @
    prose: str = ''                             # its Markdown, printed tables and signatures included
    faults: list = field(default_factory=list)  # what is wrong within the page itself

def options(source):
    "The `#|` options of a code cell, as Quarto reads them."
    lines = [l[2:].strip() for l in source.splitlines() if re.match(r'#\|\s*[\w-]+:', l)]
    return yaml.safe_load('\n'.join(lines)) or {}

def add_figure(page, opts, outputs):
    "Record a code cell's label and see that a picture has a caption and a caption a picture."
    shown = opts.get('include', True) and opts.get('output', True)
    picture = shown and any(kind.startswith('image/') for out in outputs for kind in out.get('data', {}))
    label, caption = opts.get('label'), opts.get('fig-cap')
    if label in page.anchors: page.faults.append(f'the label {label} is given twice')
    if label: page.anchors.add(label)
    if picture and not caption: page.faults.append(f'a figure without a caption (label {label})')
    if picture and not str(label).startswith('fig-'): page.faults.append(f'a figure without a fig- label: {caption}')
    if caption and not picture: page.faults.append(f'a caption without a stored figure: {caption}')

FORMULA = re.compile(r'\${1,2}[^$]+\${1,2}')
NAMED = re.compile(r'(?<![\[\w/])`(\d\d_[a-z_]+)`(?!\])')

def reading_faults(text, names):
    "What a reader stumbles over: raw link markup in code, doubled backslashes in a formula, a page that is named and not linked."
    blocks = re.findall(r'```.*?```', text, re.S) + re.findall(r'<code>[^<]*', text)
    yield from (f'a link within code: {b[:60]!r}' for b in blocks if '](http' in b)
    for formula in FORMULA.findall(re.sub(r'```.*?```|`[^`]*`', '', text, flags=re.S)):
        if re.search(r'\\\\[a-zA-Z]{2,}', formula) and '\\begin' not in formula: yield f'doubled backslashes in a formula: {formula[:60]!r}'
    yield from (f'{name} is named and not linked' if name in names else f'{name} is no page' for name in NAMED.findall(text))

def add_prose(page, text):
    "Record the anchors, links and references of a page's Markdown."
    page.prose = text
    # a word in backticks within a link's text becomes a link in a link, which shows its brackets
    page.faults += [f'a link within a link: {word}' for word in re.findall(r'\[\[`([^`]+)`\]\(', text)]
    page.anchors |= set(re.findall(r'\{#([\w-]+)', text)) | set(re.findall(r'\bid="([^"]+)"', text))
    for node in nodes(json.loads(pandoc(text, 'markdown', 'json', page.faults))['blocks']):
        kind, content = node['t'], node.get('c')
        if kind == 'Header': page.anchors.add(content[1][0])
        elif kind in ('Link', 'Image'): page.links.append(content[2][0])
        elif kind == 'Cite': page.refs += [c['citationId'] for c in content[0]]
        elif kind == 'Str' and content.startswith(':::'): page.faults.append('a fence (:::) that opens nothing')

def read_page(path):
    "A processed notebook as a `Page`."
    page, prose = Page(path.name), []
    for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
        source, outputs = ''.join(cell['source']), cell.get('outputs', [])
        if cell['cell_type'] == 'markdown': prose.append(source)
        elif cell['cell_type'] == 'raw': page.meta = yaml.safe_load(source.strip().strip('-')) or {}
        else:
            opts = options(source)
            add_figure(page, opts, outputs)
            if any(out['output_type'] == 'error' for out in outputs): page.faults.append(f'a stored error: {source[:60]!r}')
            if opts.get('output') == 'asis': prose += [''.join(out.get('data', {}).get('text/markdown', '')) for out in outputs]
    add_prose(page, '\n\n'.join(prose))
    return page

def destination(link, page, pages, site, folder):
    "Name of the page or file that a link leads to; None when it leads outside."
    path = link.partition('#')[0]
    if path.startswith(site): path = path[len(site):].lstrip('/') or 'index.html'
    elif re.match(r'[a-z]+:', path): return None
    made = {p.meta.get('output-file'): name for name, p in pages.items()}
    if not path: return page.name
    return made.get(path) or (path if (folder/path).exists() else '')

def link_faults(page, pages, site, folder):
    "References and links of a page that lead nowhere."
    for ref in page.refs:
        if XREF.match(ref) and ref not in page.anchors: yield f'the reference @{ref} has no target on its page'
    for link in page.links:
        there, anchor = destination(link, page, pages, site, folder), link.partition('#')[2]
        if there == '': yield f'the link {link} leads to no page'
        elif anchor and there in pages and anchor not in pages[there].anchors: yield f'the link {link} has no such anchor'

def listed(contents):
    "The pages that a sidebar lists."
    for entry in contents:
        if isinstance(entry, str): yield entry
        else:
            if 'href' in entry: yield entry['href']
            yield from listed(entry.get('contents', []))

def load(path): return yaml.safe_load(path.read_text(encoding='utf-8'))

def problems(folder):
    "Every fault of a folder of processed pages, one line each."
    folder = Path(folder)
    missing = [name for name in load(folder/'_quarto.yml').get('metadata-files', []) if not (folder/name).exists()]
    if missing: return [f'_quarto.yml: {name} does not exist' for name in missing]
    pages = {path.name: read_page(path) for path in sorted(folder.glob('*.ipynb'))}
    side = list(listed(load(folder/'sidebar.yml')['website']['sidebar']['contents']))
    site = load(folder/'nbdev.yml')['website']['site-url']
    found = [f'sidebar.yml: {name} is not listed' for name in pages if name not in side]
    found += [f'sidebar.yml: {name} is listed but is no page' for name in side if name not in pages]
    found += [f'sidebar.yml: {name} is listed twice' for name in sorted(set(side)) if side.count(name) > 1]
    names = {Path(name).stem for name in pages}
    for name, page in pages.items():
        found += [f'{name}: {fault}' for fault in reading_faults(page.prose, names)]
        found += [f'{name}: no {key} in the front matter' for key in ('title', 'description') if not page.meta.get(key)]
        found += [f'{name}: {fault}' for fault in [*page.faults, *link_faults(page, pages, site, folder)]]
    return found

# nbdev makes a link of every word in backticks that is the name of a symbol, in whatever module that is

AUTO = re.compile(r'\[`([^`]+)`\]\(([^)\s]+)\)')
IMPORTED = re.compile(r'^\s*from histogan\.(\w+) import ([^(\n]+|\([^)]*\))', re.M)
ONE_THING = {('config', 'modern')}  # the preset and the function that makes it

def cells_of(path, kind):
    "The sources of a notebook's cells of one kind."
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    return [''.join(c['source']) for c in cells if c['cell_type'] == kind]

def in_reach(source):
    "(module, name) of what a notebook defines, or imports from the package."
    found, own = set(), source.stem.partition('_')[2]
    for text in cells_of(source, 'code'):
        found |= {(own, n) for n in re.findall(r'^(?:def|class) (\w+)|^(\w+) *=', text, re.M) for n in n if n}
        for module, names in IMPORTED.findall(text):
            found |= {(module, n.split(' as ')[0].strip()) for n in names.strip('()').replace('\n', ' ').split(',')}
    return found

def tables_of(path):
    "The Markdown that a processed page's own cells show, tables of fields among it; that of signatures left out."
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    own = [c for c in cells if c['cell_type'] == 'code' and 'show_doc(' not in ''.join(c['source'])]
    return [''.join(out['data']['text/markdown']) for c in own for out in c['outputs'] if 'text/markdown' in out.get('data', {})]

def automatic_links(processed, source):
    "(word, target) of the links that nbdev made in a page's prose; those of signatures left out."
    own = set(re.findall(r'\[`([^`]+)`\]\(', '\n'.join(cells_of(source, 'markdown'))))
    shown = [t for cell in [*cells_of(processed, 'markdown'), *tables_of(processed)] for t in cell.split('\n\n')
             if not t.startswith(('---\n', '### '))]
    return [(word, target) for word, target in AUTO.findall('\n'.join(shown)) if word not in own]

def is_meant(word, target, source, fields=()):
    "An automatic link must be to what is meant: a call, a name that is no word and no option, or something that the page defines or imports."
    if word.endswith(')') or '.' in word or re.search(r'[a-z][A-Z]|[A-Z][a-z]', word): return True
    link = Path(target.partition('#')[0]).stem, word
    return link in ONE_THING or link in in_reach(source) or ('_' in word and word not in fields)
