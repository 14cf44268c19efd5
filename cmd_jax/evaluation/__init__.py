"""Measures of how good videos are, and the pretrained networks they look through."""

import importlib

# Imported when they are asked for: the networks take seconds.
_MODULES = {
    'clipsim': 'features',
    'frechet_distance': 'distances',
    'fvd': 'features',
    'i3d_logits': 'features',
    'kernel_distance': 'distances',
    'lpips': 'features',
    'psnr': 'distances',
    'ssim': 'distances',
}
__all__ = list(_MODULES)


def __getattr__(name: str):
    if name in _MODULES:
        return getattr(importlib.import_module(f'cmd_jax.evaluation.{_MODULES[name]}'), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
