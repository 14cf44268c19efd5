"""Stable Diffusion against diffusers and transformers, with the same random weights."""

import copy
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cmd_jax import stable_diffusion
from cmd_jax.diffusion import guide, sample
from cmd_jax.errors import UserError
from cmd_jax.models import convolution
from cmd_jax.parallel.mesh import make_mesh
from cmd_jax.stable_diffusion.frames import decode_frames

pytestmark = pytest.mark.parity


@pytest.fixture(scope='module')
def torch():
    import torch

    torch.set_grad_enabled(False)
    yield torch
    torch.set_grad_enabled(True)


@pytest.fixture(scope='module', params=['sd1', 'sd2'])
def both(request, torch, tmp_path_factory):
    """(folder, diffusers' parts by name, our pipeline)."""
    from tests import make_stable_diffusion

    folder = tmp_path_factory.mktemp(request.param) / 'model'
    parts = make_stable_diffusion.write(folder, request.param)
    return folder, parts, load(folder)


def load(folder, **kwargs):
    return stable_diffusion.load(folder, mesh=make_mesh(devices=jax.devices()[:1]), **kwargs)


def draw(*shape, seed=0):
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def channels_first(x):
    return np.ascontiguousarray(np.moveaxis(x, -1, 1))


def check(ours, theirs, tolerance=1e-4):
    """The largest difference, relative to the largest value; `pytest -m parity -s` shows it."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    print(f' error {error:.1e}', end='')
    assert error < tolerance


# 9 x 13 does not halve evenly: what comes up again has to have the size that went down.
@pytest.mark.parametrize('size', [(8, 16), (9, 13)])
def test_unet(both, torch, size):
    _, parts, ours = both
    x, text, t = draw(2, *size, 4), draw(2, 77, 24, seed=1), np.array([3.0, 981.0], np.float32)
    theirs = parts['unet'](
        torch.from_numpy(channels_first(x)), torch.from_numpy(t), torch.from_numpy(text)
    ).sample
    out = jax.jit(ours.unet)(x, t, text)
    check(out, np.moveaxis(theirs.numpy(), 1, -1))


def test_vae(both, torch):
    _, parts, ours = both
    images, latents = draw(2, 16, 24, 3), draw(2, 8, 12, 4, seed=1)
    theirs = parts['vae'].encode(torch.from_numpy(channels_first(images))).latent_dist
    mean, log_variance = jax.jit(ours.vae.moments)(images)
    check(mean, np.moveaxis(theirs.mean.numpy(), 1, -1))
    check(log_variance, np.moveaxis(theirs.logvar.numpy(), 1, -1))
    decoded = parts['vae'].decode(torch.from_numpy(channels_first(latents))).sample
    check(jax.jit(ours.vae.decode)(latents), np.moveaxis(decoded.numpy(), 1, -1))


def test_convolutions_that_spare_products(both, torch, monkeypatch):
    """In all layers, as the widths of these networks are too small for them by themselves."""
    monkeypatch.setattr(convolution, 'TILES', 1)
    monkeypatch.setattr(convolution, 'CHANNELS', 1)
    _, parts, ours = both
    x, text, t = draw(2, 9, 20, 4), draw(2, 77, 24, seed=1), np.array([3.0, 981.0], np.float32)
    theirs = parts['unet'](
        torch.from_numpy(channels_first(x)), torch.from_numpy(t), torch.from_numpy(text)
    ).sample
    unet, vae = (convolution.quick_convolutions(part) for part in (ours.unet, ours.vae))
    assert convolution.MARK in str(jax.make_jaxpr(unet)(x, t, text))
    check(jax.jit(unet)(x, t, text), np.moveaxis(theirs.numpy(), 1, -1))
    decoded = parts['vae'].decode(torch.from_numpy(channels_first(x))).sample
    check(jax.jit(vae.decode)(x), np.moveaxis(decoded.numpy(), 1, -1))


# Three tiles by two; tiles at the edge of one latent and of seven; one tile, and none to split.
@pytest.mark.parametrize('size', [(9, 19), (13, 6), (7, 15), (8, 8), (5, 7)])
def test_tiled_decoding(both, torch, size):
    _, parts, ours = both
    latents = draw(2, *size, 4)
    theirs = copy.deepcopy(parts['vae'])
    theirs.enable_tiling()
    theirs.tile_latent_min_size, theirs.tile_sample_min_size = 8, 16
    decoded = theirs.decode(torch.from_numpy(channels_first(latents))).sample
    scaled = latents[:, None] * ours.vae.scaling_factor
    decode = jax.jit(decode_frames, static_argnames=('at_once', 'tile'))
    images = decode(ours.vae, scaled, at_once=1, tile=8)[:, 0]
    check(images, np.moveaxis(decoded.numpy(), 1, -1))
    whole = decode(ours.vae, scaled, at_once=1)[:, 0]
    assert (max(size) > 8) == (np.abs(whole - images).max() > 1e-2), 'tiles are seen'


def test_text_encoder(both, torch):
    _, parts, ours = both
    ids = ours.tokenize(['a seven moving up and right', ''])
    theirs = parts['text_encoder'](torch.from_numpy(ids).long())
    hidden, pooled = jax.jit(ours.text_encoder)(ids)
    check(hidden, theirs.last_hidden_state)
    check(pooled, theirs.pooler_output)


def test_trajectory_with_guidance(both, torch):
    """Ten steps of DDIM at guidance 7.5; epsilon in 1.x, v in 2.x."""
    _, parts, ours = both
    text, null = draw(1, 77, 24, seed=1), draw(1, 77, 24, seed=2)
    start = draw(1, 8, 16, 4)
    scheduler, x = parts['scheduler'], torch.from_numpy(channels_first(start))
    scheduler.set_timesteps(10)
    assert scheduler.timesteps.tolist() == list(range(901, 0, -100))
    context = torch.from_numpy(np.concatenate([null, text]))
    for t in scheduler.timesteps:
        low, high = parts['unet'](torch.cat([x, x]), t, context).sample.chunk(2)
        x = scheduler.step(low + 7.5 * (high - low), t, x).prev_sample

    @jax.jit
    def run(unet, x):
        denoise = guide(unet, text, null, 7.5, learn_sigma=False)
        options = dict(steps=10, offset=1, final_alpha_one=False)
        return sample(denoise, x, ours.process, **options)

    assert ours.process.prediction == ('epsilon' if 'sd1' in str(ours.folder) else 'v')
    check(run(ours.unet, jnp.asarray(start)), np.moveaxis(x.numpy(), 1, -1), 1e-3)


def params(module):
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), params(a), params(b)))


def test_half_precision_files(both, torch, tmp_path):
    """fp16 and sharded bf16 files hold the rounded values."""
    folder, parts, ours = both
    for dtype, options in (
        (torch.float16, dict(variant='fp16')),
        (torch.bfloat16, dict(max_shard_size='100KB')),
    ):
        other = tmp_path / str(dtype)
        shutil.copytree(folder, other)
        shutil.rmtree(other / 'unet')
        half = parts['unet'].__class__.from_config(parts['unet'].config)
        half.load_state_dict(parts['unet'].state_dict())
        half.to(dtype).save_pretrained(other / 'unet', **options)
        name = str(dtype).removeprefix('torch.')
        rounded = jax.tree.map(lambda x, n=name: x.astype(n).astype(x.dtype), params(ours.unet))
        found = params(load(other, parts=['unet']).unet)
        assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), rounded, found))
    assert len(list((other / 'unet').glob('*.safetensors'))) > 1, 'it was sharded'


def test_old_names_of_the_vae(both, torch, tmp_path):
    """Old files: query, key, value, proj_attn, as 1x1 convolutions, and a position_ids buffer."""
    from safetensors.torch import load_file, save_file

    folder, _, ours = both
    shutil.copytree(folder, tmp_path / 'old')
    path = tmp_path / 'old/vae/diffusion_pytorch_model.safetensors'
    old = {}
    for name, x in load_file(path).items():
        if 'attentions' in name:
            for new, word in (('to_q', 'query'), ('to_k', 'key'), ('to_v', 'value')):
                name = name.replace(new, word)
            name = name.replace('to_out.0', 'proj_attn')
            x = x[:, :, None, None].contiguous() if x.ndim == 2 else x
        old[name] = x
    assert old.keys() != load_file(path).keys()
    save_file(old, path)
    path = tmp_path / 'old/text_encoder/model.safetensors'
    text = load_file(path) | {'text_model.embeddings.position_ids': torch.arange(77)[None]}
    save_file(text, path)
    found = load(tmp_path / 'old', parts=['vae', 'text_encoder'])
    assert same(found.vae, ours.vae) and same(found.text_encoder, ours.text_encoder)


def test_what_we_save_loads_anywhere(both, torch, tmp_path):
    """Bit for bit here, and in diffusers and transformers with the same output."""
    import diffusers
    import transformers

    _, parts, ours = both
    stable_diffusion.save(ours, tmp_path / 'saved')
    again = load(tmp_path / 'saved')
    for name in ('unet', 'vae', 'text_encoder'):
        assert same(getattr(again, name), getattr(ours, name))
    x, text = torch.from_numpy(draw(1, 4, 8, 16)), torch.from_numpy(draw(1, 77, 24, seed=1))
    theirs = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / 'saved/unet')
    check(theirs(x, 7, text).sample, parts['unet'](x, 7, text).sample, 1e-6)
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path / 'saved/vae')
    check(theirs.decode(x).sample, parts['vae'].decode(x).sample, 1e-6)
    theirs = transformers.CLIPTextModel.from_pretrained(tmp_path / 'saved/text_encoder')
    ids = torch.from_numpy(ours.tokenize(['an eight'])).long()
    wanted = parts['text_encoder'](ids).last_hidden_state
    check(theirs(ids).last_hidden_state, wanted, 1e-6)


WORDS = (
    "a|Seven|the digit thing|12,5|it's|WE'LL|'d'|don\u2019t|#1!?|_x_|&amp;|&#39;|<b>|"
    'caf\u00e9|cafe\u0301|na\u00efve|\u03a3\u039f\u03a6\u039f\u03a3|\u0130|\u00bd|\ufb01|\u4e2d\u6587|'
    '\u0e17\u0e35\u0e48|\u0627\u0644|\U0001f600|\U0001f469\u200d\U0001f680|\u00a0|\t\n|\u200b|\u3000'
).split('|') + ['<|endoftext|>']


def test_tokens(both, caplog):
    """200 varied prompts against transformers and plain Python; a long one tells what is lost."""
    import transformers

    from tests import clip_bpe

    folder, _, ours = both
    random = np.random.RandomState(0)
    prompts = [
        random.choice([' ', '']).join(random.choice(WORDS, random.randint(0, 15)))
        for _ in range(199)
    ]
    prompts.append('the digit ' * 60)
    theirs = transformers.CLIPTokenizer.from_pretrained(folder / 'tokenizer')
    wanted = theirs(prompts, padding='max_length', truncation=True, max_length=77).input_ids
    ids = ours.tokenize(prompts)
    np.testing.assert_array_equal(ids, wanted)
    reference = clip_bpe.Reference(folder / 'tokenizer')
    np.testing.assert_array_equal(ids, [reference(prompt) for prompt in prompts])
    assert len({tuple(row) for row in ids}) > 150
    kept = ours.tokenizer.decode(ids[-1], skip_special_tokens=True)
    lost = caplog.records[-1].args[1]
    assert f'{kept} {lost}'.split() == prompts[-1].split()


def edit(folder, part, **changes):
    path = folder / part / 'config.json'
    tree = json.loads(path.read_text())
    path.write_text(json.dumps(tree | changes))


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def drop(path, name, **other):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(path)
    del tensors[name]
    save_file(tensors | other, path)


UNET = 'unet/diffusion_pytorch_model.safetensors'


@pytest.mark.parametrize(
    'spoil, words',
    [
        (lambda f: shutil.rmtree(f / 'vae'), ['no vae/config.json', 'whole diffusers folder']),
        (lambda f: (f / UNET).unlink(), ['holds no diffusion_pytorch_model.safetensors']),
        (lambda f: (f / UNET).rename(f / 'unet/diffusion_pytorch_model.bin'), ['pickle']),
        (lambda f: truncate(f / UNET), ['cannot be read', 'download it again']),
        (lambda f: edit(f, 'unet', class_embed_type='timestep'), ["class_embed_type='timestep'"]),
        (lambda f: edit(f, 'unet', sparkle=3), ['sparkle=3', 'unknown']),
        (lambda f: edit(f, 'vae', shift_factor=0.1), ['shift_factor=0.1']),
        (lambda f: edit(f, 'text_encoder', hidden_act='relu'), ["hidden_act='relu'"]),
        (lambda f: edit(f, 'unet', layers_per_block=1), ['unknown parameters', 'down_blocks.0']),
        (lambda f: edit(f, 'unet', cross_attention_dim=32), ['misshapen', 'attn2.to_k.weight']),
        (lambda f: drop(f / UNET, 'conv_in.bias'), ['1 missing parameters: conv_in.bias']),
    ],
)
def test_bad_folders(both, tmp_path, spoil, words):
    shutil.copytree(both[0], tmp_path / 'bad')
    spoil(tmp_path / 'bad')
    with pytest.raises(UserError) as e:
        load(tmp_path / 'bad')
    for word in words:
        assert word in str(e.value)


def test_repositories_that_cannot_be_had():
    with pytest.raises(UserError, match='neither a folder nor a repository id'):
        load('no such folder')


def test_images_of_the_wrong_size(both):
    with pytest.raises(UserError, match='multiples of 2'):
        both[2].vae.moments(jnp.zeros((1, 15, 16, 3)))
