"""Parts that the U-Net and the VAE share.

Modules and their attributes are named as diffusers names its parameters, so that `weights` maps
files onto them by one rule. Images are channels-last, [b h w c].
"""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce, repeat
from flax import nnx
from jaxtyping import Array, Float

from cmd_jax.models.attention import attention
from cmd_jax.models.layers import linear
from cmd_jax.parallel.mesh import shard


class Conv(nnx.Conv):
    """Where a mesh splits images and kernel over the same devices, the kernel is gathered.

    `split`: the logical axis of the channels that come out, see `parallel.mesh`.
    """

    split: str | None = None

    def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b h2 w2 c2']:
        return shard(super().__call__(x), 'batch', None, None, self.split)


def conv(
    in_dim: int, out_dim: int, kernel: int, *, dtype, rngs, strides=1, padding=None, split=None
):
    """A square convolution; the padding keeps the size at stride 1 unless given."""
    side = kernel // 2
    made = Conv(
        in_dim,
        out_dim,
        (kernel, kernel),
        strides=strides,
        padding=padding or ((side, side), (side, side)),
        dtype=dtype,
        rngs=rngs,
    )
    made.split = split
    return made


class GroupNorm(nnx.GroupNorm):
    """Statistics of each channel over the pixels, and of these over a channel's group.

    Images keep their shape. nnx's splits their channels into groups of a few, which a TPU lays out
    in rows of 128: copies many times the image.
    """

    def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b h w c']:
        wide = x.astype(jnp.float32)
        moments = jnp.stack([wide.mean((1, 2)), jnp.square(wide).mean((1, 2))])
        moments = reduce(moments, 'm b (g c) -> m b g', 'mean', g=self.num_groups)
        mean, square = repeat(moments, 'm b g -> m b 1 1 (g c)', c=self.group_size)
        variance = jnp.maximum(square - jnp.square(mean), 0)
        factor = jax.lax.rsqrt(variance + self.epsilon) * self.scale[...]
        return ((wide - mean) * factor + self.bias[...]).astype(self.dtype)


def group_norm(dim: int, groups: int, epsilon: float, *, dtype, rngs) -> GroupNorm:
    return GroupNorm(dim, num_groups=groups, epsilon=epsilon, dtype=dtype, rngs=rngs)


class Identity(nnx.Module):
    """Holds the place of a layer without parameters in a numbered list (dropout)."""

    def __call__(self, x):
        return x


class ResnetBlock(nnx.Module):
    """Two normalised convolutions around a residual; the time embedding, if any, in between."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        time_dim: int | None,
        *,
        groups: int,
        epsilon: float,
        dtype,
        rngs,
    ):
        self.norm1 = group_norm(in_dim, groups, epsilon, dtype=dtype, rngs=rngs)
        self.conv1 = conv(in_dim, out_dim, 3, dtype=dtype, rngs=rngs, split='mlp')
        if time_dim:
            self.time_emb_proj = linear(time_dim, out_dim, dtype=dtype, rngs=rngs)
        self.norm2 = group_norm(out_dim, groups, epsilon, dtype=dtype, rngs=rngs)
        self.conv2 = conv(out_dim, out_dim, 3, dtype=dtype, rngs=rngs)
        self.has_shortcut = in_dim != out_dim
        if self.has_shortcut:
            self.conv_shortcut = conv(in_dim, out_dim, 1, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, 'b h w c'], time: Float[Array, 'b k'] | None = None
    ) -> Float[Array, 'b h w c2']:
        h = self.conv1(nnx.silu(self.norm1(x)))
        if time is not None:
            shift = shard(self.time_emb_proj(nnx.silu(time)), 'batch', 'mlp')
            h = h + shift[:, None, None]
        h = self.conv2(nnx.silu(self.norm2(h)))
        if self.has_shortcut:
            x = self.conv_shortcut(x)
        return x + h


class Attention(nnx.Module):
    """Multi-head attention of x [b n k] over itself or over `context` [b m k2]."""

    def __init__(
        self,
        dim: int,
        context_dim: int,
        heads: int,
        *,
        bias: bool,
        dtype,
        rngs,
    ):
        self.heads = heads
        kwargs = dict(dtype=dtype, rngs=rngs)
        self.to_q = linear(dim, dim, use_bias=bias, **kwargs)
        self.to_k = linear(context_dim, dim, use_bias=bias, **kwargs)
        self.to_v = linear(context_dim, dim, use_bias=bias, **kwargs)
        self.to_out = nnx.List([linear(dim, dim, **kwargs), Identity()])

    def __call__(
        self, x: Float[Array, 'b n k'], context: Float[Array, 'b m k2'] | None = None
    ) -> Float[Array, 'b n k']:
        context = x if context is None else context

        def heads(y):
            y = rearrange(y, 'b n (h d) -> b n h d', h=self.heads)
            return shard(y, 'batch', None, 'heads', None)

        out = attention(heads(self.to_q(x)), heads(self.to_k(context)), heads(self.to_v(context)))
        return self.to_out[0](rearrange(out, 'b n h d -> b n (h d)'))


class Downsample(nnx.Module):
    """A convolution of stride 2; the VAE's encoder pads right and bottom only."""

    def __init__(self, dim: int, *, both_sides: bool, dtype, rngs):
        padding = ((1, 1), (1, 1)) if both_sides else ((0, 1), (0, 1))
        self.conv = conv(dim, dim, 3, strides=2, padding=padding, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b h2 w2 c']:
        return self.conv(x)


class Upsample(nnx.Module):
    """Nearest neighbours to `size` (twice the size by default), then a convolution."""

    def __init__(self, dim: int, *, dtype, rngs):
        self.conv = conv(dim, dim, 3, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, 'b h w c'], size: tuple[int, int] | None = None
    ) -> Float[Array, 'b h2 w2 c']:
        for axis, length in zip((1, 2), size or (2 * x.shape[1], 2 * x.shape[2])):
            if length == 2 * x.shape[axis]:
                x = jnp.repeat(x, 2, axis=axis)
            else:  # pixel i shows source pixel floor(i / scale), as PyTorch has it
                x = jnp.take(x, np.arange(length) * x.shape[axis] // length, axis=axis)
        return self.conv(x)
