"""The VAE over frames; tests/test_stable_diffusion_parity.py compares tiles with diffusers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cmd_jax.errors import UserError
from cmd_jax.parallel import mesh as meshes
from cmd_jax.stable_diffusion import VAE
from cmd_jax.stable_diffusion.frames import decode_frames, encode_frames

ENCODE = jax.jit(encode_frames, static_argnames='at_once')
DECODE = jax.jit(decode_frames, static_argnames=('at_once', 'tile'))


@pytest.fixture(scope='module')
def vae():
    return VAE(block_channels=(8, 16), layers=1, groups=4, rngs=nnx.Rngs(0))


@pytest.fixture(scope='module')
def flat():
    """One resolution: less to compile."""
    return VAE(block_channels=(8,), layers=1, groups=4, rngs=nnx.Rngs(0))


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def close(a, b):
    np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


@pytest.fixture(scope='module')
def one_by_one(vae):
    """Frames [2 5 8 12 3], scaled latents, decoded frames; each frame by itself."""
    frames = jnp.tanh(normal(0, 2, 5, 8, 12, 3))
    moments, decode = jax.jit(vae.moments), jax.jit(vae.decode)
    latents = [moments(frames[:, i])[0] for i in range(5)]
    decoded = [decode(z) for z in latents]
    return frames, vae.scaling_factor * jnp.stack(latents, 1), jnp.stack(decoded, 1)


@pytest.mark.parametrize('at_once', [1, 2, 9])
def test_groups_of_frames_are_frames_one_by_one(vae, one_by_one, at_once):
    frames, latents, decoded = one_by_one
    made = ENCODE(vae, frames, at_once=at_once)
    assert made.dtype == jnp.float32
    close(made, latents)
    close(DECODE(vae, latents, at_once=at_once), decoded)


def test_a_videos_noise_is_its_own(flat):
    frames, keys = jnp.tanh(normal(0, 4, 5, 8, 8, 3)), jax.random.split(jax.random.key(1), 4)
    drawn = ENCODE(flat, frames, at_once=5, keys=keys)
    close(ENCODE(flat, frames, at_once=2, keys=keys), drawn)
    alone = slice(2, 3)
    close(ENCODE(flat, frames[alone], at_once=2, keys=keys[alone]), drawn[alone])
    # No two frames share their noise, and it has the posterior's deviation.
    mean, log_variance = jax.jit(flat.moments)(frames.reshape(20, 8, 8, 3))
    noise = (drawn.reshape(mean.shape) / flat.scaling_factor - mean) / jnp.exp(log_variance / 2)
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
    correlation = np.corrcoef(np.reshape(noise, (20, -1)))
    assert np.abs(correlation - np.eye(20)).max() < 0.35


def temporary(function, vae, x, **options):
    return function.lower(vae, x, **options).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize('function, shape', [(ENCODE, (8, 8, 3)), (DECODE, (8, 8, 4))])
def test_memory_grows_with_the_group_and_not_with_the_video(flat, function, shape):
    def memory(t, at_once, videos=1):
        return temporary(function, flat, jnp.zeros((videos, t, *shape)), at_once=at_once)

    short, long, wide = memory(8, 2), memory(64, 2), memory(64, 8)
    assert abs(long - short) < 0.02 * short
    assert wide > 2 * short
    # A group is of frames of all videos, not of each.
    assert abs(memory(16, 8, videos=4) - wide) < 0.05 * wide


def test_tiles_take_less_memory(flat):
    z = jnp.zeros((1, 2, 32, 32, 4))
    assert 2 * temporary(DECODE, flat, z, at_once=1, tile=8) < temporary(DECODE, flat, z, at_once=1)


class FirstPixel(VAE):
    """Decodes all latents it sees to the first: it shows where the tile of a pixel begins."""

    def decode(self, latents):
        return jnp.broadcast_to(latents[:, :1, :1], latents.shape)


@pytest.mark.parametrize('across', [False, True])
def test_tiles_fade_into_each_other(across):
    vae = FirstPixel(block_channels=(8,), layers=1, groups=4, scaling_factor=0.5, rngs=nnx.Rngs(0))
    latents = jnp.broadcast_to(jnp.arange(14.0)[:, None, None], (1, 1, 14, 5, 3))
    # Tiles begin at 0, 6 and 12; over two pixels the next is mixed in.
    expected = np.array([0] * 6 + [0, 3, 6, 6, 6, 6] + [6, 9])
    made = decode_frames(
        vae, 0.5 * (latents.swapaxes(2, 3) if across else latents), at_once=1, tile=8
    )
    lines = made.swapaxes(2, 3) if across else made
    close(lines, jnp.broadcast_to(expected[:, None, None], latents.shape))


def test_parameters_come_to_the_videos(vae):
    """Both are split over the same devices: no image is gathered, kernels are."""
    mesh = meshes.make_mesh(data=2, fsdp=4)
    graphdef, params = nnx.split(vae)
    params = nnx.to_pure_dict(params)
    frames, keys = jnp.tanh(normal(0, 8, 3, 8, 8, 3)), jax.random.split(jax.random.key(1), 8)

    def run(params, frames, keys):
        vae = nnx.merge(graphdef, params)
        latents = encode_frames(vae, frames, at_once=2, keys=keys)
        return latents, decode_frames(vae, latents, at_once=2)

    expected = jax.jit(run)(params, frames, keys)
    given = jax.device_put(
        (params, frames, keys),
        (meshes.param_sharding(params, mesh), *[meshes.batch_sharding(mesh)] * 2),
    )
    with jax.set_mesh(mesh):
        compiled = jax.jit(run).lower(*given).compile()
        made = compiled(*given)
    moves = 'all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute'
    moved = re.findall(rf'= (.*) (?:{moves})(?:-start)?\(', compiled.as_text())
    shapes = {tuple(map(int, x.split(','))) for x in re.findall(r'\[([\d,]+)\]', ' '.join(moved))}
    assert shapes and shapes <= {x.shape for x in jax.tree.leaves(params)}
    for ours, theirs in zip(made, expected):
        assert ours.sharding.spec[0] == ('data', 'fsdp')
        close(ours, theirs)


@pytest.mark.parametrize('options', [{'at_once': 0}, {'tile': 6}, {'tile': 0}, {'tile': -4}])
def test_what_cannot_be_is_a_user_error(vae, options):
    with pytest.raises(UserError, match=next(iter(options))):
        decode_frames(vae, jnp.zeros((1, 2, 4, 4, 4)), **{'at_once': 1} | options)
