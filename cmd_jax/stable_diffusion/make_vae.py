"""Trains the small VAE of `make` on frames of moving digits."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from flax import nnx
from jaxtyping import Float

from cmd_jax.data.moving_digits import MovingDigits
from cmd_jax.stable_diffusion.vae import VAE

STEPS, BATCH, LEARNING_RATE = 600, 16, 4e-3
# Of the posterior's divergence from a standard normal, summed over an image's latents; against the
# mean squared error of its pixels.
KL_WEIGHT = 5e-7
HELD_OUT = 256  # frames that the PSNR and the latents' deviation are measured on


def frames(source: MovingDigits, start: int, count: int) -> Float[np.ndarray, 'b 32 32 3']:
    """Frames in [-1, 1], each of another clip."""
    clips = [source[i % len(source)]['video'][0] for i in range(start, start + count)]
    return np.stack(clips) / np.float32(127.5) - 1


def train(vae: VAE, steps: int, seed: int) -> tuple[VAE, float]:
    """The trained VAE, and one over the standard deviation of its latents (scaling_factor)."""
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
        """Mean squared error of decoded means; standard deviation of the latents."""
        vae = nnx.merge(graphdef, params)
        mean, log_variance = vae.moments(images)
        error = jnp.mean((vae.decode(mean) - images) ** 2)
        return error, jnp.sqrt(jnp.var(mean) + jnp.mean(jnp.exp(log_variance)))

    slots, key, started = optimizer.init(params), jax.random.key(seed), time.time()
    source = MovingDigits('train', frames=1)
    for i in range(steps):
        images = frames(source, i * BATCH, BATCH)
        params, slots = step(params, slots, images, jax.random.fold_in(key, i))
    error, _ = measure(params, frames(MovingDigits('test', frames=1), 0, HELD_OUT))
    _, deviation = measure(params, frames(source, 0, HELD_OUT))
    logging.info(
        'VAE: %d steps in %.0f s; %.1f dB on held-out frames; latents deviate by %.2f',
        *(steps, time.time() - started, 10 * np.log10(4 / error), deviation),
    )
    return nnx.merge(graphdef, params), float(1 / deviation)
