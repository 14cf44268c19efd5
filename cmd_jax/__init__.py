"""cmd_jax: content-motion latent diffusion (CMD, ICLR 2024) in JAX.

A video is one image-like content frame and a small motion latent. Three parts are trained, the
last two independently of each other, and sampled one after the other:

    models/       the networks: VideoAutoencoder, ContentDiT, MotionDiT
    diffusion/    the mathematics of diffusion: processes, samplers, guidance
    stable_diffusion/  the pretrained image model: U-Net, VAE, text encoder
    interop/      other people's weights as our networks
    data/         videos -> batches of clips
    training/     one loop for the three stages, their losses, configs and checkpoints
    parallel/     how arrays lie on devices
    evaluation/   networks and numbers that judge videos, the report
    sampling      the two draws: content frame, motion latent
    conditions    classes and prompts, checked, and as the networks take them
    generate      Generator: the three trained parts -> new videos
    video         uint8 <-> float, files, grids
    memory        the most that this process has held

Video is [b t h w c], float in [-1, 1] inside and uint8 where it is read or written.
"""

from cmd_jax import diffusion, interop, stable_diffusion
from cmd_jax.errors import UserError
from cmd_jax.generate import Generator, load
from cmd_jax.models.autoencoder import VideoAutoencoder
from cmd_jax.models.content import ContentDiT
from cmd_jax.models.motion import MotionDiT

__version__ = '0.1.0'

__all__ = [
    'ContentDiT',
    'Generator',
    'MotionDiT',
    'UserError',
    'VideoAutoencoder',
    'diffusion',
    'interop',
    'load',
    'stable_diffusion',
]
