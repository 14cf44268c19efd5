"""The three stages' losses: `loss(model, frozen, batch, keys)` -> (scalar, metrics).

`batch` holds uint8 video [b t h w 3] and labels [b]; `keys` a typed PRNG key for each example;
`frozen` the networks and arrays that the loss reads and does not train.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cmd_jax.diffusion import Process
from cmd_jax.training.config import AutoencoderLoss, DiffusionLoss
from cmd_jax.video import to_float


def autoencoder_loss(config: AutoencoderLoss) -> Callable:
    """Reconstruction: weighted l1, l2 and LPIPS on one random frame of each clip."""

    def loss(model, frozen, batch, keys):
        video = to_float(batch['video'])
        out = model(video).astype(jnp.float32)
        metrics = {'l1': jnp.abs(out - video).mean(), 'l2': ((out - video) ** 2).mean()}
        total = config.l1_weight * metrics['l1'] + config.l2_weight * metrics['l2']
        if config.lpips_weight:
            frame = jax.vmap(lambda k: jax.random.randint(k, (), 0, video.shape[1]))(keys)
            pick = jax.vmap(lambda clip, i: clip[i])
            metrics['lpips'] = frozen['lpips'](pick(out, frame), pick(video, frame)).mean()
            total = total + config.lpips_weight * metrics['lpips']
        # The range of the video is 2: peak^2 = 4.
        metrics['psnr'] = 10 * jnp.log10(4 / metrics['l2'])
        return total, {'loss': total} | metrics

    return loss


def draw(process: Process, keys: Array, x_0: Float[Array, 'b *s']):
    """Timesteps [b], uniform over the process, and noise like x_0, from a key an example."""

    def one(key):
        t_key, noise_key = jax.random.split(key)
        t = jax.random.randint(t_key, (), 0, process.steps)
        return t, jax.random.normal(noise_key, x_0.shape[1:])

    return jax.vmap(one)(keys)


def drop_labels(
    keys: Array, labels: Int[Array, 'b'], null: int, probability: float
) -> Int[Array, 'b']:
    """Each label replaced by the null class with the probability given."""
    drop = jax.vmap(lambda k: jax.random.bernoulli(jax.random.fold_in(k, 1), probability))(keys)
    return jnp.where(drop, null, labels)


def diffusion_loss(
    network: Callable, process: Process, config: DiffusionLoss, keys, x_0, labels, null, images
):
    """The loss of either diffusion stage; `network(x_t, t, labels)`."""
    t, noise = draw(process, keys, x_0)
    labels = drop_labels(keys, labels, null, config.label_drop)
    output = network(process.add_noise(x_0, noise, t), t.astype(jnp.float32), labels)
    losses = process.loss(output, x_0, noise, t, min_snr=config.min_snr, discretized=images)
    metrics = {name: value.mean() for name, value in losses.items()}
    total = sum(metrics.values())
    return total, {'loss': total} | metrics


def content_loss(process: Process, config: DiffusionLoss) -> Callable:
    """Diffusion of content frames, which are images in [-1, 1]."""

    def loss(model, frozen, batch, keys):
        content = frozen['autoencoder'].encode(to_float(batch['video']))[0]
        return diffusion_loss(
            model, process, config, keys, content, batch['label'], model.num_classes, True
        )

    return loss


def motion_loss(process: Process, config: DiffusionLoss) -> Callable:
    """Diffusion of normalised motion latents, given the content frame."""

    def loss(model, frozen, batch, keys):
        content, motion = frozen['autoencoder'].encode(to_float(batch['video']))
        z = normalize(motion, frozen['statistics'])

        def network(z_t, t, labels):
            return model(z_t, t, content, labels)

        return diffusion_loss(
            network, process, config, keys, z, batch['label'], model.num_classes, False
        )

    return loss


def normalize(motion: Float[Array, 'b t s d'], statistics: dict) -> Float[Array, 'b t s d']:
    """Zero mean and unit deviation per channel, by statistics {'mean': [d], 'std': [d]}."""
    return (motion - statistics['mean']) / statistics['std']


def denormalize(z: Float[Array, 'b t s d'], statistics: dict) -> Float[Array, 'b t s d']:
    """The inverse of `normalize`."""
    return z * statistics['std'] + statistics['mean']
