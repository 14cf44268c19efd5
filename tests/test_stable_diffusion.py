"""Sizes and shardings of Stable Diffusion's networks; `make parity` compares what they compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cmd_jax.parallel import mesh as meshes
from cmd_jax.stable_diffusion import VAE, TextEncoder, UNet, weights
from cmd_jax.stable_diffusion.frames import encode_frames

# 1.5 where it differs from 2.1, whose sizes are the defaults.
SD15_UNET = dict(heads=(8,) * 4, text_dim=768, linear_projection=False)
SD15_TEXT = dict(dim=768, depth=12, heads=12, hidden=3072, activation='quick_gelu')
CASES = {
    'UNet 2.1': (UNet, {}, 865.9),
    'UNet 1.5': (UNet, SD15_UNET, 859.5),
    'VAE': (VAE, {}, 83.7),
    'text 2.1': (TextEncoder, {}, 340.4),
    'text 1.5': (TextEncoder, SD15_TEXT, 123.1),
}


@pytest.mark.parametrize('case', CASES)
def test_published_sizes(case):
    """Millions of parameters; each has a sharding rule, and nothing above 1 MB is replicated."""
    module, arguments, millions = CASES[case]
    abstract = weights.abstract(module, **arguments)
    params = nnx.to_pure_dict(nnx.split(abstract, nnx.Param)[1])
    assert round(sum(x.size for x in jax.tree.leaves(params)) / 1e6, 1) == millions
    sharding = meshes.param_sharding(params, meshes.make_mesh(fsdp=8))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for (path, x), where in zip(leaves, jax.tree.leaves(sharding), strict=True):
        name = meshes.path_name(path)
        assert meshes.rule(name) < len(meshes.PARAMS) - 1, f'{name} has no rule'
        assert x.size * 4 <= 2**20 or any(where.spec), f'{name} is on every device'


def test_recomputed_activations_give_the_same_gradients():
    """remat='full' changes what is kept for the backward pass and nothing else."""
    x, t = jax.random.normal(jax.random.key(0), (2, 8, 4, 4)), jnp.array([3.0, 900.0])
    text = jax.random.normal(jax.random.key(1), (2, 5, 6))
    sizes = dict(block_channels=(8,), cross_attention=(True,), heads=(2,), layers=1)
    gradients, convolutions = {}, {}
    for remat in ('none', 'full'):
        unet = UNet(**sizes, text_dim=6, groups=4, remat=remat, rngs=nnx.Rngs(0))
        graphdef, params = nnx.split(unet)

        def loss(params, graphdef=graphdef):
            return jnp.mean(nnx.merge(graphdef, params)(x, t, text) ** 2)

        compiled = jax.jit(jax.grad(loss)).lower(params).compile()
        gradients[remat] = jax.tree.leaves(compiled(params))
        convolutions[remat] = compiled.as_text().count('convolution(')
    for none, full in zip(*gradients.values(), strict=True):
        assert np.abs(none).max() > 0
        np.testing.assert_allclose(full, none, rtol=0, atol=1e-5 * np.abs(none).max())
    assert convolutions['full'] > convolutions['none'], 'some are computed again'


@pytest.mark.parametrize('sizes', [dict(data=2, fsdp=2, tensor=2), dict(fsdp=2, tensor=4)])
def test_unet_does_not_depend_on_the_mesh(sizes):
    """Heads, channels and hidden layers in parts: the same output and gradients."""
    unet = UNet(
        **dict(block_channels=(16, 32), cross_attention=(True, True), heads=(4, 4), layers=1),
        **dict(text_dim=12, groups=4, rngs=nnx.Rngs(0)),
    )
    graphdef, params = nnx.split(unet, nnx.Param)
    params = nnx.to_pure_dict(params)
    x, t = jax.random.normal(jax.random.key(0), (4, 8, 8, 4)), jnp.array([3.0, 900.0, 20.0, 5.0])
    text = jax.random.normal(jax.random.key(1), (4, 6, 12))

    def run(params, x, t, text):
        def loss(params):
            out = nnx.merge(graphdef, params)(x, t, text)
            return jnp.mean(out**2), out

        return jax.grad(loss, has_aux=True)(params)

    expected = jax.jit(run)(params, x, t, text)
    mesh = meshes.make_mesh(**sizes)
    lies = meshes.param_sharding(params, mesh)
    split = [str(s.spec) for s in jax.tree.leaves(lies) if 'tensor' in str(s.spec)]
    assert len(split) > 20, 'layers are split'
    with jax.set_mesh(mesh):
        given = jax.device_put((x, t, text), meshes.batch_sharding(mesh))
        found = jax.jit(run)(jax.device_put(params, lies), *given)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


def test_vae_frames_are_shared_by_devices():
    """Over videos and, along `tensor`, over frames; noise is a frame's own wherever it is made."""
    vae = VAE(block_channels=(8, 8), layers=1, groups=4, rngs=nnx.Rngs(0))
    video = jnp.tanh(jax.random.normal(jax.random.key(0), (4, 6, 8, 8, 3)))
    keys = jax.random.split(jax.random.key(1), 4)
    expected = encode_frames(vae, video, at_once=2, keys=keys)
    for sizes in (dict(fsdp=4, tensor=2), dict(data=2, fsdp=2, tensor=2), dict(fsdp=2, tensor=4)):
        with jax.set_mesh(meshes.make_mesh(**sizes)):
            found = jax.jit(lambda x, k: encode_frames(vae, x, at_once=2, keys=k))(video, keys)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
