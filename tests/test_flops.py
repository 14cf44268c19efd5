import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from cmd_jax.models import attention
from cmd_jax.models.flops import Flops, count

X, W = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((5, 3), (3, 3)))
LINEAR = 5 * 3 * 3


def layer(x, w):
    return jnp.sin(x @ w)


def loss(x, w):
    return layer(x, w).sum()


def test_linear_and_what_is_derived_from_it():
    flops = count(lambda x, w: layer(x, w), X, W)
    assert flops == Flops(linear=LINEAR)
    assert flops.total == LINEAR
    assert flops.flops == 2 * LINEAR
    assert Flops(linear=1, attention=2, convolution=4).total == 7


def test_keyword_arguments_and_trees():
    assert count(lambda p, *, x: x @ p['w'], {'w': W}, x=X).linear == LINEAR


def test_scan_multiplies_by_its_length():
    stacked = jax.ShapeDtypeStruct((5, 3, 3), jnp.float32)

    def run(x, ws):
        return lax.scan(lambda x, w: (layer(x, w), None), x, ws)[0]

    assert count(run, X, stacked).linear == 5 * LINEAR
    assert count(jax.jit(run), X, stacked).linear == 5 * LINEAR
    assert count(jax.grad(lambda x, ws: run(x, ws).sum()), X, stacked).linear == 10 * LINEAR

    def looped(x, w):
        return lax.fori_loop(0, 7, lambda _, x: layer(x, w), x)

    assert count(looped, X, W).linear == 7 * LINEAR


def test_gradients_cost_two_products_more_or_one_for_the_first_layer():
    assert count(jax.grad(loss, argnums=(0, 1)), X, W).linear == 3 * LINEAR
    assert count(jax.grad(loss, argnums=1), X, W).linear == 2 * LINEAR


def test_remat_counts_its_second_forward_pass():
    def twice(x, w):
        return layer(layer(x, w), w)

    plain = count(jax.grad(lambda x, w: twice(x, w).sum(), (0, 1)), X, W).linear
    remat = count(jax.grad(lambda x, w: jax.checkpoint(twice)(x, w).sum(), (0, 1)), X, W).linear
    assert plain == 6 * LINEAR
    assert remat == 8 * LINEAR


def test_custom_derivatives_conditions_and_vmap():
    custom = jax.custom_vjp(layer)
    custom.defvjp(lambda x, w: (layer(x, w), None), lambda _, g: (g, g))
    assert count(custom, X, W).linear == LINEAR
    jvp = jax.custom_jvp(layer)
    jvp.defjvp(lambda primals, tangents: (layer(*primals), tangents[0]))
    assert count(jvp, X, W).linear == LINEAR

    def branch(p, x, w):
        return lax.cond(p, lambda: layer(layer(x, w), w), lambda: x @ w)

    assert count(branch, True, X, W).linear == 2 * LINEAR
    xs = jax.ShapeDtypeStruct((4, 5, 3), jnp.float32)
    ws = jax.ShapeDtypeStruct((4, 3, 3), jnp.float32)
    assert count(jax.vmap(layer), xs, ws) == Flops(linear=4 * LINEAR)


def test_shard_map_counts_all_devices():
    mesh = jax.make_mesh((1,), ('a',), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.shard_map(layer, mesh=mesh, in_specs=(P('a'), P()), out_specs=P('a'))
    assert count(split, X, W).linear == LINEAR
    mesh = jax.sharding.AbstractMesh((5,), ('a',), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.shard_map(layer, mesh=mesh, in_specs=(P('a'), P()), out_specs=P('a'))
    assert count(split, X, W).linear == LINEAR


def test_products_in_a_while_loop_raise_and_other_loops_do_not():
    def endless(x, w):
        return lax.while_loop(lambda x: x.sum() < 1, lambda x: x @ w, x)

    with pytest.raises(ValueError, match='while'):
        count(endless, X, W)

    def harmless(x):
        return lax.while_loop(lambda x: x.sum() < 1, lambda x: x + 1, x)

    assert count(harmless, X) == Flops()


def test_convolution_and_its_gradients():
    x = jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.float32)
    w = jax.ShapeDtypeStruct((3, 3, 4, 6), jnp.float32)

    def conv(x, w, stride=1, groups=1):
        return lax.conv_general_dilated(
            *(x, w, (stride, stride), 'SAME'),
            dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
            feature_group_count=groups,
        )

    assert count(conv, x, w) == Flops(convolution=2 * 8 * 8 * 6 * 9 * 4)
    strided = functools.partial(conv, stride=2)
    once = 2 * 4 * 4 * 6 * 9 * 4
    assert count(strided, x, w).convolution == once
    grad = jax.grad(lambda x, w: (strided(x, w) ** 2).sum(), (0, 1))
    assert count(grad, x, w).convolution == 3 * once
    grouped = jax.ShapeDtypeStruct((3, 3, 2, 6), jnp.float32)
    assert count(functools.partial(conv, groups=2), x, grouped).convolution == 2 * 64 * 6 * 9 * 2


Q = jax.ShapeDtypeStruct((2, 1030, 3, 16), jnp.float32)
K = jax.ShapeDtypeStruct((2, 1200, 3, 16), jnp.float32)
PRODUCT = 2 * 3 * 1030 * 1200 * 16


@pytest.mark.parametrize('name', ['xla', 'blockwise', 'tpu_flash'])
def test_attention_counts_the_same_for_every_implementation(name):
    run = attention.marked(name, 1200)
    assert count(run, Q, K, K) == Flops(attention=2 * PRODUCT)
    grad = jax.grad(lambda q, k, v: (run(q, k, v) ** 2).sum(), (0, 1, 2))
    assert count(grad, Q, K, K) == Flops(attention=6 * PRODUCT)


def test_attention_inside_scan_remat_and_linear_layers():
    w = jax.ShapeDtypeStruct((5, 12, 12), jnp.float32)
    x = jax.ShapeDtypeStruct((2, 8, 12), jnp.float32)

    def block(x, w):
        y = (x @ w).reshape(2, 8, 3, 4)
        return x + attention.attention(y, y, y).reshape(2, 8, 12), None

    def run(x, w, policy=None):
        body = jax.checkpoint(block, policy=policy) if policy else block
        return lax.scan(body, x, w)[0].sum()

    linear, once = 5 * 2 * 8 * 12 * 12, 5 * 2 * (2 * 3 * 8 * 8 * 4)
    assert count(run, x, w) == Flops(linear=linear, attention=once)
    assert count(jax.grad(run, (0, 1)), x, w) == Flops(linear=3 * linear, attention=3 * once)
    policies = jax.checkpoint_policies
    grad = jax.grad(functools.partial(run, policy=policies.nothing_saveable), (0, 1))
    assert count(grad, x, w) == Flops(linear=4 * linear, attention=4 * once)
    grad = jax.grad(
        functools.partial(run, policy=policies.save_only_these_names('attention')), (0, 1)
    )
    assert count(grad, x, w) == Flops(linear=4 * linear, attention=3 * once)


def test_a_batched_product_outside_attention_is_not_attention():
    a = jax.ShapeDtypeStruct((4, 5, 3), jnp.float32)
    flops = count(lambda a: jnp.einsum('bnd,bmd->bnm', a, a), a)
    assert flops == Flops(linear=4 * 5 * 5 * 3)
    assert np.isclose(flops.flops, 2 * 4 * 5 * 5 * 3)
