"A page as a browser shows it: what it complains about, and how wide it gets."
import json, os, re, shutil, subprocess, tempfile
from pathlib import Path

import pytest

OPTIONS = '''--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --hide-scrollbars --enable-logging=stderr'''.split()
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
PROBE = '''<script>addEventListener('load', () => parent.postMessage(JSON.stringify({
  width: document.documentElement.clientWidth, needed: document.documentElement.scrollWidth,
  pictures: document.images.length, broken: [...document.images].filter(i => !i.naturalWidth).length, mute: [...document.images].filter(i => !i.alt).length,
  headings: [...document.querySelectorAll('h1,h2,h3,h4')].map(h => +h.tagName[1]),
  wide: [...document.querySelectorAll('table,pre')].filter(t => t.scrollWidth > document.documentElement.clientWidth).length}), '*'))</script>'''
FRAME = '''<body><pre id=said></pre><iframe src="framed.html" width={width} height=4000></iframe>
<script>addEventListener('message', e => said.textContent = 'said ' + e.data + ' end')</script>'''

def chromium(page, *options):
    "Open a file headless and return what Chromium wrote: (stdout, stderr)."
    program = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if not program: pytest.skip('no Chromium on this machine')
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run([program, *OPTIONS, f'--user-data-dir={profile}', *options, Path(page).resolve().as_uri()], capture_output=True, text=True, timeout=120,
                              env={**os.environ, 'HOME': profile})
    return done.stdout, done.stderr

def complaints(page):
    "Lines that the page left on the console."
    return [line for line in chromium(page, '--window-size=1280,2000', '--dump-dom')[1].splitlines() if 'CONSOLE' in line]

def seen_at(page, width, folder):
    "What the page measures in a frame of so many px: width, needed, pictures, broken, mute, headings, wide."
    html = Path(page).read_text(encoding='utf-8')
    (folder/'framed.html').write_text(POLICY.sub('', html).replace('</body>', PROBE + '</body>'), encoding='utf-8')
    (folder/'frame.html').write_text(FRAME.format(width=width), encoding='utf-8')
    out, err = chromium(folder/'frame.html', '--window-size=1400,1000', '--virtual-time-budget=5000', '--dump-dom')
    said = re.search(r'said (\{.*\}) end', out)
    assert said, err[-2000:]
    return json.loads(said[1])
