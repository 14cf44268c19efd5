"""The U-Net of Stable Diffusion 1.x and 2.x (Rombach et al. 2022, arXiv 2112.10752).

    noisy latents [b h w 4], timesteps [b], text [b n k] -> epsilon or v [b h w 4]

Modules and attributes carry diffusers' names (`UNet2DConditionModel`).
"""

import functools

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from cmd_jax.errors import UserError
from cmd_jax.models.dit import timestep_features
from cmd_jax.models.layers import gathered, gelu, linear, run_block
from cmd_jax.parallel.mesh import shard
from cmd_jax.stable_diffusion.layers import (
    Attention,
    Downsample,
    Identity,
    ResnetBlock,
    Upsample,
    conv,
    group_norm,
)

DOWN_BLOCKS = ('CrossAttnDownBlock2D', 'DownBlock2D')
UP_BLOCKS = ('CrossAttnUpBlock2D', 'UpBlock2D')
EPSILON = 1e-5  # of the residual blocks and of the output


class TimestepEmbedding(nnx.Module):
    def __init__(self, in_dim: int, dim: int, *, dtype, rngs):
        self.linear_1 = linear(in_dim, dim, dtype=dtype, rngs=rngs)
        self.linear_2 = linear(dim, dim, dtype=dtype, rngs=rngs)

    def __call__(self, t: Float[Array, 'b k']) -> Float[Array, 'b k2']:
        hidden = shard(nnx.silu(self.linear_1(t)), 'batch', None)
        return shard(self.linear_2(hidden), 'batch', None)


class GEGLU(nnx.Module):
    def __init__(self, dim: int, hidden: int, *, dtype, rngs):
        self.proj = linear(dim, 2 * hidden, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, 'b n k']) -> Float[Array, 'b n k2']:
        value, gate = jnp.split(shard(self.proj(x), 'batch', None, 'mlp'), 2, axis=-1)
        return value * gelu(gate)


class FeedForward(nnx.Module):
    def __init__(self, dim: int, *, dtype, rngs):
        kwargs = dict(dtype=dtype, rngs=rngs)
        self.net = nnx.List(
            [GEGLU(dim, 4 * dim, **kwargs), Identity(), linear(4 * dim, dim, **kwargs)]
        )

    def __call__(self, x: Float[Array, 'b n k']) -> Float[Array, 'b n k']:
        return self.net[2](self.net[0](x))


class TransformerBlock(nnx.Module):
    """Self-attention, attention to the text, feed-forward: each pre-norm with a residual."""

    def __init__(self, dim: int, heads: int, text_dim: int, *, dtype, rngs):
        kwargs = dict(dtype=dtype, rngs=rngs)

        def norm():
            return nnx.LayerNorm(dim, epsilon=1e-5, **kwargs)

        self.norm1, self.norm2, self.norm3 = norm(), norm(), norm()
        self.attn1 = Attention(dim, dim, heads, bias=False, **kwargs)
        self.attn2 = Attention(dim, text_dim, heads, bias=False, **kwargs)
        self.ff = FeedForward(dim, **kwargs)

    def __call__(
        self, x: Float[Array, 'b n k'], text: Float[Array, 'b m k2']
    ) -> Float[Array, 'b n k']:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), text)
        return shard(x + self.ff(self.norm3(x)), 'batch', None, None)


class Transformer(nnx.Module):
    """Transformer blocks over the pixels of an image, with a residual around them."""

    def __init__(
        self,
        dim: int,
        heads: int,
        depth: int,
        text_dim: int,
        *,
        groups: int,
        linear_projection: bool,
        dtype,
        rngs,
    ):
        kwargs = dict(dtype=dtype, rngs=rngs)
        self.norm = group_norm(dim, groups, 1e-6, **kwargs)
        project = linear if linear_projection else functools.partial(conv, kernel=1)
        self.proj_in = project(dim, dim, **kwargs)
        self.transformer_blocks = nnx.List(
            [TransformerBlock(dim, heads, text_dim, **kwargs) for _ in range(depth)]
        )
        self.proj_out = project(dim, dim, **kwargs)

    def __call__(
        self, x: Float[Array, 'b h w c'], text: Float[Array, 'b m k']
    ) -> Float[Array, 'b h w c']:
        tokens = self.proj_in(self.norm(x))
        tokens = rearrange(tokens, 'b h w c -> b (h w) c')
        for block in self.transformer_blocks:
            tokens = block(tokens, text)
        tokens = rearrange(tokens, 'b (h w) c -> b h w c', h=x.shape[1])
        return x + self.proj_out(tokens)


class Level(nnx.Module):
    """One resolution of the U-Net: residual blocks, each with attention to the text or without,
    and a change of resolution behind them."""

    def __init__(
        self,
        dims: list[tuple[int, int]],
        make_attention,
        make_resnet,
        *,
        down: bool = False,
        up: bool = False,
        dtype,
        rngs,
    ):
        """`dims`: channels into and out of each residual block."""
        self.resnets = nnx.List([make_resnet(*pair) for pair in dims])
        self.attentions = nnx.List([make_attention(after) for _, after in dims if make_attention])
        last, kwargs = dims[-1][1], dict(dtype=dtype, rngs=rngs)
        self.downsamplers = nnx.List([Downsample(last, both_sides=True, **kwargs)] if down else [])
        self.upsamplers = nnx.List([Upsample(last, **kwargs)] if up else [])

    def layer(self, i: int, x, time, text, remat: str):
        x = run_block(self.resnets[i], x, time, remat=remat)
        return run_block(self.attentions[i], x, text, remat=remat) if self.attentions else x


