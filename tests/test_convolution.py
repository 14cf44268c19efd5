"""Convolutions that spare products, against XLA's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from cmd_jax.models import convolution
from cmd_jax.models.flops import Flops, count
from cmd_jax.stable_diffusion.layers import conv

NUMBERS = ('NHWC', 'HWIO', 'NHWC')


def direct(x, kernel):
    return lax.conv_general_dilated(x, kernel, (1, 1), 'SAME', dimension_numbers=NUMBERS)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize('size', [(4, 4), (7, 13), (1, 6)])
def test_the_algorithm_is_exact(size):
    with jax.enable_x64(True):
        x, kernel = normal(0, 2, *size, 5), normal(1, 3, 3, 5, 4)
        found = jax.jit(convolution.winograd)(x, kernel)
        np.testing.assert_allclose(found, direct(x, kernel), rtol=0, atol=1e-12)


@pytest.fixture(scope='module')
def layer():
    """One whose shapes pay, and images for it."""
    made = conv(192, 200, 3, dtype=jnp.float32, rngs=nnx.Rngs(0))
    made = convolution.quick_convolutions(made)
    made.bias[...] = jnp.asarray(normal(3, 200), jnp.float32)
    return made, jnp.asarray(normal(2, 2, 30, 33, 192), jnp.float32)


def test_a_layer_takes_it_where_it_pays(layer):
    made, x = layer
    assert convolution.pays(x.shape, made.kernel.shape, x.dtype, 'cpu')
    assert convolution.MARK in str(jax.make_jaxpr(lambda x: made(x))(x))
    found, exact = made(x), direct(x, made.kernel[...]) + made.bias[...]
    error = jnp.abs(found - exact).max() / jnp.abs(exact).max()
    assert 0 < error < 5e-5


def test_without_being_told_a_layer_does_not():
    made = conv(192, 200, 3, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = jax.ShapeDtypeStruct((2, 30, 33, 192), jnp.float32)
    assert convolution.MARK not in str(jax.make_jaxpr(lambda x: made(x))(x))
    assert convolution.MARK in str(jax.make_jaxpr(convolution.quick_convolutions(made))(x))


def test_derivatives_are_the_direct_convolutions(layer):
    made, x = layer

    def loss(function, x, kernel):
        return jnp.square(function(x, kernel)).mean()

    def ours(x, kernel):
        about = dict(dimension_numbers=NUMBERS)
        return convolution.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), **about)

    kernel = made.kernel[...]
    found = jax.jit(jax.grad(lambda *a: loss(ours, *a), (0, 1)))(x, kernel)
    exact = jax.jit(jax.grad(lambda *a: loss(direct, *a), (0, 1)))(x, kernel)
    for a, b in zip(found, exact):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))


def test_it_counts_as_a_convolution(layer):
    made, x = layer
    adds = 2 * 30 * 33 * 9 * 192 * 200
    assert count(lambda x: made(x), x) == Flops(convolution=adds)
    # The gradients of the images and of the kernel cost as much each.
    graphdef, state = nnx.split(made, nnx.Param)

    def loss(state, x):
        return nnx.merge(graphdef, state)(x).sum()

    assert count(jax.grad(loss, (0, 1)), state, x) == Flops(convolution=3 * adds)


@pytest.mark.parametrize(
    'change',
    [
        dict(backend='tpu'),
        dict(dtype=jnp.bfloat16),
        dict(kernel_shape=(1, 1, 320, 320)),
        dict(kernel_shape=(3, 3, 320, 4)),
        dict(x_shape=(1, 16, 32, 320)),
    ],
)
def test_other_shapes_are_left_to_xla(change):
    pays = dict(
        x_shape=(1, 32, 64, 320), kernel_shape=(3, 3, 320, 320), dtype=jnp.float32, backend='cpu'
    )
    assert convolution.pays(**pays)
    assert not convolution.pays(**pays | change)


@pytest.mark.parametrize('about', [dict(strides=2), dict(padding=((0, 1), (0, 1)))])
def test_strides_and_other_paddings_are_left_to_xla(about):
    made = conv(192, 192, 3, dtype=jnp.float32, rngs=nnx.Rngs(0), **about)
    made = convolution.quick_convolutions(made)
    x = jax.ShapeDtypeStruct((1, 64, 64, 192), jnp.float32)
    assert convolution.MARK not in str(jax.make_jaxpr(lambda x: made(x))(x))
