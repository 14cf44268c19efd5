"""MotionDiT: the diffusion transformer of motion latents, given the content frame."""

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from cmd_jax.errors import UserError
from cmd_jax.models.dit import Positions, TimestepEmbed, Trunk, label_init
from cmd_jax.models.layers import axial_angles, check_rotary, linear, patchify, unpatchify


class MotionDiT(nnx.Module):
    """DiT on the motion latent seen as an image of frames x tokens (paper, section 3.2).

    The content frame enters as further input tokens with a patch size of its own; only the motion
    tokens are read out. The condition is a class or a vector of text features, added to the
    timestep embedding.

    Args:
      frames, tokens, channels: size of the motion latent, [t s d] with s = w' + h'.
      patch: patch size on the motion latent; divides frames and tokens.
      content_size: (height, width, channels) of the content frame.
      content_patch: its patch size. The paper: 4; 8 for 512x1024.
      dim, depth, heads: see `dit.SIZES`; the paper's rows: L for UCF-101, XL for WebVid.
      num_classes: classes of the condition; the index `num_classes` is the null class.
      text_dim: width of the text features, instead of classes. All-zero features are the null
        condition: the linear map's bias is then its learned embedding.
      learn_sigma: whether the output holds variance channels behind the epsilon channels.
      rotary: rotary positions in every attention, besides DiT's table at the input: small models
        learn several times faster with it.
      remat: a name of `layers.REMAT`.
      dtype: what linear layers compute in; parameters are float32.
    """

    def __init__(
        self,
        *,
        frames: int,
        tokens: int,
        channels: int,
        content_size: tuple[int, int, int],
        patch: int = 2,
        content_patch: int = 4,
        dim: int = 1024,
        depth: int = 24,
        heads: int = 16,
        num_classes: int = 0,
        text_dim: int = 0,
        learn_sigma: bool = True,
        rotary: bool = False,
        remat: str = 'none',
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        height, width, content_channels = content_size
        for name, size, field, by in (
            ('frames', frames, 'patch', patch),
            ('tokens', tokens, 'patch', patch),
            ('content height', height, 'content_patch', content_patch),
            ('content width', width, 'content_patch', content_patch),
        ):
            if size % by:
                raise UserError(f'{name}={size} is not divisible by {field}={by}: change one')
        if num_classes and text_dim:
            raise UserError(f'num_classes={num_classes} and text_dim={text_dim}: give one of them')
        self.patch, self.content_patch = patch, content_patch
        self.rows, self.columns = frames // patch, tokens // patch
        self.channels, self.learn_sigma = channels, learn_sigma
        self.num_classes, self.text_dim = num_classes, text_dim
        self.head_dim = dim // heads if rotary else None
        if rotary:
            check_rotary(self.head_dim)
        self.patch_embed = linear(patch * patch * channels, dim, dtype=dtype, rngs=rngs)
        self.positions = Positions(self.rows, self.columns, dim)
        self.content_embed = linear(
            content_patch**2 * content_channels, dim, dtype=dtype, rngs=rngs
        )
        self.content_positions = Positions(height // content_patch, width // content_patch, dim)
        self.time_embed = TimestepEmbed(dim, rngs=rngs)
        if num_classes:
            self.label_embed = nnx.Embed(num_classes + 1, dim, embedding_init=label_init, rngs=rngs)
        if text_dim:
            self.text_embed = linear(text_dim, dim, dtype=jnp.float32, rngs=rngs)
        out = patch * patch * channels * (2 if learn_sigma else 1)
        self.trunk = Trunk(dim, depth, heads, out, remat=remat, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        z: Float[Array, 'b t s d'],
        t: Float[Array, 'b'],
        content: Float[Array, 'b h w c'],
        condition: Int[Array, 'b'] | Float[Array, 'b k'] | None = None,
    ) -> Float[Array, 'b t s out']:
        """Noisy normalised motion latent, timestep, content frame, class or text features."""
        motion = rearrange(patchify(z, self.patch), 'b t s p -> b (t s) p')
        motion = self.patch_embed(motion) + self.positions()
        frame = patchify(content, self.content_patch)
        frame_grid = frame.shape[1:3]
        frame = rearrange(frame, 'b h w p -> b (h w) p')
        frame = self.content_embed(frame) + self.content_positions()
        c = self.time_embed(t)
        if self.num_classes:
            c = c + self.label_embed(condition)
        if self.text_dim:
            c = c + self.text_embed(condition)
        angles = None
        if self.head_dim:
            grids = (self.rows, self.columns), frame_grid
            angles = np.concatenate([axial_angles(*grid, self.head_dim) for grid in grids])
        tokens = jnp.concatenate([motion, frame], axis=1)
        out = self.trunk(tokens, c, angles, read=motion.shape[1])
        out = rearrange(out, 'b (t s) p -> b t s p', t=self.rows)
        return unpatchify(out, self.patch)

    def null_condition(
        self, condition: Int[Array, 'b'] | Float[Array, 'b k']
    ) -> Int[Array, 'b'] | Float[Array, 'b k']:
        """What replaces `condition` for none: label or text drop in training, guidance in sampling.

        The class behind the last, or features of zeros.
        """
        return jnp.full_like(condition, 0 if self.text_dim else self.num_classes)
