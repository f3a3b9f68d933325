"The hour on a GPU, at a size for a CPU: every slice runs to its end, goes on where it stopped, and says why it left something out."
import json

import pytest

from conftest import ROOT, run_python
from histogan.phantom import make_phantom

NOT_THERE = 'staintools spams lpips torch_fidelity imagehash huggingface_hub ipywidgets IPython timm'.split()  # the machine need not have them

def hour(*args, out):
    "A slice, in a process that has only what the machine will have."
    code = f'import sys; [sys.modules.__setitem__(m, None) for m in {NOT_THERE}]; sys.path.insert(0, {str(ROOT/"tests")!r}); import gpu_hour; sys.exit(gpu_hour.main(sys.argv[1:]))'
    done = run_python(['-c', code, *args, '--toy', '--out', out])
    assert done.rc == 0, done.err
    return done.out, json.loads((out/f'{args[0]}.json').read_text())

def failed(table): return {k: p['failed'] for k, p in table['parts'].items() if p['ok'] is False}

def test_checks(tmp_path):
    said, table = hour('checks', out=tmp_path)
    assert not failed(table) and table['parts']['bits modern']['found'] == dict(again=True, resumed=True)
    assert table['parts']['fp16 poc']['ok'] or 'CUDA' in table['parts']['fp16 poc']['skipped']

def test_bench_goes_on_where_it_stopped(tmp_path):
    said, table = hour('bench', '--minutes', '0', out=tmp_path)
    assert not table['parts'] and len(table['left']) == 6
    said, table = hour('bench', out=tmp_path)
    assert not failed(table) and not table['left']
    cell = table['parts']['modern, batch 8']['found']['forms']
    assert {'float32', 'bf16', 'plain'} <= set(cell) and all(0 < c['images_per_second'] and 0 < c['share_of_peak'] for c in cell.values())
    before = (tmp_path/'bench.json').read_text()
    assert 'done (' not in hour('bench', out=tmp_path)[0] and json.loads(before)['parts'] == json.loads((tmp_path/'bench.json').read_text())['parts']

@pytest.mark.parametrize('name', ['phantom-S', 'real-M'])
def test_training(name, tmp_path):
    root = make_phantom(tmp_path/'patches', 8, 32, seed=3)
    said, table = hour(name, *['--real', root] if 'real' in name else [], out=tmp_path)
    assert not failed(table) and table['parts']['train']['found']['last_step'] == 4
    assert {'precision', 'recall', 'coverage'} <= set(table['parts']['judge']['found'])
    assert 0 < (tmp_path/f'{name}.jpg').stat().st_size < 16*2**20

def test_a_training_saves_when_its_time_is_up_and_goes_on(tmp_path):
    "Whatever opening it took: with no time at all it saves after its first step."
    said, table = hour('phantom-S', '--minutes', '0', out=tmp_path)
    assert not failed(table) and 'interrupted at step 1 and saved' in table['parts']['train']['found']['ended'] and 'train' in table['left']
    said, table = hour('phantom-S', out=tmp_path)
    assert not failed(table) and table['parts']['train']['found']['last_step'] == 4 and not table['left']

def test_a_part_begins_only_if_it_will_end_in_time():
    import gpu_hour
    table = dict(parts={'a': dict(seconds=30.), 'b': dict(seconds=90.)})
    assert [gpu_hour.lasts(table, k) for k in 'abc'] == [30, 90, 90] and gpu_hour.lasts(dict(parts={}), 'a') == 0

def test_without_real_patches_it_says_so(tmp_path):
    assert '--real' in hour('real-S', out=tmp_path)[1]['parts']['train']['skipped']
