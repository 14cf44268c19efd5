"""The two draws of CMD, content frame and motion latent, as pure functions and as programs.

Every example has a random key of its own, so that it does not depend on the batch that it is in.
*Frames* are what the autoencoder sees of a video: RGB in [-1, 1] (pixel mode), or the scaled
latents of a Stable Diffusion VAE (latent mode); `vae` is None in pixel mode.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped, UInt8

from cmd_jax import video as videos
from cmd_jax.diffusion import Process, Sampling, guide, sample
from cmd_jax.models.autoencoder import VideoAutoencoder
from cmd_jax.models.content import ContentDiT
from cmd_jax.models.motion import MotionDiT
from cmd_jax.stable_diffusion import VAE, UNet
from cmd_jax.stable_diffusion.frames import decode_frames, encode_frames


def split_keys(keys: Array, parts: int) -> tuple[Array, ...]:
    """`parts` independent keys [b] for each example's key."""
    return tuple(jnp.moveaxis(jax.vmap(lambda k: jax.random.split(k, parts))(keys), 1, 0))


def normal_like(keys: Array, x: Float[Array, 'b *s']) -> Float[Array, 'b *s']:
    """Standard normal noise, from a key an example."""
    return jax.vmap(lambda k: jax.random.normal(k, x.shape[1:]))(keys)


def to_frames(
    vae: VAE | None,
    video: UInt8[Array, 'b t h w 3'],
    *,
    at_once: int,
    keys: Array | None = None,
) -> Float[Array, 'b t h2 w2 c']:
    """What the autoencoder sees of a video.

    Args:
      vae: see above.
      video: real clips.
      at_once: frames that the VAE takes at a time on a device, of all its clips.
      keys: typed PRNG keys [b]: latents are drawn from the posterior rather than its mean.
    """
    pixels = videos.to_float(video)
    return pixels if vae is None else encode_frames(vae, pixels, at_once=at_once, keys=keys)


def to_video(
    vae: VAE | None, frames: Float[Array, 'b t h2 w2 c'], *, at_once: int
) -> UInt8[Array, 'b t h w 3']:
    """The video of such frames."""
    if vae is not None:
        frames = decode_frames(vae, frames, at_once=at_once)
    return videos.to_uint8(frames)


# What the parts of an example's key are for.
CONTENT_NOISE, CONTENT_STEPS, MOTION_NOISE, MOTION_STEPS, AUGMENTATION = range(5)


def first_noise(
    keys: Array, x: Float[Array, 'b *s'], part: int, towards: tuple[Array, Array] | None
) -> Float[Array, 'b *s']:
    """Standard normal noise like x, of a part of each example's key.

    With `towards`, (other keys [b], places [b] in 0..1), the noise on the great circle between that
    of the keys (place 0) and that of the others (1), whose variance is the same: two draws of many
    dimensions stand at right angles.
    """
    noise = normal_like(split_keys(keys, 5)[part], x)
    if towards is None:
        return noise
    others, places = towards
    angle = (jnp.pi / 2 * places).reshape(-1, *[1] * (x.ndim - 1))
    there = normal_like(split_keys(others, 5)[part], x)
    return jnp.cos(angle) * noise + jnp.sin(angle) * there


def noisy_content(
    content: Float[Array, 'b h w c'], noise: Float[Array, 'b h w c'], deviation: float
) -> Float[Array, 'b h w c']:
    """Content frames with Gaussian noise, as the motion network sees them.

    Generated frames are not quite like true ones. A network that has seen noisy frames in training
    reads off them what survives noise, and no more (conditioning augmentation: Ho et al. 2022,
    arXiv 2106.15282, section 4.2).
    """
    return content + deviation * noise if deviation else content


def normalize(motion: Float[Array, 'b t s d'], statistics: dict) -> Float[Array, 'b t s d']:
    """Zero mean and unit deviation per channel, by statistics {'mean': [d], 'std': [d]}."""
    return (motion - statistics['mean']) / statistics['std']


def denormalize(z: Float[Array, 'b t s d'], statistics: dict) -> Float[Array, 'b t s d']:
    """The inverse of `normalize`."""
    return z * statistics['std'] + statistics['mean']


def video_keys(seed: int, first: int | Int[Array, ''], count: int) -> Array:
    """Keys of the videos first .. first + count - 1 of a seed, [count]."""
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(
        first + jnp.arange(count)
    )


