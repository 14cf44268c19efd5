"""From a config to networks and processes."""

import jax
import jax.numpy as jnp
from flax import nnx

from cmd_jax.diffusion import Process
from cmd_jax.models.autoencoder import VideoAutoencoder
from cmd_jax.models.content import ContentDiT
from cmd_jax.models.motion import MotionDiT
from cmd_jax.training import config as configs


def compute_dtype(precision: str):
    """What linear layers compute in: 'auto' is bfloat16 on accelerators, float32 on CPU."""
    if precision == 'auto':
        precision = 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'
    return jnp.dtype(precision)


def make_autoencoder(config: configs.Config, rngs: nnx.Rngs) -> VideoAutoencoder:
    section, data = config.autoencoder, config.data
    model = vars(section.model) | {'head_dim': section.model.head_dim or None}
    return VideoAutoencoder(
        frames=data.frames,
        height=data.height,
        width=data.width,
        channels=3,
        **model,
        dtype=compute_dtype(section.train.precision),
        rngs=rngs,
    )


def make_content(config: configs.Config, num_classes: int, rngs: nnx.Rngs) -> ContentDiT:
    section, data = config.content, config.data
    return ContentDiT(
        height=data.height,
        width=data.width,
        channels=3,
        num_classes=num_classes,
        learn_sigma=section.process.learn_sigma,
        **vars(section.model),
        dtype=compute_dtype(section.train.precision),
        rngs=rngs,
    )


def make_motion(config: configs.Config, num_classes: int, rngs: nnx.Rngs) -> MotionDiT:
    section, data, patch = config.motion, config.data, config.autoencoder.model.patch
    return MotionDiT(
        frames=data.frames,
        tokens=data.width // patch + data.height // patch,
        channels=config.autoencoder.model.motion_channels,
        content_size=(data.height, data.width, 3),
        num_classes=num_classes,
        learn_sigma=section.process.learn_sigma,
        **vars(section.model),
        dtype=compute_dtype(section.train.precision),
        rngs=rngs,
    )


def make_network(
    stage: str, config: configs.Config, num_classes: int, rngs: nnx.Rngs
) -> VideoAutoencoder | ContentDiT | MotionDiT:
    """The network of the stage of that name."""
    if stage == 'autoencoder':
        return make_autoencoder(config, rngs)
    return {'content': make_content, 'motion': make_motion}[stage](config, num_classes, rngs)


def make_process(section: configs.DiffusionProcess) -> Process:
    return Process(**vars(section))
