"""Trains the small VAE of `make` on frames of moving digits."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from flax import nnx
from jaxtyping import Array, Float

from cmd_jax.data.moving_digits import MovingDigits
from cmd_jax.stable_diffusion.vae import VAE

STEPS, BATCH, LEARNING_RATE = 600, 16, 4e-3
# Of the posterior's divergence from a standard normal, summed over an image's latents; against the
# mean squared error of its pixels.
KL_WEIGHT = 5e-7
MEASURED = 256  # frames


def frames(source: MovingDigits, start: int, count: int) -> Float[np.ndarray, 'b 32 32 3']:
    """Frames in [-1, 1], each of another clip."""
    clips = [source[i % len(source)]['video'][0] for i in range(start, start + count)]
    return np.stack(clips) / np.float32(127.5) - 1


def train(vae: VAE, steps: int, seed: int) -> VAE:
    """The trained VAE.

    Each channel of its latents, times its scaling factor, has mean 0 and deviation 1 on training
    frames, as diffusion likes it.
    """
    graphdef, params = nnx.split(vae, nnx.Param)
    params = nnx.to_pure_dict(params)
    rate = optax.warmup_cosine_decay_schedule(0, LEARNING_RATE, min(30, steps // 2), steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))

    def loss(params, images, key):
        vae = nnx.merge(graphdef, params)
        mean, log_variance = vae.moments(images)
        noise = jax.random.normal(key, mean.shape)
        decoded = vae.decode(mean + jnp.exp(log_variance / 2) * noise)
        kl = 0.5 * (mean**2 + jnp.exp(log_variance) - 1 - log_variance)
        return jnp.mean((decoded - images) ** 2) + KL_WEIGHT * jnp.sum(kl) / len(images)

    @jax.jit
    def step(params, slots, images, key):
        grads = jax.grad(loss)(params, images, key)
        updates, slots = optimizer.update(grads, slots)
        return optax.apply_updates(params, updates), slots

    @jax.jit
    def measure(params, images):
        """Mean squared error of decoded means; mean and deviation of the latents by channel."""
        vae = nnx.merge(graphdef, params)
        mean, log_variance = vae.moments(images)
        error, axes = jnp.mean((vae.decode(mean) - images) ** 2), (0, 1, 2)
        variance = jnp.var(mean, axes) + jnp.mean(jnp.exp(log_variance), axes)
        return error, jnp.mean(mean, axes), jnp.sqrt(variance)

    slots, key, started = optimizer.init(params), jax.random.key(seed), time.time()
    source = MovingDigits('train', frames=1)
    for i in range(steps):
        images = frames(source, i * BATCH, BATCH)
        params, slots = step(params, slots, images, jax.random.fold_in(key, i))
    _, mean, deviation = measure(params, frames(source, 0, MEASURED))
    normalise(params, mean, deviation * vae.scaling_factor)
    error, _, _ = measure(params, frames(MovingDigits('test', frames=1), 0, MEASURED))
    psnr = 10 * np.log10(4 / error)
    logging.info('VAE: %.1f dB on held-out frames after %.0f s', psnr, time.time() - started)
    return nnx.merge(graphdef, params)


def normalise(params: dict, mean: Float[Array, 'd'], scale: Float[Array, 'd']):
    """Makes (latents - mean) / scale the latents; what is decoded stays the same.

    The map goes into the 1x1 convolutions on both sides of the latents, in place.
    """
    quant, post = params['quant_conv'], params['post_quant_conv']
    factor = jnp.concatenate([1 / scale, jnp.ones_like(scale)])
    shift = jnp.concatenate([-mean / scale, -2 * jnp.log(scale)])
    quant['kernel'], quant['bias'] = quant['kernel'] * factor, quant['bias'] * factor + shift
    post['bias'] = post['bias'] + mean @ post['kernel'][0, 0]
    post['kernel'] = post['kernel'] * scale[:, None]
