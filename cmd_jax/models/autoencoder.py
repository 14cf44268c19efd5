"""The content-motion autoencoder (paper, section 3.1): video <-> content frame + motion latent.

With p the patch size, h' = height / p and w' = width / p:

    encode: video [b t h w c] -> content [b h w c], motion [b t w'+h' d]
    decode: content, motion -> video [b t h w c]

Encoder and decoder are TimeSformer backbones (Bertasius et al. 2021) with divided space-time
attention. The content frame is a weighted mean of the frames, with weights that the encoder
computes per pixel and channel; the motion latent is the encoder's output averaged over rows
(the width part, first) and over columns (the height part).
"""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from cmd_jax.errors import UserError
from cmd_jax.models.layers import (
    REMAT,
    Angles,
    SelfAttention,
    axial_angles,
    check_rotary,
    gelu,
    linear,
    patchify,
    run_stack,
    stack,
    unpatchify,
)
from cmd_jax.parallel.mesh import shard

POSITIONS = ('rotary', 'none')
OUTPUTS = ('sigmoid', 'linear')
CONTENT_FRAMES = ('weighted', 'mean')

TimeAngles = Float[Array | np.ndarray, 't half_d']


def time_angles(frames: int, head_dim: int) -> TimeAngles:
    """Rotation angles of frame numbers: t * 10000^(-2i / head_dim)."""
    frequencies = 10000.0 ** (-np.arange(0, head_dim, 2) / head_dim)
    return np.outer(np.arange(frames), frequencies).astype(np.float32)


class FeedForward(nnx.Module):
    """GEGLU (Shazeer 2020, arXiv 2002.05202) of ratio 4 with the exact GELU; value half first."""

    def __init__(self, dim: int, *, dtype, rngs):
        self.up = linear(dim, 8 * dim, dtype=dtype, rngs=rngs)
        self.down = linear(4 * dim, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, 'b t n k']) -> Float[Array, 'b t n k']:
        hidden = shard(checkpoint_name(self.up(x), 'mlp'), 'batch', 'frames', None, None)
        value, gate = jnp.split(hidden, 2, axis=-1)
        return self.down(value * gelu(gate))


class SpaceTimeBlock(nnx.Module):
    """Temporal attention, spatial attention, feed-forward: each pre-norm with a residual."""

    def __init__(self, dim: int, heads: int, head_dim: int | None, *, dtype, rngs):
        def norm():
            return nnx.LayerNorm(dim, epsilon=1e-5, dtype=dtype, rngs=rngs)

        self.time_norm, self.space_norm, self.mlp_norm = norm(), norm(), norm()
        self.time = SelfAttention(dim, heads, head_dim, dtype=dtype, rngs=rngs)
        self.space = SelfAttention(dim, heads, head_dim, dtype=dtype, rngs=rngs)
        self.mlp = FeedForward(dim, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, 'b t n k'],
        time_angles: TimeAngles | None,
        space_angles: Angles | None,
    ) -> Float[Array, 'b t n k']:
        # Over time each device has all frames of some places, else all places of some frames.
        h = shard(rearrange(x, 'b t n k -> b n t k'), 'batch', 'frames', None, None)
        h = self.time(self.time_norm(h), time_angles)
        h = shard(rearrange(h, 'b n t k -> b t n k'), 'batch', 'frames', None, None)
        x = checkpoint_name(x + h, 'residual')
        x = checkpoint_name(x + self.space(self.space_norm(x), space_angles), 'residual')
        x = x + self.mlp(self.mlp_norm(x))
        return shard(x, 'batch', 'frames', None, None)


class Backbone(nnx.Module):
    """`depth` space-time blocks over tokens [b t h' w' k], no final norm."""

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        head_dim: int | None,
        *,
        position: str,
        remat: str,
        dtype,
        rngs,
    ):
        self.head_dim = head_dim or dim // heads
        self.position, self.remat, self.dtype = position, remat, dtype
        self.blocks = stack(
            lambda rngs: SpaceTimeBlock(dim, heads, head_dim, dtype=dtype, rngs=rngs), depth, rngs
        )

    def __call__(self, x: Float[Array, 'b t h w k']) -> Float[Array, 'b t h w k']:
        _, t, h, w, _ = x.shape
        angles = (None, None)
        if self.position == 'rotary':
            angles = (time_angles(t, self.head_dim), axial_angles(h, w, self.head_dim))
        x = rearrange(x, 'b t h w k -> b t (h w) k').astype(self.dtype)
        # Devices share the frames, not the layers.
        x = run_stack(self.blocks, x, lambda block, x: block(x, *angles), self.remat, keep=())
        return rearrange(x, 'b t (h w) k -> b t h w k', h=h)


