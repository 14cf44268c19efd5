"""The three stages' losses: `loss(model, frozen, batch, keys)` -> (scalar, metrics).

`batch` holds uint8 video [b t h w 3], or content frames and motion latents, and what the networks
are conditioned on: labels [b], or captions in the form that frozen['text'] takes (`texts`); `keys`
a typed PRNG key for each example; `frozen` the networks and arrays that the loss reads and does not
train: 'vae' (in latent mode), 'autoencoder', 'text', 'statistics', 'lpips', those that the stage
needs.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from cmd_jax.diffusion import Process
from cmd_jax.models.content import ContentDiT
from cmd_jax.models.motion import MotionDiT
from cmd_jax.sampling import noisy_content, normal_like, normalize, split_keys, to_frames
from cmd_jax.stable_diffusion import UNet
from cmd_jax.training.config import AutoencoderLoss, DiffusionLoss

# What of a batch the losses read besides the condition: its places, and clips or what a cache has
# of them.
READ = ('place', 'video', 'content', 'motion')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frames:
    """How clips become what the autoencoder sees, (frozen, batch, keys) -> frames.

    Attributes:
      sampled: latents are drawn from the VAE's posterior; else they are its mean.
      at_once: frames that the VAE takes at a time on a device, of all its clips.
    """

    sampled: bool = False
    at_once: int = 8

    def __call__(self, frozen: dict, batch: dict, keys: Array) -> Float[Array, 'b t h w c']:
        # Not the keys themselves: the losses split those.
        keys = jax.vmap(lambda k: jax.random.fold_in(k, 0))(keys) if self.sampled else None
        return to_frames(frozen.get('vae'), batch['video'], at_once=self.at_once, keys=keys)


PIXELS = Frames()


def autoencoder_loss(config: AutoencoderLoss, frames: Frames = PIXELS) -> Callable:
    """Reconstruction: weighted l1, l2 and, of pixels, LPIPS on one random frame of each clip."""

    def loss(model, frozen, batch, keys):
        video = frames(frozen, batch, keys)
        out = model(video).astype(jnp.float32)
        metrics = {'l1': jnp.abs(out - video).mean(), 'l2': ((out - video) ** 2).mean()}
        total = config.l1_weight * metrics['l1'] + config.l2_weight * metrics['l2']
        if config.lpips_weight:
            frame = jax.vmap(lambda k: jax.random.randint(k, (), 0, video.shape[1]))(keys)
            pick = jax.vmap(lambda clip, i: clip[i])
            metrics['lpips'] = frozen['lpips'](pick(out, frame), pick(video, frame)).mean()
            total = total + config.lpips_weight * metrics['lpips']
        if 'vae' not in frozen:
            # The range of pixels is 2: peak^2 = 4.
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


def given(frozen: dict, batch: dict, keys: Array, frames: Frames) -> tuple[Array, Array, Array]:
    """Content frames, motion latents and conditions of a batch: all that is not trained. A batch
    from a latent cache has them already."""
    if 'content' in batch:
        return batch['content'], batch['motion'], condition_of(frozen, batch)
    content, motion = frozen['autoencoder'].encode(frames(frozen, batch, keys))
    return content, motion, condition_of(frozen, batch)


def condition_of(frozen: dict, batch: dict) -> Shaped[Array, 'b *k']:
    """Labels, or text features."""
    return frozen['text'](batch['text']) if 'text' in frozen else batch['label']


def null_condition(
    model: ContentDiT | MotionDiT | UNet, frozen: dict, condition: Shaped[Array, 'b *s']
) -> Shaped[Array, 'b *s']:
    """No condition: what the network says it is, and the empty prompt for the U-Net."""
    if isinstance(model, UNet):
        return jnp.broadcast_to(frozen['text'].null, condition.shape)
    return model.null_condition(condition)


def content_loss(process: Process, config: DiffusionLoss, frames: Frames = PIXELS) -> Callable:
    """Diffusion of content frames."""

    def loss(model, frozen, batch, keys):
        content, _, condition = given(frozen, batch, keys, frames)
        null = null_condition(model, frozen, condition)
        pixels = 'vae' not in frozen
        return diffusion_loss(
            model, process, config, keys, content, condition, null, discretized=pixels
        )

    return loss


def motion_loss(
    process: Process, config: DiffusionLoss, frames: Frames = PIXELS, content_noise: float = 0.0
) -> Callable:
    """Diffusion of normalised motion latents, given the content frame."""

    def loss(model, frozen, batch, keys):
        content, motion, condition = given(frozen, batch, keys, frames)
        keys, content_keys = split_keys(keys, 2)
        content = noisy_content(content, normal_like(content_keys, content), content_noise)
        z = normalize(motion, frozen['statistics'])

        def network(z_t, t, condition):
            return model(z_t, t, content, condition)

        null = null_condition(model, frozen, condition)
        return diffusion_loss(network, process, config, keys, z, condition, null, discretized=False)

    return loss
