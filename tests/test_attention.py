import functools
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from cmd_jax.models import attention as module
from cmd_jax.models.attention import attention, implementation

# q_len, k_len: one block; several rows' blocks that divide; that do not; cross lengths
LENGTHS = [(16, 16), (64, 64), (57, 57), (40, 13), (13, 40)]


def inputs(b, n, m, h, d, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = [(b, n, h, d), (b, m, h, d), (b, m, h, d), (b, n, h, d)]
    return [jnp.asarray(rng.standard_normal(s), dtype) for s in shapes]


def exact(q, k, v, grad):
    """Attention and its three gradients in float64, by the formula."""
    q, k, v, grad = (np.asarray(x, np.float64).transpose(0, 2, 1, 3) for x in (q, k, v, grad))
    scale = q.shape[-1] ** -0.5
    weights = np.exp(q @ k.swapaxes(2, 3) * scale)
    weights /= weights.sum(-1, keepdims=True)
    dweights = grad @ v.swapaxes(2, 3)
    dscores = weights * (dweights - (weights * dweights).sum(-1, keepdims=True)) * scale
    dq, dk, dv = dscores @ k, dscores.swapaxes(2, 3) @ q, weights.swapaxes(2, 3) @ grad
    return [x.transpose(0, 2, 1, 3) for x in (weights @ v, dq, dk, dv)]


def with_gradients(compute, q, k, v, grad):
    @jax.jit
    def run(q, k, v, grad):
        out, vjp = jax.vjp(compute, q, k, v)
        return out, *vjp(grad)

    return run(q, k, v, grad)


@pytest.mark.parametrize('name', ['xla', 'blockwise'])
@pytest.mark.parametrize(('n', 'm'), LENGTHS)
def test_equals_the_formula_with_gradients(monkeypatch, name, n, m):
    # Blocks small enough for every kind of block to occur at these sizes.
    monkeypatch.setattr(module, 'SHORT_SCORES', 600)
    monkeypatch.setattr(module, 'LONG_SCORES', 1200)
    arrays = inputs(4, n, m, 3, 8)
    # What `marked` keeps would have these blocks for good.
    found = with_gradients(module.marked.__wrapped__(name, m), *arrays)
    for x, want in zip(found, exact(*arrays), strict=True):
        np.testing.assert_allclose(x, want, atol=1e-5)


def test_block_keeps_within_its_budgets(monkeypatch):
    monkeypatch.setattr(module, 'SHORT_SCORES', 600)
    monkeypatch.setattr(module, 'LONG_SCORES', 1200)
    assert module._block(4, 7, 3, 7) == (4, 7, 3)  # everything: 588 scores
    assert module._block(4, 10, 3, 10) == (2, 10, 3)  # several sequences
    assert module._block(4, 16, 4, 16) == (1, 16, 2)  # several heads of one sequence
    assert module._block(4, 30, 3, 30) == (1, 30, 1)  # one head
    assert module._block(4, 57, 3, 57) == (1, 19, 1)  # rows of one head, evenly
    assert module._block(1, 50, 1, 5000) == (1, 1, 1)


def test_equals_jax_grad_of_the_naive_function():
    arrays = inputs(2, 24, 24, 2, 16)
    found = with_gradients(attention, *arrays)
    for x, want in zip(found, with_gradients(module._xla, *arrays), strict=True):
        np.testing.assert_allclose(x, want, atol=1e-5)


@pytest.mark.parametrize('name', ['xla', 'blockwise'])
def test_bfloat16_stays_bfloat16_and_close(name):
    arrays = inputs(2, 40, 40, 2, 16, jnp.bfloat16)
    found = with_gradients(module.marked(name, 40), *arrays)
    assert all(x.dtype == jnp.bfloat16 for x in found)
    for x, want in zip(found, exact(*arrays), strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float32), want, atol=0.03)


def test_permuting_queries_permutes_and_permuting_keys_changes_nothing():
    q, k, v, _ = inputs(2, 24, 32, 2, 8)
    order_q, order_k = np.random.default_rng(1).permutation(24), np.arange(32)[::-1]
    out = attention(q, k, v)
    np.testing.assert_allclose(attention(q[:, order_q], k, v), out[:, order_q], atol=1e-6)
    np.testing.assert_allclose(attention(q, k[:, order_k], v[:, order_k]), out, atol=1e-6)


def test_large_scores_neither_overflow_nor_lose_the_maximum():
    q, k, v, grad = inputs(1, 16, 16, 1, 8)
    found = with_gradients(attention, 1e4 * q, k, v, grad)
    nearest = np.asarray(jnp.einsum('bnhd,bmhd->bnm', q, k)).argmax(-1)[0]
    np.testing.assert_allclose(found[0][0, :, 0], v[0, nearest, 0], atol=1e-5)
    assert all(np.isfinite(x).all() for x in found)


@pytest.mark.usefixtures('unchecked_types')
def test_shapes_that_do_not_fit_raise():
    q, k, v, _ = inputs(2, 8, 8, 2, 8)
    with pytest.raises(ValueError, match='the shapes differ'):
        attention(q, k[:1], v[:1])
    with pytest.raises(ValueError, match='the shapes differ'):
        attention(q, k, v[:, :4])


