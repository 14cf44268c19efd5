"""Attention: one function, four implementations.

`attention` computes softmax(q k^T / sqrt(d)) v. Which implementation runs is decided from static
facts only (shapes, dtype, platform), logged once, and can be asked for with `implementation`:

  xla        two einsums and a softmax; holds all scores.
  blockwise  for CPUs: a loop over blocks small enough for the cache, which holds no more than one
             block of scores; the backward pass recomputes them (Dao et al. 2022, arXiv 2205.14135).
  cudnn      cuDNN's flash attention on NVIDIA GPUs.
  tpu_flash  the Pallas flash kernel that ships with JAX.

Every call is marked in the jaxpr by a jit whose name carries its pass and its number of keys, so
that `flops.count` can tell attention from linear layers and counts the same for each of the four.
Reverse-mode derivatives only.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
from absl import logging
from einops import rearrange
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import flash_attention as pallas
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from cmd_jax.parallel.mesh import ACTIVATIONS, platform, splitting_mesh

# The names of the marks; '_KEYS' follows.
FORWARD, BACKWARD = 'attention_forward', 'attention_backward'

# Below these numbers of keys a flash kernel gains nothing over XLA.
CUDNN_KEYS, TPU_KEYS = 512, 1024

# The largest block of scores on a CPU, in elements: several sequences together (many small matrix
# products want batching, but in cache), or one sequence by itself (large products need no help).
SHORT_SCORES, LONG_SCORES = 2**18, 2**20


def attention(
    q: Float[Array, 'b *s n h d'], k: Float[Array, 'b *s m h d'], v: Float[Array, 'b *s m h d']
) -> Float[Array, 'b *s n h d']:
    """softmax(q k^T / sqrt(d)) v for each of h heads, softmax in float32, in the dtype of q.

    An example is one sequence, or s of them (frames of a video, or places over time). Where a mesh
    is set, examples and heads, or examples and sequences, are split over it as ACTIVATIONS says, if
    they divide. Raises ValueError for shapes that do not fit together.
    """
    *batch, n, h, d = q.shape
    m = k.shape[-3]
    if k.shape != v.shape or k.shape != (*batch, m, h, d):
        raise ValueError(f'attention of q {q.shape}, k {k.shape}, v {v.shape}: the shapes differ')
    backend, dtype = platform(), jnp.dtype(q.dtype)
    shape = (math.prod(batch), n, h, d)
    _log(shape, m, dtype, backend)
    return marked(implementation(shape, m, dtype, backend), m)(q, k, v)


def implementation(q_shape: tuple[int, ...], k_len: int, dtype, backend: str) -> str:
    """'xla', 'blockwise', 'cudnn' or 'tpu_flash', for a q of [b n h d] and `k_len` keys."""
    return _choose(q_shape, k_len, dtype, backend)[0]


def _choose(q_shape, k_len, dtype, backend) -> tuple[str, str]:
    d, dtype = q_shape[-1], jnp.dtype(dtype)
    if backend == 'cpu':
        return 'blockwise', 'faster than xla from the smallest shapes on'
    if backend in ('gpu', 'cuda'):
        if k_len < CUDNN_KEYS:
            return 'xla', f'fewer than {CUDNN_KEYS} keys'
        if dtype not in (jnp.bfloat16, jnp.float16):
            return 'xla', 'cuDNN takes bfloat16 and float16 only'
        if d % 8 or d > 128:
            return 'xla', 'cuDNN takes head dims that are multiples of 8 up to 128 only'
        if not _ampere_or_newer():
            return 'xla', 'cuDNN takes NVIDIA GPUs of compute capability 8.0 or more only'
        return 'cudnn', 'long sequence'
    if backend == 'tpu':
        if k_len < TPU_KEYS:
            return 'xla', f'fewer than {TPU_KEYS} keys'
        if dtype not in (jnp.bfloat16, jnp.float32):
            return 'xla', 'the flash kernel takes bfloat16 and float32 only'
        return 'tpu_flash', 'long sequence'
    return 'xla', 'no kernel for this platform'


@functools.cache
def _ampere_or_newer() -> bool:
    """Whether this host's GPUs are; where it has none, programs are for others, and it is so."""
    if jax.default_backend() != 'gpu':
        return True
    # AMD's have names, such as gfx90a.
    found = re.fullmatch(r'(\d+)\.\d+', str(getattr(jax.devices()[0], 'compute_capability', '')))
    return found is not None and int(found[1]) >= 8


@functools.cache
def _log(q_shape, k_len, dtype, backend):
    name, reason = _choose(q_shape, k_len, dtype, backend)
    logging.info(
        'attention of %s by %d keys, %s, on %s: %s (%s)',
        *(list(q_shape), k_len, dtype.name, backend, name, reason),
    )