class VideoAutoencoder(nnx.Module):
    """Encodes a video as a content frame and a motion latent, and decodes it.

    Args:
      frames, height, width, channels: the size of the video. RGB in [-1, 1] (pixel mode), or scaled
        latents of an image autoencoder (latent mode).
      patch: patch size; divides height and width.
      dim, depth, heads: width of the tokens, blocks in the encoder and in the decoder, attention
        heads. The paper's rows: 384, 8, 8.
      head_dim: width of a head; None means dim / heads.
      motion_channels: channels of the motion latent (the paper's D).
      position: 'rotary' (over time, and over rows and columns) or 'none'.
      output: 'sigmoid' (pixel mode: values in [-1, 1]) or 'linear' (latent mode).
      content_frame: 'weighted' (learned weights) or 'mean' (plain mean of the frames, the paper's
        ablation).
      remat: a name of `layers.REMAT`.
      dtype: what linear layers compute in; parameters are float32.

    Raises:
      UserError: for sizes that do not divide, or unknown choices.
    """

    def __init__(
        self,
        *,
        frames: int,
        height: int,
        width: int,
        channels: int = 3,
        patch: int = 2,
        dim: int = 384,
        depth: int = 8,
        heads: int = 8,
        head_dim: int | None = None,
        motion_channels: int = 8,
        position: str = 'rotary',
        output: str = 'sigmoid',
        content_frame: str = 'weighted',
        remat: str = 'none',
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        for name, size in (('height', height), ('width', width)):
            if size % patch:
                raise UserError(f'{name}={size} is not divisible by patch={patch}: change one')
        for name, value, known in (
            ('position', position, POSITIONS),
            ('output', output, OUTPUTS),
            ('content_frame', content_frame, CONTENT_FRAMES),
            ('remat', remat, tuple(REMAT)),
        ):
            if value not in known:
                raise UserError(f'{name}={value!r} is unknown: choose one of {", ".join(known)}')
        if head_dim is None and dim % heads:
            raise UserError(f'dim={dim} is not divisible by heads={heads}: change one of them')
        if position == 'rotary':
            check_rotary(head_dim or dim // heads, ", or head_dim, or set position='none'")
        self.frames, self.height, self.width = frames, height, width
        self.channels, self.patch, self.motion_channels = channels, patch, motion_channels
        self.output, self.content_frame = output, content_frame
        self.rows, self.columns = height // patch, width // patch

        def backbone():
            return Backbone(
                dim,
                depth,
                heads,
                head_dim,
                position=position,
                remat=remat,
                dtype=dtype,
                rngs=rngs,
            )

        pixels = patch * patch * channels
        # What becomes pixels or latents is float32, to keep their resolution.
        f32 = dict(dtype=jnp.float32, rngs=rngs)
        self.patch_embed = linear(pixels, dim, dtype=dtype, rngs=rngs)
        self.encoder = backbone()
        # Zeros: training starts from the plain mean, and leaves it only where that helps. Random
        # weights would speckle the content frame for good.
        zeros = nnx.initializers.zeros_init()
        self.importance_head = linear(dim, pixels, kernel_init=zeros, **f32)
        self.width_head = linear(dim, motion_channels, **f32)
        self.height_head = linear(dim, motion_channels, **f32)
        self.content_embed = linear(pixels, dim, dtype=dtype, rngs=rngs)
        # Latents begin at their mean, and without motion: from a random start, several times as far
        # from them as that, the motion latent is driven into the ends of its tanh and stays there.
        begin = {'kernel_init': zeros} if output == 'linear' else {}
        self.width_embed = linear(motion_channels, dim, dtype=dtype, rngs=rngs, **begin)
        self.height_embed = linear(motion_channels, dim, dtype=dtype, rngs=rngs, **begin)
        self.decoder = backbone()
        self.output_head = linear(dim, pixels, **begin, **f32)

    @property
    def motion_tokens(self) -> int:
        """Spatial length of the motion latent: w' + h'."""
        return self.columns + self.rows

    def importance(self, video: Float[Array, 'b t h w c']) -> Float[Array, 'b t h w c']:
        """The weights of the content frame: non-negative, summing to 1 over the frames."""
        return self._importance(self._features(video))

    def encode(
        self, video: Float[Array, 'b t h w c']
    ) -> tuple[Float[Array, 'b h w c'], Float[Array, 'b t s d']]:
        """Content frame in the per-pixel range of the frames; motion latent in (-1, 1)."""
        u = self._features(video)
        video = video.astype(jnp.float32)
        if self.content_frame == 'mean':
            content = video.mean(1)
        else:
            content = (video * self._importance(u)).sum(1)
        u = u.astype(jnp.float32)
        motion = [self.width_head(u.mean(2)), self.height_head(u.mean(3))]
        return content, jnp.tanh(jnp.concatenate(motion, axis=2))

    def decode(
        self, content: Float[Array, 'b h w c'], motion: Float[Array, 'b t s d']
    ) -> Float[Array, 'b t h w c']:
        """The video; in [-1, 1] with output='sigmoid'."""
        self._check('content', content, (self.height, self.width, self.channels))
        self._check('motion', motion, (self.frames, self.motion_tokens, self.motion_channels))
        across, down = jnp.split(motion, [self.columns], axis=2)
        u = self.content_embed(patchify(content, self.patch))[:, None]
        u = u + self.width_embed(across)[:, :, None] + self.height_embed(down)[:, :, :, None]
        x = unpatchify(self.output_head(self.decoder(u).astype(jnp.float32)), self.patch)
        return 2 * jax.nn.sigmoid(x) - 1 if self.output == 'sigmoid' else x

    def __call__(self, video: Float[Array, 'b t h w c']) -> Float[Array, 'b t h w c']:
        """The reconstruction."""
        return self.decode(*self.encode(video))

    def _features(self, video):
        self._check('video', video, (self.frames, self.height, self.width, self.channels))
        return self.encoder(self.patch_embed(patchify(video, self.patch)))

    def _importance(self, u):
        logits = unpatchify(self.importance_head(u.astype(jnp.float32)), self.patch)
        return jax.nn.softmax(logits, axis=1)

    @staticmethod
    def _check(name, x, shape):
        if x.shape[1:] != shape:
            raise UserError(
                f'{name} has the shape {x.shape[1:]} after the batch axis, but this autoencoder '
                f'was built for {shape}'
            )
