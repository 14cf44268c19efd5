"""The two draws of CMD, content frame and motion latent, as pure functions and as programs.

Every example has a random key of its own, so that it does not depend on the batch that it is in.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cmd_jax import video as videos
from cmd_jax.diffusion import Process, guide, sample
from cmd_jax.models.content import ContentDiT
from cmd_jax.models.motion import MotionDiT


def split_keys(keys: Array, parts: int) -> tuple[Array, ...]:
    """`parts` independent keys [b] for each example's key."""
    return tuple(jnp.moveaxis(jax.vmap(lambda k: jax.random.split(k, parts))(keys), 1, 0))


def normal_like(keys: Array, x: Float[Array, 'b *s']) -> Float[Array, 'b *s']:
    """Standard normal noise, from a key an example."""
    return jax.vmap(lambda k: jax.random.normal(k, x.shape[1:]))(keys)


def initial_noise(keys: Array, model: ContentDiT | MotionDiT) -> Float[Array, 'b rows columns c']:
    """What sampling begins with, of the size that the model denoises."""
    shape = (model.rows * model.patch, model.columns * model.patch, model.channels)
    return normal_like(keys, jnp.empty((len(keys), *shape)))


def noisy_content(
    keys: Array, content: Float[Array, 'b h w c'], deviation: float
) -> Float[Array, 'b h w c']:
    """Content frames with Gaussian noise, as the motion network sees them.

    Generated frames are not quite like true ones. A network that has seen noisy frames in training
    reads off them what survives noise, and no more (conditioning augmentation: Ho et al. 2022,
    arXiv 2106.15282, section 4.2).
    """
    return content + deviation * normal_like(keys, content) if deviation else content


def normalize(motion: Float[Array, 'b t s d'], statistics: dict) -> Float[Array, 'b t s d']:
    """Zero mean and unit deviation per channel, by statistics {'mean': [d], 'std': [d]}."""
    return (motion - statistics['mean']) / statistics['std']


def denormalize(z: Float[Array, 'b t s d'], statistics: dict) -> Float[Array, 'b t s d']:
    """The inverse of `normalize`."""
    return z * statistics['std'] + statistics['mean']


def video_keys(seed: int, first: int, count: int) -> Array:
    """Keys of the videos first .. first + count - 1 of a seed, [count]."""
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(
        jnp.arange(first, first + count)
    )


def draw_content(
    model: ContentDiT,
    process: Process,
    keys: Array,
    labels: Int[Array, 'b'],
    *,
    sampler: str,
    steps: int,
    guidance: float,
) -> Float[Array, 'b h w c']:
    """Content frames in [-1, 1]; `keys` [b], one an example."""
    noise_keys, keys, _, _, _ = split_keys(keys, 5)
    denoise = guide(
        lambda x, t, label: model(x, t, label),
        labels,
        model.null_condition(labels),
        guidance,
        learn_sigma=process.learn_sigma,
    )
    noise = initial_noise(noise_keys, model)
    return sample(denoise, noise, process, sampler=sampler, steps=steps, clip=1.0, key=keys)


def draw_motion(
    model: MotionDiT,
    process: Process,
    keys: Array,
    content: Float[Array, 'b h w c'],
    condition: Int[Array, 'b'] | Float[Array, 'b k'],
    statistics: dict,
    *,
    sampler: str,
    steps: int,
    guidance: float,
    content_noise: float,
) -> Float[Array, 'b t s d']:
    """Motion latents of the content frames; guidance keeps the frame in both branches."""
    _, _, noise_keys, keys, content_keys = split_keys(keys, 5)
    content = noisy_content(content_keys, content, content_noise)
    denoise = guide(
        lambda x, t, given: model(x, t, *given),
        (content, condition),
        (content, model.null_condition(condition)),
        guidance,
        learn_sigma=process.learn_sigma,
    )
    noise = initial_noise(noise_keys, model)
    z = sample(denoise, noise, process, sampler=sampler, steps=steps, key=keys)
    return denormalize(z, statistics)


# Networks are arguments, not constants, of the compiled programs.
OPTIONS = ('process', 'sampler', 'steps', 'guidance')
content_program = jax.jit(draw_content, static_argnames=OPTIONS)
motion_program = jax.jit(draw_motion, static_argnames=(*OPTIONS, 'content_noise'))
encode_program = jax.jit(lambda autoencoder, video: autoencoder.encode(videos.to_float(video)))
decode_program = jax.jit(lambda autoencoder, *z: videos.to_uint8(autoencoder.decode(*z)))