@functools.cache
def marked(implementation: str, keys: int):
    """The implementation with one named jit around its forward and one around its backward pass."""
    kernels = {'blockwise': _blockwise, 'cudnn': _cudnn, 'tpu_flash': _tpu_flash}
    if implementation == 'xla':
        compute = _xla
    else:  # XLA can split its own operations, not kernels and loops
        compute = _split_over_mesh(_one_sequence(kernels[implementation]))

    def forward(q, k, v):
        return compute(q, k, v)

    def forward_and_vjp(q, k, v):
        return jax.vjp(compute, q, k, v)

    def backward(vjp, grad):
        return vjp(grad)

    forward.__name__ = forward_and_vjp.__name__ = f'{FORWARD}_{keys}'
    backward.__name__ = f'{BACKWARD}_{keys}'
    function = jax.custom_vjp(jax.jit(forward))
    function.defvjp(jax.jit(forward_and_vjp), jax.jit(backward))
    return function


def _split_over_mesh(compute):
    def split(q, k, v):
        mesh = splitting_mesh()
        if mesh is None:
            return compute(q, k, v)

        def fitting(size, axes):
            axes = (axes,) if isinstance(axes, str) else axes
            return axes if size % math.prod(mesh.shape[a] for a in axes) == 0 else None

        spec = [fitting(q.shape[0], ACTIVATIONS['batch'])] + [None] * (q.ndim - 1)
        if q.ndim == 5:
            spec[1] = fitting(q.shape[1], ACTIVATIONS['frames'])
        else:
            spec[2] = fitting(q.shape[2], ACTIVATIONS['heads'])
        spec = P(*spec)
        return jax.shard_map(compute, in_specs=spec, out_specs=spec, check_vma=False)(q, k, v)

    return split


def _one_sequence(compute):
    """Kernels take examples of one sequence each. Inside the split, where joining axes moves
    nothing between devices."""

    def joined(q, k, v):
        shape = q.shape
        q, k, v = (x.reshape(-1, *x.shape[-3:]) for x in (q, k, v))
        return compute(q, k, v).reshape(shape)

    return joined


def _xla(q, k, v):
    scores = jnp.einsum('...nhd,...mhd->...hnm', q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores * q.shape[-1] ** -0.5)
    out = jnp.einsum('...hnm,...mhd->...nhd', weights.astype(v.dtype), v)
    return checkpoint_name(out.astype(q.dtype), 'attention')


def _cudnn(q, k, v):
    out = jax.nn.dot_product_attention(q, k, v, implementation='cudnn')
    return checkpoint_name(out, 'attention')


def _tpu_flash(q, k, v):
    n, m, d = q.shape[1], k.shape[1], q.shape[3]

    def pad(x):  # lengths to whole blocks, head dims to whole registers: multiples of 128
        x = rearrange(x, 'b n h d -> b h n d')
        return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % 128), (0, -d % 128)))

    def segment(length):  # tokens see their own segment only: 1 is padding
        ids = (jnp.arange(length + -length % 128) >= length).astype(jnp.int32)
        return jnp.broadcast_to(ids, (q.shape[0], ids.size))

    block_q, block_k = (
        next(s for s in (512, 256, 128) if -(-x // 128) * 128 % s == 0) for x in (n, m)
    )
    out = pallas.flash_attention(
        *(pad(q), pad(k), pad(v)),
        segment_ids=pallas.SegmentIds(segment(n), segment(m)) if n % 128 or m % 128 else None,
        sm_scale=d**-0.5,
        block_sizes=pallas.BlockSizes(
            block_b=1,
            **dict.fromkeys(('block_q', 'block_q_major_dkv', 'block_q_dkv', 'block_q_dq'), block_q),
            **dict.fromkeys(
                ('block_k_major', 'block_k', 'block_k_major_dkv', 'block_k_dkv'), block_k
            ),
            **dict.fromkeys(('block_k_major_dq', 'block_k_dq'), block_k),
        ),
    )
    return checkpoint_name(rearrange(out[:, :, :n, :d], 'b h n d -> b n h d'), 'attention')


@jax.custom_vjp
def _blockwise(q, k, v):
    return _blockwise_forward(q, k, v)[0]


def _blockwise_forward(q, k, v):
    (out, lse), _ = _over_blocks(_forward_keys, _forward_block, (q,), (k, v), (q.shape[-1], 1), ())
    # Named, so that a remat policy can keep what spares the backward pass a second forward pass.
    out, lse = checkpoint_name(out.astype(q.dtype), 'attention'), checkpoint_name(lse, 'attention')
    return out, (q, k, v, out, lse)


def _blockwise_backward(residuals, grad):
    q, k, v, out, lse = residuals
    d = q.shape[-1]
    (dq,), (dk, dv) = _over_blocks(
        _backward_keys, _backward_block, (q, out, lse, grad), (k, v), (d,), (d, d)
    )
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)


def _transpose(x):
    return x.swapaxes(-1, -2)


def _forward_keys(k, v):
    return _transpose(k), v


def _forward_block(q, k, v):
    """[g n d], [g d m], [g m d] -> the output [g n d] and the logsumexp of the scores [g n 1]."""
    scores = (q * q.shape[-1] ** -0.5) @ k
    highest = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - highest)
    total = weights.sum(-1, keepdims=True)
    return (weights @ v) / total, highest + jnp.log(total)


