"The lines of Python on the landing page, run as they stand there."
import re

import pytest

import readme
from conftest import run_python
from histogan.phantom import make_phantom

BLOCKS = re.findall(r'^```python\n(.*?)^```', readme.README.read_text(encoding='utf-8'), re.S | re.M)

def test_there_are_two(): assert len(BLOCKS) == 2

def test_a_generator_in_five_lines(tmp_path):
    code = BLOCKS[0].replace("'nbs/ebhi_128'", repr(str(readme.ROOT/'nbs'/'ebhi_128')))
    run = run_python(['-c', code + "\nassert x.shape == (8, 3, 128, 128) and x.isfinite().all()"], cwd=tmp_path)
    assert run.rc == 0, run.err

def test_data_training_and_evaluation(tmp_path):
    make_phantom(tmp_path/'patches', 12, 32, seed=0)
    make_phantom(tmp_path/'synth', 12, 32, seed=1)
    (tmp_path/'code.py').write_text(BLOCKS[1])
    run = run_python(['code.py'], cwd=tmp_path)
    assert run.rc == 0, run.err
    assert 'recall' in run.out and (tmp_path/'run'/'checkpoints').is_dir()
