"""A slider of the page `70_explore` moves in JupyterLab and its picture changes: a server, a kernel and a browser, as a reader has them."""
import contextlib, json, os, re, shutil, socket, subprocess, sys, time

import pytest

from conftest import ROOT, free_port

webdriver = pytest.importorskip('selenium.webdriver', reason='selenium is not installed')
pytest.importorskip('jupyterlab', reason='JupyterLab is not installed')

BROWSER = shutil.which('chromium') or shutil.which('google-chrome')
DRIVER = shutil.which('chromedriver')

@contextlib.contextmanager
def lab(folder):
    "JupyterLab over a folder; yields its address."
    port = free_port()
    args = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', f'--port={port}', '--ServerApp.token=', '--ServerApp.password=',
            '--ServerApp.ip=127.0.0.1', '--LabApp.news_url=', '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate', f'--ServerApp.root_dir={folder}']
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'JUPYTER_CONFIG_DIR': str(folder/'.config'), 'JUPYTER_DATA_DIR': str(folder/'.data')}
    with open(folder/'lab.log', 'w') as log: server = subprocess.Popen(args, cwd=folder, env=env, stdout=log, stderr=log)
    try:
        for _ in range(240):
            with contextlib.suppress(OSError), socket.create_connection(('127.0.0.1', port), 1): break
            if server.poll() is not None: pytest.fail((folder/'lab.log').read_text()[-2000:])
            time.sleep(.5)
        yield f'http://127.0.0.1:{port}'
    finally:
        server.terminate()
        try: server.wait(20)
        except subprocess.TimeoutExpired: server.kill()

@contextlib.contextmanager
def browser(folder):
    "A headless Chromium with a profile of its own."
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ('--headless', '--no-sandbox', '--disable-gpu', '--window-size=1280,1000', '--disable-background-networking', '--disable-component-update',
                 '--disable-sync', '--no-first-run', f'--user-data-dir={folder/"profile"}'): options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try: yield driver
    finally: driver.quit()

def wait_for(driver, script, seconds=180):
    "The value of a JavaScript expression, once it is true."
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := driver.execute_script(f'return {script}'): return found
        time.sleep(.5)
    raise AssertionError(f'never true within {seconds} s: {script}')

def again(act):
    "What `act` gives, tried anew while the page exchanges the element it acts on."
    from selenium.common.exceptions import StaleElementReferenceException
    for _ in range(40):
        with contextlib.suppress(StaleElementReferenceException): return act()
        time.sleep(.25)
    return act()

def page_with(*names):
    "The notebook 70_explore up to the first slider that draws with one of these functions, without its tests."
    nb, cells = json.loads((ROOT/'nbs'/'70_explore.ipynb').read_text(encoding='utf-8')), []
    for c in nb['cells']:
        source = ''.join(c['source'])
        if c['cell_type'] == 'code' and ('export' in source.split('\n')[0] or source.startswith('#| hide\nimport matplotlib')): cells.append(c)
        if '#| hide' not in source and any(re.search(rf'^slide\(\s*{n}\b', source, re.M) for n in names): return nb | dict(cells=[*cells, c])
    raise AssertionError(f'no slider for {names}')

HANDLE = "document.querySelector('.jp-OutputArea .noUi-handle')"
PICTURE = "document.querySelector('.jp-OutputArea .widget-output img, .jp-OutputArea .jp-OutputArea-output img')"

@pytest.mark.skipif(not (BROWSER and DRIVER), reason='no chromium with a chromedriver')
def test_a_slider_moves_and_the_picture_changes(tmp_path):
    (tmp_path/'page.ipynb').write_text(json.dumps(page_with('draw_guards')), encoding='utf-8')
    with lab(tmp_path) as address, browser(tmp_path) as driver:
        driver.get(f'{address}/lab/tree/page.ipynb')
        try: wait_for(driver, "document.querySelector('.jp-Notebook .jp-CodeCell') !== null && document.querySelector('.jp-Notebook-ExecutionIndicator[data-status=idle]') !== null", 90)
        except AssertionError: pytest.skip('this machine is too busy: JupyterLab did not open within 90 s')
        from selenium.webdriver.common.action_chains import ActionChains
        from selenium.webdriver.common.keys import Keys
        again(lambda: driver.find_element('css selector', '.jp-Notebook .jp-CodeCell').click())
        for _ in range(len(json.loads((tmp_path/'page.ipynb').read_text())['cells'])):
            ActionChains(driver).key_down(Keys.SHIFT).send_keys(Keys.ENTER).key_up(Keys.SHIFT).perform()
            time.sleep(.2)
        try: wait_for(driver, f'{HANDLE} !== null', 120)
        except AssertionError: pytest.skip('this machine is too busy: JupyterLab drew no slider within two minutes')
        before = wait_for(driver, f'{PICTURE} && {PICTURE}.src')
        driver.execute_script(f'{HANDLE}.scrollIntoView({{block: "center"}}); {HANDLE}.focus()')
        def press():
            driver.execute_script(f'{HANDLE}.focus()')
            driver.switch_to.active_element.send_keys(Keys.ARROW_LEFT)
        for _ in range(8): again(press)
        after = wait_for(driver, f'{PICTURE} && {PICTURE}.src !== {json.dumps(before)} && {PICTURE}.src')
        driver.save_screenshot(str(tmp_path/'page.png'))
    assert after.startswith('data:image/png;base64,') and after != before
