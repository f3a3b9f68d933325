"What is stored with a page is what the code above it shows: the cheap pages are run again and compared."
import json

import pytest

from conftest import ROOT, run_python
from outputs import same, saved

CHEAP = ('01_arrays', '02_folders', '02_manifest', '02_prepared', '03_batches', '07_chunks', '08_page', '40_guards', '50_config')

@pytest.fixture(scope='module')
def shown():
    "Page -> cell -> what its code shows, all in one process."
    run = run_python([ROOT/'tests'/'outputs.py', *(f'{p}.ipynb' for p in CHEAP)], cwd=ROOT/'nbs', timeout=300)
    assert run.rc == 0, run.err
    return json.loads(run.out.splitlines()[-1])

@pytest.mark.parametrize('page', CHEAP)
def test_saved_outputs_are_those_of_the_code(shown, page):
    stored, found = saved(ROOT/'nbs'/f'{page}.ipynb'), shown[f'{page}.ipynb']
    assert any(stored.values())
    wrong = [k for k in found if len(found[k]) != len(stored[k]) or not all(map(same, found[k], stored[k]))]
    assert not wrong, '\n'.join(f'{k}: stored {stored[k]}, shown {found[k]}'[:600] for k in wrong)

@pytest.mark.parametrize('a, b, equal', [
    ('loss 0.512', 'loss 0.514', True), ('loss 0.512', 'loss 0.6', False), ('3 of 8', '5 of 8', False),
    ("{'a': 1.0}", "{'b': 1.0}", False), ('1,000 rows', '1,001 rows', True), ('<f at 0x7f3a>', '<f at 0x11>', True),
    ('a picture', 'a table', False), ('-0.2', '0.2', False), ('x', '', False),
])
def test_a_stale_output_is_found(a, b, equal): assert same(a, b) == equal
