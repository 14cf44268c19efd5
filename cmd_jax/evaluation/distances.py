"""Distances between videos, for evaluation: uint8 in, NumPy out."""

import numpy as np
from jaxtyping import UInt8


def psnr(a: UInt8[np.ndarray, 'n t h w c'], b: UInt8[np.ndarray, 'n t h w c']) -> float:
    """Peak signal-to-noise ratio in dB, of each clip, averaged over the clips.

    10 log10(255^2 / MSE) with the mean squared error over one whole clip. A pair of identical clips
    has infinite PSNR, and so has then the average: it means equal, not a failure.

    Raises:
      ValueError: shapes differ, nothing was given, or the videos are not uint8.
    """
    if a.shape != b.shape or not len(a):
        raise ValueError(f'psnr compares equal shapes of at least one clip: {a.shape}, {b.shape}')
    if a.dtype != np.uint8 or b.dtype != np.uint8:
        raise ValueError(f'psnr is over uint8 with peak 255, got {a.dtype} and {b.dtype}')
    squared = np.square(a.astype(np.float64) - b.astype(np.float64))
    with np.errstate(divide='ignore'):
        return float(np.mean(10 * np.log10(255**2 / squared.reshape(len(a), -1).mean(axis=1))))
