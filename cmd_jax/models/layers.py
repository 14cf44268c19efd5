"""Parts that more than one network is made of.

Linear layers keep float32 parameters and compute in `dtype`; norms, softmax and rotations are
float32. Repeated blocks are stacked along a leading axis at construction (`stack`) and run by one
`lax.scan` (`run_stack`), so that a network compiles in the time of one of its blocks.
"""

import functools
import operator
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from cmd_jax.errors import UserError
from cmd_jax.models.attention import attention
from cmd_jax.parallel.mesh import gather, platform, shard

# What the backward pass keeps of a block. 'none': everything; 'full': the block's input only;
# the others: the named intermediate results ('qkv': projected queries, keys, values; 'attention':
# what attention read out, named by attention.py; 'mlp': the feed-forward's hidden layer;
# 'residual': the stream between parts).
REMAT = {
    'none': None,
    'full': (),
    'attention': ('attention', 'residual'),
    'mlp': ('attention', 'residual', 'mlp'),
    'wide': ('attention', 'residual', 'mlp', 'qkv'),
}

Angles = Float[Array | np.ndarray, 'n half_d']  # by which positions rotate, in radians

xavier = nnx.initializers.xavier_uniform()


def _dot_general(x, kernel, dimension_numbers, **kwargs):
    """`lax.dot_general` of [... k] and [k m], with x as one matrix on CPUs.

    XLA's CPU backend computes the gradient of a kernel 1.2 to 4.8 times slower from an x with
    several leading axes (it transposes the second operand and multiplies along its rows). On
    accelerators merged axes would only hide their shardings.
    """
    if platform() != 'cpu' or x.ndim == 2:
        return jax.lax.dot_general(x, kernel, dimension_numbers, **kwargs)
    matrix = jax.lax.dot_general(
        x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())), **kwargs
    )
    return matrix.reshape(*x.shape[:-1], kernel.shape[-1])


def linear(in_dim: int, out_dim: int, *, dtype, rngs, kernel_init=xavier, **kwargs) -> nnx.Linear:
    """`nnx.Linear` with Xavier's initialisation and a product that suits the platform."""
    kwargs = dict(kernel_init=kernel_init, dot_general=_dot_general, rngs=rngs) | kwargs
    return nnx.Linear(in_dim, out_dim, dtype=dtype, **kwargs)


def in_compute_dtype(network: nnx.Module) -> nnx.Module:
    """The same network, its layers' kernels and biases in what they compute in: the results are the
    same, at half the memory in bfloat16. Shapes may be in the place of arrays."""
    network = nnx.merge(*nnx.split(network))
    for _, module in nnx.iter_modules(network):
        if not isinstance(module, nnx.Linear | nnx.Conv) or module.dtype is None:
            continue
        for param in (module.kernel, module.bias):
            x = None if param is None else param.get_value()
            if isinstance(x, jax.ShapeDtypeStruct):
                param.set_value(jax.ShapeDtypeStruct(x.shape, module.dtype, sharding=x.sharding))
            elif x is not None:
                param.set_value(x.astype(module.dtype))
    return network


def gelu(x: Array) -> Array:
    """The exact GELU (Hendrycks and Gimpel 2016, arXiv 1606.08415), x Phi(x).

    By erf, as PyTorch computes it: the erfc of `jax.nn.gelu` takes several times as long on a CPU.
    """
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


def patchify(x: Float[Array, '*b h w c'], patch: int) -> Float[Array, '*b h2 w2 p']:
    """Patch vectors in the order (row in patch, column in patch, channel)."""
    return rearrange(x, '... (h p) (w q) c -> ... h w (p q c)', p=patch, q=patch)


def unpatchify(x: Float[Array, '*b h2 w2 p'], patch: int) -> Float[Array, '*b h w c']:
    """The inverse of `patchify`."""
    return rearrange(x, '... h w (p q c) -> ... (h p) (w q) c', p=patch, q=patch)


def rotary(x: Float[Array, '*b n heads d'], angles: Angles) -> Float[Array, '*b n heads d']:
    """Rotary embedding (Su et al. 2021, arXiv 2104.09864): pairs (i, i + d/2) turn by `angles`."""
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1).astype(x.dtype)


def check_rotary(head_dim: int, also: str = ''):
    """Raises UserError unless rotary positions of a grid fit into heads of this width."""
    if head_dim % 4:
        raise UserError(
            f'head_dim={head_dim} is not divisible by 4, as rotary positions need: '
            f'change dim or heads{also}'
        )


