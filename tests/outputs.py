"""What a page shows, computed again: `python outputs.py PAGE.ipynb…` prints {page: {cell: [outputs]}} as JSON.

An output is its text, or that it is a picture; warnings and cells that the tests leave out are left out here too."""
import json, os, re, sys, time
from pathlib import Path

SHOWN = ('text/markdown', 'text/plain')

def told(outputs):
    "The outputs of a cell as comparable texts: a table of Markdown before its plain form, a picture as such."
    found = []
    for out in outputs:
        if out['output_type'] == 'stream':
            if out.get('name') != 'stderr': found.append(''.join(out['text']))
            continue
        data = out.get('data', {})
        picture = [kind for kind in data if kind.startswith('image/')]
        text = next((''.join(data[kind]) for kind in SHOWN if kind in data), '')
        found.append('a picture' if picture else text)
    return [text.strip() for text in found if text.strip()]

def saved(page):
    "Cell -> what is stored with a page."
    cells = json.loads(Path(page).read_text(encoding='utf-8'))['cells']
    return {c['id']: told(c['outputs']) for c in cells if c['cell_type'] == 'code' and not left_out(''.join(c['source']))}

def left_out(source):
    "Does a cell not run in tests, or export?"
    return bool(re.search(r'^#\|\s*(eval:\s*false|slow|gpu)', source, re.M)) or 'nbdev_export(' in source

def computed(page):
    "Cell -> what its code shows today."
    from execnb.shell import CaptureShell
    shell, found = CaptureShell(Path(page)), {}
    for cell in json.loads(Path(page).read_text(encoding='utf-8'))['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] != 'code' or left_out(source): continue
        outputs = shell.run(source)
        if shell.exc: raise RuntimeError(f'{page}, cell {cell["id"]}: {shell.exc!r}')
        found[cell['id']] = told(outputs)
    return found

NUMBER = re.compile(r'(?<![\w.])-?\d[\d,]*\.?\d*(?:e[+-]?\d+)?|(?<=[a-zA-Z/_=])\d+\.\d+')
VOLATILE = re.compile(r' at 0x[0-9a-f]+|/tmp/\S+|\b[0-9a-f]{8,}\b')

def same(a, b, rel=.02, absolute=2e-3):
    "Do two texts say the same, numbers within a tolerance and addresses aside?"
    a, b = (VOLATILE.sub('', t) for t in (a, b))
    words = [re.sub(r'[\s-]+', ' ', NUMBER.sub('#', t)) for t in (a, b)]
    if words[0] != words[1]: return False
    x, y = ([float(n.replace(',', '')) for n in NUMBER.findall(t)] for t in (a, b))
    return len(x) == len(y) and all(abs(p - q) <= absolute + rel*max(abs(p), abs(q)) for p, q in zip(x, y))

if __name__ == '__main__':
    os.environ.setdefault('IN_TEST', '1')
    result = {}
    for page in sys.argv[1:]:
        began = time.perf_counter()
        result[page] = computed(page)
        print(page, round(time.perf_counter() - began, 1), file=sys.stderr)
    print('\n' + json.dumps(result))
