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
    loading       the folder of a run -> Generator
    video         uint8 <-> float, files, grids
    memory        the most that this process has held

Video is [b t h w c], float in [-1, 1] inside and uint8 where it is read or written.
"""

import importlib

__version__ = '0.1.0'

# Imported when they are asked for: processes that only read data need neither JAX nor networks.
_MODULES = {
    'ContentDiT': 'models.content',
    'Generator': 'generate',
    'MotionDiT': 'models.motion',
    'UserError': 'errors',
    'VideoAutoencoder': 'models.autoencoder',
    'load': 'loading',
}
_PACKAGES = ('diffusion', 'evaluation', 'interop', 'stable_diffusion')

__all__ = [*_MODULES, *_PACKAGES]


def __getattr__(name: str):
    if name in _PACKAGES:
        return importlib.import_module(f'cmd_jax.{name}')
    if name in _MODULES:
        return getattr(importlib.import_module(f'cmd_jax.{_MODULES[name]}'), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