def axial_angles(rows: int, columns: int, head_dim: int) -> Float[np.ndarray, 'n half_d']:
    """Rotary angles of a grid: a half of the pairs turns with the row, a half with the column.

    A step on the grid turns them by 1 to 0.1 radians, whatever the size of the grid.
    """
    check_rotary(head_dim)
    frequencies = np.geomspace(1.0, 0.1, head_dim // 4)
    row, column = np.divmod(np.arange(rows * columns), columns)
    angles = [np.outer(row, frequencies), np.outer(column, frequencies)]
    return np.concatenate(angles, axis=-1).astype(np.float32)


class SelfAttention(nnx.Module):
    """Multi-head self-attention over the second-last axis, [b n k] -> [b n k].

    With several sequences an example, [b s n k], these are split over devices rather than heads.

    The width inside is heads * head_dim, which may differ from `dim`.
    """

    def __init__(self, dim: int, heads: int, head_dim: int | None = None, *, dtype, rngs):
        if head_dim is None and dim % heads:
            raise UserError(f'dim={dim} is not divisible by heads={heads}: change one of them')
        self.heads = heads
        width = heads * (head_dim or dim // heads)
        self.qkv = linear(dim, 3 * width, dtype=dtype, rngs=rngs)
        self.out = linear(width, dim, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, 'b *s n k'], angles: Angles | None = None
    ) -> Float[Array, 'b *s n k']:
        # Head by head, so that a tensor shard holds whole heads.
        qkv = checkpoint_name(self.qkv(x), 'qkv')
        qkv = rearrange(qkv, '... (h three d) -> ... h three d', three=3, h=self.heads)
        # Split, whose transpose is one concatenation; that of indexing is three padded sums.
        q, k, v = (jnp.squeeze(a, -2) for a in jnp.split(qkv, 3, axis=-2))
        split = ('frames', None, None) if x.ndim == 4 else (None, 'heads')
        q, k, v = (shard(a, 'batch', *split, None) for a in (q, k, v))
        if angles is not None:
            q, k = rotary(q, angles), rotary(k, angles)
        return self.out(rearrange(attention(q, k, v), '... h d -> ... (h d)'))


def stack(make_block: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs) -> nnx.Module:
    """`depth` independent blocks as one module whose Params have a leading axis."""

    @nnx.split_rngs(splits=depth)
    @nnx.vmap
    def make(rngs):
        return make_block(rngs)

    return make(rngs)


def gathered(block: nnx.Module, keep: tuple[str, ...] = ('tensor',)) -> nnx.Module:
    """A block whose linear layers and convolutions have their parameters in what they compute in,
    and gathered over all mesh axes but those kept (`parallel.mesh.gather`)."""
    graphdef, state = nnx.split(block)
    params = nnx.to_pure_dict(state)
    for path, module in nnx.iter_modules(block):
        if not isinstance(module, nnx.Linear | nnx.Conv):
            continue
        inner = functools.reduce(operator.getitem, path, params)
        for name in inner:
            where = '/'.join(map(str, ('blocks', *path, name)))
            inner[name] = gather(inner[name].astype(module.dtype), where, keep)
    # Not in place: the block may be of another trace, such as a loop's surroundings.
    return nnx.merge(graphdef, params)


def run_block(block: nnx.Module, *inputs: Array, remat: str = 'none') -> Array:
    """block(*inputs) with its parameters `gathered`, and the REMAT policy of that name.

    A function of its own in the program: blocks of one form are traced once, however many there
    are, in their places of a network that cannot be stacked.
    """
    graphdef, params = nnx.split(block, nnx.Param)
    return _run_block(graphdef, nnx.to_pure_dict(params), *inputs, remat=remat)


@functools.partial(jax.jit, static_argnames=('graphdef', 'remat'))
def _run_block(graphdef, params, *inputs, remat):
    def call(params, *inputs):
        return gathered(nnx.merge(graphdef, params))(*inputs)

    return _checkpointed(call, remat)(params, *inputs)


def _checkpointed(call: Callable, remat: str, **kwargs) -> Callable:
    """A function whose intermediate results the backward pass keeps by that policy of REMAT."""
    names = REMAT[remat]
    if names is None:
        return call
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    return jax.checkpoint(call, policy=policy, **kwargs)


def restack(blocks: Sequence[nnx.Module]) -> nnx.Module:
    """Blocks of one form that were made one by one, as `stack` would have made them."""
    states = [nnx.to_pure_dict(nnx.state(block)) for block in blocks]
    return nnx.merge(nnx.split(blocks[0])[0], jax.tree.map(lambda *x: jnp.stack(x), *states))


def run_stack(
    blocks: nnx.Module, x: Array, call: Callable, remat: str, keep: tuple[str, ...] = ('tensor',)
) -> Array:
    """Runs stacked blocks in turn: x <- call(block, x), with the REMAT policy of that name.

    `keep`: mesh axes that layers are split over as they compute.
    """

    def body(x, block):
        return call(gathered(block, keep), x), None

    return jax.lax.scan(_checkpointed(body, remat, prevent_cse=False), x, blocks)[0]
