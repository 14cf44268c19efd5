"""The three stages' losses: `loss(model, frozen, batch, keys)` -> (scalar, metrics).

`batch` holds uint8 video [b t h w 3] and labels [b], or text features [b k] for a network that is
conditioned on text; `keys` a typed PRNG key for each example;
`frozen` the networks and arrays that the loss reads and does not train.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from cmd_jax.diffusion import Process
from cmd_jax.sampling import noisy_content, normal_like, normalize, split_keys
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


def drop_condition(
    keys: Array, condition: Shaped[Array, 'b *s'], null: Shaped[Array, 'b *s'], probability: float
) -> Shaped[Array, 'b *s']:
    """Each example's condition replaced by its null condition with the probability given."""
    drop = jax.vmap(lambda k: jax.random.bernoulli(k, probability))(keys)
    return jnp.where(drop.reshape(-1, *(1,) * (condition.ndim - 1)), null, condition)


def diffusion_loss(
    network: Callable,
    process: Process,
    config: DiffusionLoss,
    keys: Array,
    x_0: Float[Array, 'b *s'],
    condition: Shaped[Array, 'b *k'],
    null: Shaped[Array, 'b *k'],
    *,
    discretized: bool,
):
    """The loss of either diffusion stage; `network(x_t, t, condition)`, t uniform."""
    t_keys, noise_keys, drop_keys = split_keys(keys, 3)
    t = jax.vmap(lambda k: jax.random.randint(k, (), 0, process.steps))(t_keys)
    noise = normal_like(noise_keys, x_0)
    condition = drop_condition(drop_keys, condition, null, config.label_drop)
    output = network(process.add_noise(x_0, noise, t), t.astype(jnp.float32), condition)
    losses = process.loss(
        output, x_0, noise, t, min_snr=config.min_snr or None, discretized=discretized
    )
    metrics = {name: value.mean() for name, value in losses.items()}
    total = sum(metrics.values())
    return total, {'loss': total} | metrics


def content_loss(process: Process, config: DiffusionLoss) -> Callable:
    """Diffusion of content frames, which are images in [-1, 1]."""

    def loss(model, frozen, batch, keys):
        content = frozen['autoencoder'].encode(to_float(batch['video']))[0]
        label = batch['label']
        null = model.null_condition(label)
        return diffusion_loss(model, process, config, keys, content, label, null, discretized=True)

    return loss


def motion_loss(process: Process, config: DiffusionLoss, content_noise: float) -> Callable:
    """Diffusion of normalised motion latents, given the content frame."""

    def loss(model, frozen, batch, keys):
        content, motion = frozen['autoencoder'].encode(to_float(batch['video']))
        keys, content_keys = split_keys(keys, 2)
        content = noisy_content(content_keys, content, content_noise)
        z = normalize(motion, frozen['statistics'])

        def network(z_t, t, condition):
            return model(z_t, t, content, condition)

        condition = batch['text' if model.text_dim else 'label']
        null = model.null_condition(condition)
        return diffusion_loss(network, process, config, keys, z, condition, null, discretized=False)

    return loss
