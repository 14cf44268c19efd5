"""Sizes and shardings of Stable Diffusion's networks; `make parity` compares what they compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cmd_jax.parallel import mesh as meshes
from cmd_jax.stable_diffusion import VAE, TextEncoder, UNet, weights

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
