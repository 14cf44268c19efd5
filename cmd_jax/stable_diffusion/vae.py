"""The image autoencoder (VAE) of Stable Diffusion 1.x and 2.x.

    moments: images [b h w 3] in [-1, 1] -> mean, log variance [b h/8 w/8 4]
    decode: latents [b h/8 w/8 4] -> images [b h w 3]

Latents are unscaled here: diffusion works on latents * scaling_factor. Modules and attributes carry
diffusers' names (`AutoencoderKL`).
"""

import functools

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from cmd_jax.errors import UserError
from cmd_jax.stable_diffusion.layers import (
    Attention,
    Downsample,
    ResnetBlock,
    Upsample,
    conv,
    group_norm,
)

EPSILON = 1e-6
LOG_VARIANCE = (-30.0, 20.0)  # bounds of the posterior's log variance


class PixelAttention(Attention):
    """One head over all pixels of a group-normalised image, with a residual."""

    def __init__(self, dim: int, *, groups: int, dtype, rngs):
        super().__init__(dim, dim, 1, bias=True, dtype=dtype, rngs=rngs)
        self.group_norm = group_norm(dim, groups, EPSILON, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b h w c']:
        tokens = rearrange(self.group_norm(x), 'b h w c -> b (h w) c')
        return x + rearrange(super().__call__(tokens), 'b (h w) c -> b h w c', h=x.shape[1])


class Middle(nnx.Module):
    """Residual block, attention, residual block."""

    def __init__(self, dim: int, make_resnet, *, groups: int, dtype, rngs):
        self.resnets = nnx.List([make_resnet(dim, dim), make_resnet(dim, dim)])
        self.attentions = nnx.List([PixelAttention(dim, groups=groups, dtype=dtype, rngs=rngs)])

    def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b h w c']:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Level(nnx.Module):
    """One resolution: residual blocks and a change of resolution behind them."""

    def __init__(
        self, before: int, dim: int, layers: int, make_resnet, *, down=False, up=False, dtype, rngs
    ):
        dims = [before] + [dim] * (layers - 1)
        self.resnets = nnx.List([make_resnet(width, dim) for width in dims])
        kwargs = dict(dtype=dtype, rngs=rngs)
        self.downsamplers = nnx.List([Downsample(dim, both_sides=False, **kwargs)] if down else [])
        self.upsamplers = nnx.List([Upsample(dim, **kwargs)] if up else [])

    def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b h2 w2 c2']:
        for layer in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = layer(x)
        return x


class Encoder(nnx.Module):
    def __init__(self, channels, latent_channels, block_channels, layers, *, groups, dtype, rngs):
        kwargs = dict(dtype=dtype, rngs=rngs)
        make_resnet = resnet_maker(groups, **kwargs)
        width, last = block_channels[0], block_channels[-1]
        self.conv_in = conv(channels, width, 3, **kwargs)
        self.down_blocks = nnx.List([])
        for i, dim in enumerate(block_channels):
            down = i < len(block_channels) - 1
            self.down_blocks.append(Level(width, dim, layers, make_resnet, down=down, **kwargs))
            width = dim
        self.mid_block = Middle(last, make_resnet, groups=groups, **kwargs)
        self.conv_norm_out = group_norm(last, groups, EPSILON, **kwargs)
        self.conv_out = conv(last, 2 * latent_channels, 3, **kwargs)

    def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b h2 w2 c2']:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    def __init__(self, channels, latent_channels, block_channels, layers, *, groups, dtype, rngs):
        kwargs = dict(dtype=dtype, rngs=rngs)
        make_resnet = resnet_maker(groups, **kwargs)
        width = block_channels[-1]
        self.conv_in = conv(latent_channels, width, 3, **kwargs)
        self.mid_block = Middle(width, make_resnet, groups=groups, **kwargs)
        self.up_blocks = nnx.List([])
        for i, dim in enumerate(reversed(block_channels)):
            up = i < len(block_channels) - 1
            self.up_blocks.append(Level(width, dim, layers + 1, make_resnet, up=up, **kwargs))
            width = dim
        self.conv_norm_out = group_norm(width, groups, EPSILON, **kwargs)
        self.conv_out = conv(width, channels, 3, **kwargs)

    def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b h2 w2 c2']:
        x = self.mid_block(self.conv_in(x))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(x)))


def resnet_maker(groups: int, **kwargs):
    return functools.partial(ResnetBlock, time_dim=None, groups=groups, epsilon=EPSILON, **kwargs)


class VAE(nnx.Module):
    """Args:
    channels: of images.
    latent_channels: of latents.
    block_channels: width of each resolution, from the finest to the coarsest.
    layers: residual blocks per resolution in the encoder (one more in the decoder).
    groups: of the group norms.
    scaling_factor: what latents are multiplied by for diffusion.
    dtype: what is computed in; parameters are float32.
    """

    def __init__(
        self,
        *,
        channels: int = 3,
        latent_channels: int = 4,
        block_channels: tuple[int, ...] = (128, 256, 512, 512),
        layers: int = 2,
        groups: int = 32,
        scaling_factor: float = 0.18215,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.channels, self.latent_channels = channels, latent_channels
        self.factor = 2 ** (len(block_channels) - 1)
        self.scaling_factor, self.dtype = scaling_factor, dtype
        sizes = (channels, latent_channels, block_channels, layers)
        kwargs = dict(dtype=dtype, rngs=rngs)
        self.encoder = Encoder(*sizes, groups=groups, **kwargs)
        self.decoder = Decoder(*sizes, groups=groups, **kwargs)
        f32 = dict(dtype=jnp.float32, rngs=rngs)
        self.quant_conv = conv(2 * latent_channels, 2 * latent_channels, 1, **f32)
        self.post_quant_conv = conv(latent_channels, latent_channels, 1, **f32)

    def moments(
        self, images: Float[Array, 'b h w c']
    ) -> tuple[Float[Array, 'b h2 w2 d'], Float[Array, 'b h2 w2 d']]:
        """Mean and log variance of the posterior of unscaled latents, float32."""
        _, height, width, channels = images.shape
        if height % self.factor or width % self.factor or channels != self.channels:
            raise UserError(
                f'images of {height} x {width} x {channels}: height and width must be multiples of '
                f'{self.factor}, channels {self.channels}'
            )
        x = self.encoder(images.astype(self.dtype)).astype(jnp.float32)
        mean, log_variance = jnp.split(self.quant_conv(x), 2, axis=-1)
        return mean, jnp.clip(log_variance, *LOG_VARIANCE)

    def decode(self, latents: Float[Array, 'b h w d']) -> Float[Array, 'b h2 w2 c']:
        """Images, about in [-1, 1], float32; latents are unscaled."""
        x = self.post_quant_conv(latents.astype(jnp.float32)).astype(self.dtype)
        return self.decoder(x).astype(jnp.float32)