def draw_content(
    model: ContentDiT | UNet,
    process: Process,
    keys: Array,
    condition: Shaped[Array, 'b *k'],
    null: Shaped[Array, 'b *k'],
    shape: tuple[int, int, int],
    *,
    sampling: Sampling,
    clip: float | None,
    offset: int,
    final_alpha_one: bool,
    towards: tuple[Array, Array] | None = None,
) -> Float[Array, 'b h w c']:
    """Content frames.

    Args:
      model: (x, t, condition) -> epsilon or v.
      process: that it was trained with.
      keys: typed PRNG keys [b].
      condition: labels [b], or text features [b n k].
      null: what guidance leads away from: no class, or the features of a negative prompt.
      shape: (height, width, channels) of a frame.
      sampling: see `diffusion.Sampling`.
      clip, offset, final_alpha_one: see `diffusion.sample`.
      towards: see `first_noise`.
    """
    noise = first_noise(keys, jnp.empty((len(keys), *shape)), CONTENT_NOISE, towards)
    return _denoised(
        *(model, condition, null, noise, process, sampling),
        clip=clip,
        offset=offset,
        final_alpha_one=final_alpha_one,
        key=split_keys(keys, 5)[CONTENT_STEPS],
    )


def _denoised(network, condition, null, noise, process, sampling: Sampling, **options):
    """What `diffusion.sample` makes of noise, under guidance."""
    denoise = guide(
        *(network, condition, null, sampling.guidance),
        learn_sigma=process.learn_sigma,
        rescale=sampling.guidance_rescale,
        interval=sampling.interval(process),
    )
    kwargs = dict(sampler=sampling.sampler, steps=sampling.steps, spacing=sampling.spacing)
    return sample(denoise, noise, process, **kwargs, **options)


def draw_motion(
    model: MotionDiT,
    process: Process,
    keys: Array,
    content: Float[Array, 'b h w c'],
    condition: Shaped[Array, 'b *k'],
    null: Shaped[Array, 'b *k'],
    statistics: dict,
    *,
    sampling: Sampling,
    content_noise: float,
    towards: tuple[Array, Array] | None = None,
) -> Float[Array, 'b t s d']:
    """Motion latents of the content frames; guidance keeps the frame in both branches.

    Condition and null: labels [b], or pooled text features [b k]; the rest as in `draw_content`.
    """
    augmentation = first_noise(keys, content, AUGMENTATION, towards)
    content = noisy_content(content, augmentation, content_noise)
    shape = (model.rows * model.patch, model.columns * model.patch, model.channels)
    noise = first_noise(keys, jnp.empty((len(keys), *shape)), MOTION_NOISE, towards)
    z = _denoised(
        lambda x, t, given: model(x, t, *given),
        *((content, condition), (content, null), noise, process, sampling),
        key=split_keys(keys, 5)[MOTION_STEPS],
    )
    return denormalize(z, statistics)


def encode(
    autoencoder: VideoAutoencoder,
    vae: VAE | None,
    video: UInt8[Array, 'b t h w 3'],
    at_once: int,
    keys: Array | None = None,
) -> tuple[Float[Array, 'b h2 w2 c'], Float[Array, 'b t2 s d']]:
    """Content frames and motion latents of real clips; `keys` as in `to_frames`."""
    return autoencoder.encode(to_frames(vae, video, at_once=at_once, keys=keys))


def decode(
    autoencoder: VideoAutoencoder,
    vae: VAE | None,
    content: Float[Array, 'b h2 w2 c'],
    motion: Float[Array, 'b t s d'],
    at_once: int,
) -> UInt8[Array, 'b t2 h w 3']:
    """Videos of content frames and motion latents."""
    return to_video(vae, autoencoder.decode(content, motion), at_once=at_once)


# Networks are arguments, not constants, of the compiled programs.
OPTIONS = ('process', 'sampling')
content_program = jax.jit(
    draw_content, static_argnames=(*OPTIONS, 'shape', 'clip', 'offset', 'final_alpha_one')
)
motion_program = jax.jit(draw_motion, static_argnames=(*OPTIONS, 'content_noise'))
encode_program = jax.jit(encode, static_argnames='at_once')
decode_program = jax.jit(decode, static_argnames='at_once')
frames_program = jax.jit(to_frames, static_argnames='at_once')
video_program = jax.jit(to_video, static_argnames='at_once')
