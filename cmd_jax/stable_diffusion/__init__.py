"""Stable Diffusion 1.x and 2.x: U-Net, VAE and text encoder, from and to diffusers' folders."""

from cmd_jax.stable_diffusion.folder import (
    StableDiffusion,
    arguments,
    fingerprint,
    load,
    process,
    save,
)
from cmd_jax.stable_diffusion.text import TextEncoder
from cmd_jax.stable_diffusion.unet import UNet
from cmd_jax.stable_diffusion.vae import VAE

__all__ = [
    'VAE',
    'StableDiffusion',
    'TextEncoder',
    'UNet',
    'arguments',
    'fingerprint',
    'load',
    'process',
    'save',
]
