"""What the two diffusion transformers share (Peebles and Xie 2023, arXiv 2212.09748)."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from cmd_jax.errors import UserError
from cmd_jax.models.layers import REMAT, Angles, SelfAttention, linear, run_stack, stack
from cmd_jax.parallel.mesh import shard

# The usual sizes (table 1 of the paper).
SIZES = {
    'S': dict(dim=384, depth=12, heads=6),
    'B': dict(dim=768, depth=12, heads=12),
    'L': dict(dim=1024, depth=24, heads=16),
    'XL': dict(dim=1152, depth=28, heads=16),
}

# DiT's own 0.02 makes the condition begin at nearly nothing: it is learned late, and by a small
# network within a short training not at all. Weights of a checkpoint replace this anyway.
label_init = nnx.initializers.normal(0.5)
zeros = nnx.initializers.zeros_init()


def timestep_features(t: Float[Array, 'b'], dim: int = 256) -> Float[Array, 'b dim']:
    """Sinusoids [cos | sin] of the timestep with periods from 2 pi to 20000 pi, float32."""
    frequencies = np.exp(-np.log(10000.0) * np.arange(dim // 2) / (dim // 2))
    angles = t.astype(jnp.float32)[:, None] * frequencies.astype(np.float32)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def grid_positions(rows: int, columns: int, dim: int) -> np.ndarray:
    """Sine-cosine table [rows * columns, dim]: the first half encodes the column, the second the
    row, each as [sin | cos] (the table of the published DiT on a square grid)."""

    def encode(position):
        frequencies = 10000.0 ** (-np.arange(dim // 4) / (dim // 4))
        angles = position[:, None] * frequencies
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    row, column = np.divmod(np.arange(rows * columns), columns)
    return np.concatenate([encode(column), encode(row)], axis=1).astype(np.float32)


class Positions(nnx.Module):
    """A table of positions that training leaves as it is, but a checkpoint may replace."""

    def __init__(self, rows: int, columns: int, dim: int):
        if dim % 4:
            raise UserError(f'dim={dim} is not divisible by 4, as the position table needs')
        self.position = nnx.Param(jnp.asarray(grid_positions(rows, columns, dim)))

    def __call__(self) -> Float[Array, 'n k']:
        return jax.lax.stop_gradient(self.position[...])


class TimestepEmbed(nnx.Module):
    """Timestep [b] in 0..1000 -> [b dim]: sinusoids and a two-layer network, float32."""

    def __init__(self, dim: int, *, rngs):
        kwargs = dict(dtype=jnp.float32, rngs=rngs)
        self.hidden = linear(256, dim, **kwargs)
        self.out = linear(dim, dim, **kwargs)

    def __call__(self, t: Float[Array, 'b']) -> Float[Array, 'b k']:
        return self.out(nnx.silu(self.hidden(timestep_features(t))))


class Mlp(nnx.Module):
    def __init__(self, dim: int, *, dtype, rngs):
        self.up = linear(dim, 4 * dim, dtype=dtype, rngs=rngs)
        self.down = linear(4 * dim, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, 'b n k']) -> Float[Array, 'b n k']:
        hidden = shard(checkpoint_name(self.up(x), 'mlp'), 'batch', None, 'mlp')
        return self.down(nnx.gelu(hidden, approximate=True))


def plain_norm(dim: int, dtype, rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(dim, epsilon=1e-6, use_bias=False, use_scale=False, dtype=dtype, rngs=rngs)


class Block(nnx.Module):
    """Attention and MLP, modulated by the condition (adaLN-Zero: the identity at first)."""

    def __init__(self, dim: int, heads: int, *, dtype, rngs):
        self.modulation = linear(dim, 6 * dim, dtype=dtype, kernel_init=zeros, rngs=rngs)
        self.norm1, self.norm2 = plain_norm(dim, dtype, rngs), plain_norm(dim, dtype, rngs)
        self.attention = SelfAttention(dim, heads, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(dim, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, 'b n k'],
        c: Float[Array, 'b k'],
        angles: Angles | None,
    ) -> Float[Array, 'b n k']:
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(
            self.modulation(c)[:, None], 6, axis=-1
        )
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1, angles)
        x = checkpoint_name(x, 'residual')
        x = x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)
        return shard(x, 'batch', None, None)


class Trunk(nnx.Module):
    """`depth` blocks and the final layer: tokens [b n k], condition [b k] -> [b n out]."""

    def __init__(self, dim: int, depth: int, heads: int, out: int, *, remat: str, dtype, rngs):
        if remat not in REMAT:
            raise UserError(f'remat={remat!r} is unknown: choose one of {", ".join(REMAT)}')
        self.remat, self.dtype = remat, dtype
        self.blocks = stack(lambda rngs: Block(dim, heads, dtype=dtype, rngs=rngs), depth, rngs)
        f32 = dict(dtype=jnp.float32, kernel_init=zeros, rngs=rngs)
        self.norm = plain_norm(dim, jnp.float32, rngs)
        self.final_modulation = linear(dim, 2 * dim, **f32)
        self.head = linear(dim, out, **f32)

    def __call__(
        self,
        x: Float[Array, 'b n k'],
        c: Float[Array, 'b k'],
        angles: Angles | None = None,
        read: int | None = None,
    ) -> Float[Array, 'b read out']:
        """`angles`: rotary positions; `read`: how many of the first tokens are read out."""
        c = nnx.silu(c)
        blocks_c = c.astype(self.dtype)
        x = x.astype(self.dtype)
        x = run_stack(self.blocks, x, lambda block, x: block(x, blocks_c, angles), self.remat)
        x = x[:, :read].astype(jnp.float32)
        shift, scale = jnp.split(self.final_modulation(c)[:, None], 2, axis=-1)
        return self.head(self.norm(x) * (1 + scale) + shift)
