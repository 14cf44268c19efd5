"""The VAE over the frames of videos, in a memory that the length of the videos does not change.

    encode_frames: frames [b t h w 3] -> scaled latents [b t h/f w/f d]
    decode_frames: scaled latents -> frames

Scaled latents are what diffusion works on: the VAE's times its scaling_factor. Videos and frames
are split over the devices of a mesh, each of which takes its videos side by side, and their frames
in groups, one after the other.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from cmd_jax.errors import UserError
from cmd_jax.parallel.mesh import split_frames
from cmd_jax.stable_diffusion.vae import VAE


def encode_frames(
    vae: VAE, frames: Float[Array, 'b t h w 3'], *, at_once: int, keys: Array | None = None
) -> Float[Array, 'b t h2 w2 d']:
    """Scaled latents of frames in [-1, 1], float32.

    Args:
      vae: its factor divides height and width.
      frames: of videos.
      at_once: frames that a device encodes together, of all its videos; one of each at least.
      keys: typed PRNG keys [b], one a video: latents are drawn from the posterior. A frame's noise
        depends on its video's key and its place in the video alone. Without keys, latents are the
        posterior's mean.

    Raises:
      UserError: at_once below 1, or a size that the VAE cannot take.
    """

    def encode(vae, keys, part, places):
        b, g = part.shape[:2]
        mean, log_variance = vae.moments(rearrange(part, 'b g h w c -> (b g) h w c'))
        if keys is not None:
            noise = jax.vmap(lambda key: frame_noise(key, places, mean.shape[1:]))(keys)
            noise = rearrange(noise, 'b g h w d -> (b g) h w d')
            mean = mean + jnp.exp(0.5 * log_variance) * noise
        return rearrange(mean * vae.scaling_factor, '(b g) h w d -> b g h w d', b=b, g=g)

    return in_groups(encode, vae, keys, frames, at_once)


def decode_frames(
    vae: VAE, latents: Float[Array, 'b t h w d'], *, at_once: int, tile: int | None = None
) -> Float[Array, 'b t h2 w2 3']:
    """Frames, about in [-1, 1], float32, of scaled latents.

    Args:
      vae: what made the latents.
      latents: of videos.
      at_once: frames that a device decodes together, of all its videos; one of each at least.
      tile: side of the tiles, in latents, that larger frames are decoded in, see `decode_tiles`.

    Raises:
      UserError: at_once below 1, or a tile that is no multiple of 4.
    """
    if tile is not None and (tile < 4 or tile % 4):
        raise UserError(f'tile={tile}: must be a multiple of 4, as tiles overlap by a quarter')

    def decode(vae, keys, part, places):
        b, g = part.shape[:2]
        z = rearrange(part, 'b g h w d -> (b g) h w d') / vae.scaling_factor
        images = vae.decode(z) if tile is None else decode_tiles(vae, z, tile)
        return rearrange(images, '(b g) h w c -> b g h w c', b=b, g=g)

    return in_groups(decode, vae, None, latents, at_once)


def in_groups(
    function: Callable, vae: VAE, keys: Array | None, x: Float[Array, 'b t ...'], at_once: int
) -> Float[Array, 'b t ...']:
    """Applies function(vae, keys [b], frames [b g ...], places [g]) to the frames x, by groups.

    Each device has the VAE whole and goes over its own videos and frames: nothing is communicated.
    The results are written to their place as they come, so that nothing of the size of a whole
    video is held but x and the result. The groups have one size; where it does not divide the
    frames, the last group begins earlier and makes a few frames a second time.
    """
    if at_once < 1:
        raise UserError(f'at_once={at_once}: must be at least 1')
    graphdef, params = nnx.split(vae, nnx.Param)

    def run(params, keys, x, places):
        vae, frames = nnx.merge(graphdef, params), x.shape[1]
        groups = -(-frames // max(1, at_once // len(x)))
        size = -(-frames // groups)

        def made(start):
            part = jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)
            return function(vae, keys, part, jax.lax.dynamic_slice_in_dim(places, start, size))

        def step(result, start):
            return jax.lax.dynamic_update_slice_in_dim(result, made(start), start, axis=1), None

        shape = jax.eval_shape(made, 0).shape
        result = jnp.zeros((shape[0], frames, *shape[2:]), jnp.float32)
        starts = jnp.minimum(jnp.arange(groups) * size, frames - size)
        return jax.lax.scan(step, result, starts)[0]

    return split_frames(run, params, keys, x, jnp.arange(x.shape[1]))


def frame_noise(key: Array, places: Array, shape: tuple[int, ...]) -> Float[Array, 'g h w d']:
    """Standard normal noise of a video's frames at `places` [g], each from a key of its own."""
    return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(places)


def decode_tiles(
    vae: VAE, latents: Float[Array, 'n h w d'], tile: int
) -> Float[Array, 'n h2 w2 c']:
    """Images of unscaled latents, decoded in square tiles one after the other.

    Tiles overlap by a quarter of their side, in which the new one fades in linearly over what is
    above and left of it, as in diffusers' `AutoencoderKL.tiled_decode`. Images differ a little from
    those decoded whole: group norms and attention see a tile at a time. Latents that fit into one
    tile are decoded whole.
    """
    height, width = latents.shape[1:3]
    if max(height, width) <= tile:
        return vae.decode(latents)
    step = tile - tile // 4
    kept, overlap = step * vae.factor, tile // 4 * vae.factor
    tops, lefts = range(0, height, step), range(0, width, step)
    # One program for each shape: whole tiles, and what is left at the right and bottom.
    by_shape = {}
    for place in [(top, left) for top in tops for left in lefts]:
        part = latents[:, place[0] : place[0] + tile, place[1] : place[1] + tile]
        by_shape.setdefault(part.shape, {})[place] = part
    tiles = {}
    for parts in by_shape.values():
        made = jax.lax.map(vae.decode, jnp.stack(list(parts.values())))
        tiles |= dict(zip(parts, made))

    rows = []
    for top in tops:
        row = []
        for left in lefts:
            # In place, as the next tiles fade in over faded ones.
            if top:
                tiles[top, left] = fade(tiles[top - step, left], tiles[top, left], overlap, axis=1)
            if left:
                tiles[top, left] = fade(tiles[top, left - step], tiles[top, left], overlap, axis=2)
            row.append(tiles[top, left][:, :kept, :kept])
        rows.append(jnp.concatenate(row, axis=2))
    return jnp.concatenate(rows, axis=1)


def fade(
    before: Float[Array, 'n h w c'], after: Float[Array, 'n h2 w2 c'], overlap: int, *, axis: int
) -> Float[Array, 'n h2 w2 c']:
    """`after`, fading in over the end of `before` along an axis."""
    overlap = min(overlap, before.shape[axis], after.shape[axis])
    share = jnp.arange(overlap) / overlap
    share = jnp.expand_dims(share, [i for i in range(4) if i != axis])
    end = jax.lax.slice_in_dim(before, before.shape[axis] - overlap, None, axis=axis)
    start, rest = jnp.split(after, [overlap], axis=axis)
    return jnp.concatenate([end + share * (start - end), rest], axis=axis)
