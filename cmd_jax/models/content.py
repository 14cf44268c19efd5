"""ContentDiT: the class-conditional diffusion transformer of content frames."""

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from cmd_jax.errors import UserError
from cmd_jax.models.dit import Positions, TimestepEmbed, Trunk, label_init
from cmd_jax.models.layers import axial_angles, check_rotary, linear, patchify, unpatchify


class ContentDiT(nnx.Module):
    """DiT (Peebles and Xie 2023) on content frames of any size that the patch divides.

    Args:
      height, width, channels: size of the content frame.
      patch: patch size.
      dim, depth, heads: see `dit.SIZES`; the paper's row for UCF-101 is XL (its code: L).
      num_classes: 0 for a model without condition. The index `num_classes` is the null class.
      learn_sigma: whether the output holds variance channels behind the epsilon channels.
      rotary: rotary positions in every attention, besides DiT's table at the input: small models
        learn several times faster with it.
      remat: a name of `layers.REMAT`.
      dtype: what linear layers compute in; parameters are float32.
    """

    def __init__(
        self,
        *,
        height: int,
        width: int,
        channels: int = 3,
        patch: int = 2,
        dim: int = 1024,
        depth: int = 24,
        heads: int = 16,
        num_classes: int = 0,
        learn_sigma: bool = True,
        rotary: bool = False,
        remat: str = 'none',
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        for name, size in (('height', height), ('width', width)):
            if size % patch:
                raise UserError(f'{name}={size} is not divisible by patch={patch}: change one')
        self.patch, self.rows, self.columns = patch, height // patch, width // patch
        self.channels, self.num_classes, self.learn_sigma = channels, num_classes, learn_sigma
        self.head_dim = dim // heads if rotary else None
        if rotary:
            check_rotary(self.head_dim)
        self.patch_embed = linear(patch * patch * channels, dim, dtype=dtype, rngs=rngs)
        self.positions = Positions(self.rows, self.columns, dim)
        self.time_embed = TimestepEmbed(dim, rngs=rngs)
        if num_classes:
            self.label_embed = nnx.Embed(num_classes + 1, dim, embedding_init=label_init, rngs=rngs)
        out = patch * patch * channels * (2 if learn_sigma else 1)
        self.trunk = Trunk(dim, depth, heads, out, remat=remat, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, 'b h w c'],
        t: Float[Array, 'b'],
        label: Int[Array, 'b'] | None = None,
    ) -> Float[Array, 'b h w out']:
        """Noisy frame, timestep in 0..1000, label in 0..num_classes -> epsilon or v (and sigma)."""
        tokens = rearrange(patchify(x, self.patch), 'b h w p -> b (h w) p')
        tokens = self.patch_embed(tokens) + self.positions()
        c = self.time_embed(t)
        if self.num_classes:
            c = c + self.label_embed(label)
        angles = None
        if self.head_dim:
            angles = axial_angles(self.rows, self.columns, self.head_dim)
        out = self.trunk(tokens, c, angles)
        out = rearrange(out, 'b (h w) p -> b h w p', h=self.rows)
        return unpatchify(out, self.patch)

    def null_condition(self, label: Int[Array, 'b']) -> Int[Array, 'b']:
        """What replaces `label` for no condition: label drop in training, guidance in sampling."""
        return jnp.full_like(label, self.num_classes)