def test_blockwise_never_holds_all_scores():
    b, n, h, d = 2, 2048, 2, 8
    q = jax.ShapeDtypeStruct((b, n, h, d), jnp.float32)

    def run(q, k, v, grad):
        out, vjp = jax.vjp(attention, q, k, v)
        return out, vjp(grad)

    temporary = jax.jit(run).lower(q, q, q, q).compile().memory_analysis().temp_size_in_bytes
    # A block's scores, their gradient and one more, and a few arrays of the size of q.
    assert temporary < 3 * 4 * module.LONG_SCORES + 16 * 4 * b * n * h * d
    assert temporary < 4 * b * h * n * n


def test_the_choice_of_implementation():
    bf16, f32 = jnp.bfloat16, jnp.float32
    long, short = (2, 1024, 8, 64), (2, 256, 8, 64)
    assert implementation(long, 1024, f32, 'cpu') == 'blockwise'
    assert implementation(long, 1024, bf16, 'gpu') == 'cudnn'
    assert implementation(short, 256, bf16, 'gpu') == 'xla'
    assert implementation(long, 77, bf16, 'gpu') == 'xla'
    assert implementation(long, 1024, f32, 'gpu') == 'xla'
    assert implementation((2, 1024, 8, 160), 1024, bf16, 'gpu') == 'xla'
    assert implementation((2, 1024, 8, 44), 1024, bf16, 'gpu') == 'xla'
    assert implementation(long, 1024, bf16, 'tpu') == 'tpu_flash'
    assert implementation(short, 256, bf16, 'tpu') == 'xla'
    assert implementation(long, 1024, bf16, 'other') == 'xla'


@pytest.mark.parametrize(
    'capability, expected',
    [('7.5', 'xla'), ('8.0', 'cudnn'), ('10.0', 'cudnn'), ('gfx90a', 'xla'), (None, 'xla')],
)
def test_cudnn_needs_a_gpu_that_it_takes(monkeypatch, capability, expected):
    """A T4 on Colab has none of it; nor have AMD's."""
    gpu = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(module.jax, 'default_backend', lambda: 'gpu')
    monkeypatch.setattr(module.jax, 'devices', lambda: [gpu])
    module._ampere_or_newer.cache_clear()
    found = implementation((2, 1024, 8, 64), 1024, jnp.bfloat16, 'gpu')
    module._ampere_or_newer.cache_clear()
    assert found == expected


def test_the_choice_is_logged_once(caplog):
    module._log.cache_clear()
    q, k, v, _ = inputs(1, 9, 9, 1, 8)
    with caplog.at_level('INFO', logger='absl'):
        attention(q, k, v)
        attention(q, k, v)
    assert [r.getMessage() for r in caplog.records] == [
        'attention of [1, 9, 1, 8] by 9 keys, float32, on cpu: blockwise '
        '(faster than xla from the smallest shapes on)'
    ]


def test_tpu_kernel_in_the_interpreter_equals_the_formula():
    arrays = inputs(1, 100, 150, 1, 16)  # both lengths and the head dim are padded
    with pltpu.force_tpu_interpret_mode():
        found = with_gradients(module._tpu_flash, *arrays)
    for x, want in zip(found, exact(*arrays), strict=True):
        np.testing.assert_allclose(x, want, atol=2e-5)


@pytest.mark.parametrize(('n', 'dtype'), [(1024, jnp.bfloat16), (1100, jnp.float32)])
def test_tpu_path_lowers_for_tpu(n, dtype):
    x = jax.ShapeDtypeStruct((2, n, 2, 48), dtype)
    run = functools.partial(with_gradients, module.marked('tpu_flash', n))
    lowered = jax.jit(run).trace(x, x, x, x).lower(lowering_platforms=('tpu',))
    assert lowered.as_text().count('tpu_custom_call') >= 3  # forward, dq, dk and dv


def test_a_remat_policy_can_keep_what_the_backward_pass_needs():
    arrays = inputs(2, 16, 16, 2, 8)

    def dots(policy):
        run = functools.partial(jax.checkpoint, policy=policy)(attention)
        text = str(jax.make_jaxpr(lambda *a: jax.vjp(run, *a[:3])[1](a[3]))(*arrays))
        return text.count('dot_general')

    policies = jax.checkpoint_policies
    assert dots(policies.nothing_saveable) == 2 + 2 + 5
    assert dots(policies.save_only_these_names('attention')) == 2 + 5


SHARDED = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from cmd_jax.models.attention import attention
from cmd_jax.parallel.mesh import make_mesh

def run(q, k, v, grad):
    out, vjp = jax.vjp(attention, q, k, v)
    return out, *vjp(grad)

rng = np.random.default_rng(0)
for b, h in ((8, 4), (3, 3)):  # what divides over the mesh, and what does not
    arrays = [rng.standard_normal((b, 12, h, 8), dtype=np.float32) for _ in range(4)]
    want = jax.jit(run)(*arrays)
    mesh = make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        spec = P(('data', 'fsdp') if b == 8 else None, None, 'tensor' if h == 4 else None)
        compiled = jax.jit(run, in_shardings=NamedSharding(mesh, spec)).lower(*arrays).compile()
        found = compiled(*jax.device_put(arrays, NamedSharding(mesh, spec)))
    if b == 8:
        assert 'all-' not in compiled.as_text(), 'attention needs no communication'
    for x, y in zip(found, want):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), 4)
        np.testing.assert_allclose(x, y, atol=1e-5)
"""


def test_split_over_a_mesh_it_is_the_same_without_communication():
    code = (
        "import jax; jax.config.update('jax_platforms', 'cpu');"
        "jax.config.update('jax_num_cpu_devices', 8)" + SHARDED
    )
    subprocess.run([sys.executable, '-c', code], check=True, timeout=600)