def _backward_keys(k, v):
    return k, _transpose(k * k.shape[-1] ** -0.5), v


def _backward_block(q, out, lse, grad, k, scaled, v):
    """The gradients of q, k, v, by the equations of Dao et al. 2022, appendix B.

    Scores are held transposed, [g m n]: so none of the five products contracts the first axis of a
    large left operand, which XLA's CPU backend does several times slower. The barriers keep XLA
    from folding the transposes of small operands back into such products.
    """
    scale = q.shape[-1] ** -0.5
    barrier = lax.optimization_barrier
    delta = barrier(_transpose((out * grad).sum(-1, keepdims=True)))
    weights = jnp.exp(barrier(k @ _transpose(q * scale)) - _transpose(lse))
    dscores = weights * (barrier(v @ _transpose(grad)) - delta)
    dq = barrier(scaled @ dscores)
    return _transpose(dq), dscores @ (q * scale), weights @ grad


def _over_blocks(prepare, compute, by_query, by_key, query_widths, key_widths):
    """Runs `compute` over blocks of [b n h *] (by_query) and [b m h *] (by_key) arrays.

    `compute` gets [g rows *] parts and what `prepare` makes of [g m *] parts, once for all rows, in
    float32 (or more). It returns as many [g rows *] parts as there are query_widths, then as many
    [g m *] parts as there are key_widths. Returns the whole arrays in two lists; what several
    blocks of rows give for one key is added up.
    """
    b, n, h, _ = by_query[0].shape
    m = by_key[0].shape[1]
    dtype = jnp.promote_types(by_query[0].dtype, jnp.float32)
    batch, rows, heads = _block(b, n, h, m)
    row_blocks = -(-n // rows)
    # Rows of zeros (their gradients too) add nothing to the sums over rows.
    padding = ((0, 0), (0, row_blocks * rows - n), (0, 0), (0, 0))
    by_query = [jnp.pad(x, padding) for x in by_query]
    # The barriers keep the reshuffles out of the matrix products and of the loops around them.
    barrier = lax.optimization_barrier

    def part(x, at, length):
        x = lax.dynamic_slice(x, at, (batch, length, heads, x.shape[-1]))
        return rearrange(x, 'b n h d -> (b h) n d').astype(dtype)

    def update(x, new, at):
        return lax.dynamic_update_slice(x, rearrange(new, '(b h) n d -> b n h d', b=batch), at)

    def step(results, i):
        first, head = i // (h // heads) * batch, i % (h // heads) * heads
        at_key = (first, 0, head, 0)
        keys = barrier(prepare(*barrier([part(x, at_key, m) for x in by_key])))

        def of_rows(query_results, row):
            at_query = (first, row * rows, head, 0)
            parts = barrier([part(x, at_query, rows) for x in by_query])
            new = barrier(compute(*parts, *keys))
            query_new, key_new = new[: len(query_widths)], new[len(query_widths) :]
            return [update(x, new, at_query) for x, new in zip(query_results, query_new)], key_new

        def more_rows(carry, row):
            query_results, key_new = of_rows(carry[0], row)
            return (query_results, [x + new for x, new in zip(carry[1], key_new)]), None

        if row_blocks == 1:
            query_results, sums = of_rows(results[0], 0)
        else:
            sums = [jnp.full((batch * heads, m, width), zero) for width in key_widths]
            numbers = jnp.arange(row_blocks) + zero.astype(int)
            (query_results, sums), _ = lax.scan(more_rows, (results[0], sums), numbers)
        return (query_results, [update(x, new, at_key) for x, new in zip(results[1], sums)]), None

    # A zero that depends on the inputs: from a plain one a remat around would compute the empty
    # results and all positions ahead, and keep them.
    zero, _ = barrier((jnp.zeros((), dtype), by_query))
    empty = (
        [jnp.full((b, row_blocks * rows, h, width), zero) for width in query_widths],
        [jnp.full((b, m, h, width), zero) for width in key_widths],
    )
    steps = jnp.arange((b // batch) * (h // heads)) + zero.astype(int)
    (by_query, by_key), _ = lax.scan(step, empty, steps)
    return [x[:, :n] for x in by_query], by_key


def _block(b: int, n: int, h: int, m: int) -> tuple[int, int, int]:
    """How many batch entries, rows and heads one block takes."""

    def divisor(size, most):
        return next(x for x in range(max(1, min(size, most)), 0, -1) if size % x == 0)

    if h * n * m <= SHORT_SCORES:
        return divisor(b, SHORT_SCORES // (h * n * m)), n, h
    if n * m <= LONG_SCORES:
        return 1, n, divisor(h, SHORT_SCORES // (n * m))
    return 1, -(-n // -(-n * m // LONG_SCORES)), 1