class Middle(nnx.Module):
    """Residual block, attention, residual block."""

    def __init__(self, dim: int, make_attention, make_resnet):
        self.resnets = nnx.List([make_resnet(dim, dim), make_resnet(dim, dim)])
        self.attentions = nnx.List([make_attention(dim)])

    def __call__(self, x, time, text, remat: str):
        x = run_block(self.resnets[0], x, time, remat=remat)
        x = run_block(self.attentions[0], x, text, remat=remat)
        return run_block(self.resnets[1], x, time, remat=remat)


class UNet(nnx.Module):
    """Args:
      channels: of the latents, in and out.
      block_channels: width of each resolution, from the finest to the coarsest.
      cross_attention: for each resolution, whether it attends to the text.
      layers: residual blocks per resolution (one more on the way up).
      heads: for each resolution.
      text_dim: width of the text features.
      groups: of the group norms.
      linear_projection: linear maps around the transformers (2.x) rather than 1x1 convolutions.
      remat: 'none', or 'full': the backward pass keeps the input of each residual block and each
        transformer only.
      dtype: what is computed in; parameters are float32.

    Raises:
      UserError: for heads or groups that do not divide a width.
    """

    def __init__(
        self,
        *,
        channels: int = 4,
        block_channels: tuple[int, ...] = (320, 640, 1280, 1280),
        cross_attention: tuple[bool, ...] = (True, True, True, False),
        layers: int = 2,
        heads: tuple[int, ...] = (5, 10, 20, 20),
        text_dim: int = 1024,
        groups: int = 32,
        linear_projection: bool = True,
        remat: str = 'none',
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        for count, width in zip(heads, block_channels):
            if width % count:
                raise UserError(f'heads={count} does not divide the width {width}')
            if width % groups:
                raise UserError(f'groups={groups} does not divide the width {width}')
        if remat not in ('none', 'full'):
            raise UserError(f"remat={remat!r} is unknown: choose 'none' or 'full'")
        self.channels, self.dtype, self.remat = channels, dtype, remat
        first, levels = block_channels[0], len(block_channels)
        time_dim = 4 * first
        kwargs = dict(dtype=dtype, rngs=rngs)
        make_resnet = functools.partial(
            ResnetBlock, time_dim=time_dim, groups=groups, epsilon=EPSILON, **kwargs
        )

        def attention(level):
            return functools.partial(
                Transformer,
                heads=heads[level],
                depth=1,
                text_dim=text_dim,
                groups=groups,
                linear_projection=linear_projection,
                **kwargs,
            )

        self.time_dim = first
        self.time_embedding = TimestepEmbedding(first, time_dim, **kwargs)
        self.conv_in = conv(channels, first, 3, **kwargs)
        down, skips, width = [], [first], first
        for level, out in enumerate(block_channels):
            last = level == levels - 1
            dims = [(width if i == 0 else out, out) for i in range(layers)]
            make = attention(level) if cross_attention[level] else None
            down.append(Level(dims, make, make_resnet, down=not last, **kwargs))
            skips += [out] * (layers if last else layers + 1)
            width = out
        self.down_blocks = nnx.List(down)
        self.mid_block = Middle(width, attention(levels - 1), make_resnet)
        up = []
        for level in reversed(range(levels)):
            out, dims = block_channels[level], []
            for _ in range(layers + 1):
                dims.append((width + skips.pop(), out))
                width = out
            make = attention(level) if cross_attention[level] else None
            up.append(Level(dims, make, make_resnet, up=level > 0, **kwargs))
        self.up_blocks = nnx.List(up)
        self.conv_norm_out = group_norm(first, groups, EPSILON, **kwargs)
        self.conv_out = conv(first, channels, 3, dtype=jnp.float32, rngs=rngs)

    def __call__(
        self, x: Float[Array, 'b h w c'], t: Float[Array, 'b'], text: Float[Array, 'b n k']
    ) -> Float[Array, 'b h w c']:
        """Noisy latents, timesteps in 0..1000, text features -> epsilon or v, float32."""

        time = self.time_embedding(timestep_features(t, self.time_dim).astype(self.dtype))
        x, text = x.astype(self.dtype), shard(text.astype(self.dtype), 'batch', None, None)
        x = self.conv_in(x)
        skips = [x]
        for level in self.down_blocks:
            for i in range(len(level.resnets)):
                x = level.layer(i, x, time, text, self.remat)
                skips.append(x)
            for downsample in level.downsamplers:
                x = gathered(downsample)(x)
                skips.append(x)
        x = self.mid_block(x, time, text, self.remat)
        for level in self.up_blocks:
            for i in range(len(level.resnets)):
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = level.layer(i, x, time, text, self.remat)
            for upsample in level.upsamplers:
                # The size of what comes next, which is odd where a halving was rounded up.
                x = gathered(upsample)(x, skips[-1].shape[1:3])
        x = nnx.silu(self.conv_norm_out(x))
        return self.conv_out(x.astype(jnp.float32))
