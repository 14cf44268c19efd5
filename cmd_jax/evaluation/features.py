"""What pretrained networks say of videos: features, and the distances made of them.

Videos are uint8, as in `distances`. Programs take batches on the devices, so they can follow a
sampler without a detour by the host; their products are of float32 on every device, because a
distance of features in bfloat16 is another number.
"""

import functools
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from cmd_jax import video as videos_lib
from cmd_jax.errors import UserError
from cmd_jax.evaluation.distances import check_pairs, check_videos, frechet_distance, over_pairs
from cmd_jax.evaluation.networks import clip as clips
from cmd_jax.evaluation.networks import i3d
from cmd_jax.evaluation.networks import lpips as perceptual
from cmd_jax.parallel import batches
from cmd_jax.parallel.mesh import make_mesh, replicated


def resize(videos: UInt8[Array, 'b t h w 3'], size: int) -> Float[Array, 'b t s s 3']:
    """Videos as I3D sees them: in [-1, 1], and scaled to `size` pixels a side.

    Bilinearly about pixel centres and without a filter against aliases, as PyTorch's `interpolate`
    does in most implementations of FVD.
    """
    shape = (*videos.shape[:2], size, size, 3)
    return jax.image.resize(videos_lib.to_float(videos), shape, 'bilinear', antialias=False)


@functools.partial(jax.jit, static_argnames='size')
def i3d_program(
    network: i3d.I3D, videos: UInt8[Array, 'b t h w 3'], *, size: int = i3d.SIZE
) -> Float[Array, 'b d']:
    """Logits of videos that are scaled to `size` pixels a side."""
    with jax.default_matmul_precision('float32'):
        return network(resize(videos, size))


@jax.jit
def lpips_program(
    network: perceptual.LPIPS, a: UInt8[Array, 'b t h w 3'], b: UInt8[Array, 'b t h w 3']
) -> Float[Array, 'b']:
    """LPIPS of pairs of videos: the mean over their frames, frame by frame."""

    def add(total, frames):
        return total + network(*(videos_lib.to_float(x) for x in frames)), None

    with jax.default_matmul_precision('float32'):
        frames = tuple(jnp.swapaxes(x, 0, 1) for x in (a, b))
        total, _ = jax.lax.scan(add, jnp.zeros(len(a)), frames)
    return total / a.shape[1]


@functools.cache
def load_i3d(path: str | pathlib.Path | None, mesh: jax.sharding.Mesh) -> i3d.I3D:
    """I3D on all devices of a mesh, read once in a process."""
    return jax.device_put(i3d.load(path), replicated(mesh))


@functools.cache
def load_lpips(
    net: str, path: str | pathlib.Path | None, mesh: jax.sharding.Mesh
) -> perceptual.LPIPS:
    """LPIPS on all devices of a mesh, read once in a process."""
    return jax.device_put(perceptual.load(net, path), replicated(mesh))


def i3d_logits(
    video: UInt8[np.ndarray, 'n t h w 3'],
    *,
    path: str | pathlib.Path | None = None,
    size: int = i3d.SIZE,
    batch_size: int = 4,
    mesh: jax.sharding.Mesh | None = None,
) -> Float[np.ndarray, 'n d']:
    """The 400 logits of I3D for each video, the features of FVD.

    Args:
      video: any frame size and number of frames.
      path: of the weights, see `networks.i3d.load`.
      size: pixels a side that the network sees; FVD is defined with 224.
      batch_size: videos at a time; changes memory and speed, and no number but by rounding.
      mesh: all devices, if not given.

    Raises:
      ValueError: not uint8 videos.
      UserError: the weights are not there.
    """
    check_videos(video=video)
    mesh = mesh or make_mesh()
    program = functools.partial(i3d_program, load_i3d(path, mesh), size=size)
    return batches.collect(batches.run(program, mesh, batch_size, video))


def fvd(
    real: UInt8[np.ndarray, 'n t h w 3'],
    fake: UInt8[np.ndarray, 'm t h w 3'],
    *,
    path: str | pathlib.Path | None = None,
    batch_size: int = 4,
    mesh: jax.sharding.Mesh | None = None,
) -> float:
    """Frechet video distance (Unterthiner et al. 2018, arXiv 1812.01717): of the Gaussians of I3D's
    logits.

    What makes one comparable with another is the choice of clips and their number: see
    `protocols`.

    Args:
      real, fake: videos of one length and size, at least two each.
      path, batch_size, mesh: see `i3d_logits`.

    Raises:
      ValueError: not uint8 videos, or of different length or size.
    """
    check_videos(real=real, fake=fake)
    if real.shape[1:] != fake.shape[1:]:
        raise ValueError(f'real and fake differ in length or size: {real.shape}, {fake.shape}')
    options = dict(path=path, batch_size=batch_size, mesh=mesh)
    return frechet_distance(i3d_logits(real, **options), i3d_logits(fake, **options))


def lpips(
    a: UInt8[np.ndarray, 'n t h w 3'],
    b: UInt8[np.ndarray, 'n t h w 3'],
    *,
    net: str = 'vgg',
    path: str | pathlib.Path | None = None,
    mean: bool = True,
    batch_size: int = 16,
    mesh: jax.sharding.Mesh | None = None,
) -> float | Float[np.ndarray, 'n']:
    """LPIPS of pairs of videos: the mean over their frames (see `networks.lpips`).

    Args:
      a, b: pairs of equal shape.
      net: 'vgg' or 'alex'.
      path: of the weights, see `networks.lpips.load`.
      mean: over the pairs, or a value for each.
      batch_size, mesh: see `i3d_logits`.

    Raises:
      ValueError: not uint8 videos of one shape.
      UserError: the weights are not there, or the frames are too small.
    """
    check_pairs(a, b)
    mesh = mesh or make_mesh()
    program = functools.partial(lpips_program, load_lpips(net, path, mesh))
    values = batches.collect(batches.run(program, mesh, batch_size, a, b))
    return over_pairs(values.astype(np.float64), mean)


def clipsim(
    videos: UInt8[np.ndarray, 'n t h w 3'],
    prompts: Sequence[str],
    clip: clips.CLIP | str | pathlib.Path = clips.REPOSITORY,
    *,
    mean: bool = True,
) -> float | Float[np.ndarray, 'n']:
    """CLIP similarity (Wu et al. 2021, arXiv 2104.14806): the mean over frames of the cosine
    between CLIP's embeddings of the frame and of the text.

    Args:
      videos: generated videos.
      prompts: one for each.
      clip: the network, or where it is; see `networks.clip.load`.
      mean: over the videos, or a value for each.

    Raises:
      ValueError: not uint8 videos.
      UserError: another number of prompts, or weights that cannot be had.
    """
    check_videos(videos=videos)
    if len(prompts) != len(videos):
        raise UserError(f'{len(prompts)} prompts for {len(videos)} videos: give one for each')
    clip = clip if isinstance(clip, clips.CLIP) else clips.load(clip)
    texts = clip.embed_texts(list(prompts)).astype(np.float64)
    frames = clip.embed_videos(videos).astype(np.float64)
    return over_pairs(np.einsum('ntk,nk->nt', frames, texts).mean(axis=1), mean)
