"""Other people's checkpoints as our modules."""

from cmd_jax.interop.start import check_start, dit_start
from cmd_jax.interop.torch_dicts import (
    load_dit,
    load_nvlabs_autoencoder,
    load_nvlabs_content_dit,
    load_nvlabs_motion_dit,
)

__all__ = [
    'check_start',
    'dit_start',
    'load_dit',
    'load_nvlabs_autoencoder',
    'load_nvlabs_content_dit',
    'load_nvlabs_motion_dit',
]
