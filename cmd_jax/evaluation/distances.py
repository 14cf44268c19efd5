"""Distances between videos and between sets of features: uint8 in, float64 NumPy out.

Videos are uint8 [n t h w c] and nothing else: floats in another range would give a number, and a
wrong one. Functions of pairs give a value for each pair, whose mean is the usual figure.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Float, UInt8

from cmd_jax.evaluation.moments import Moments, finite

_PEAK = 255.0
# Of SSIM: the window's side and deviation in pixels, and what keeps its fractions from 0 / 0.
SSIM_WINDOW, _SIGMA = 11, 1.5
_K1, _K2 = 0.01, 0.03


def check_videos(**videos: np.ndarray):
    """Raises ValueError unless all are non-empty uint8 [n t h w c], by name."""
    for name, x in videos.items():
        if getattr(x, 'dtype', None) != np.uint8 or x.ndim != 5 or not x.size:
            found = f'{getattr(x, "dtype", type(x).__name__)} {list(np.shape(x))}'
            raise ValueError(f'{name} must be uint8 videos [n t h w c], got {found}')


def check_pairs(a: np.ndarray, b: np.ndarray):
    """Raises ValueError unless both are videos of one shape."""
    check_videos(a=a, b=b)
    if a.shape != b.shape:
        raise ValueError(f'videos are compared in pairs of equal shape, got {a.shape}, {b.shape}')


def over_pairs(values: Float[np.ndarray, 'n'], mean: bool) -> float | Float[np.ndarray, 'n']:
    """Their mean, or the values."""
    return float(np.mean(values)) if mean else values


def psnr(
    a: UInt8[np.ndarray, 'n t h w c'], b: UInt8[np.ndarray, 'n t h w c'], *, mean: bool = True
) -> float | Float[np.ndarray, 'n']:
    """Peak signal-to-noise ratio of pairs of clips, in dB.

    10 log10(255^2 / MSE) with the mean squared error over one whole clip. A pair of identical clips
    has infinite PSNR, and so has then the mean: it means equal, not a failure.

    Raises:
      ValueError: not uint8 videos, or of different shapes.
    """
    check_pairs(a, b)
    squared = [np.square(x.astype(np.float64) - y.astype(np.float64)).mean() for x, y in zip(a, b)]
    with np.errstate(divide='ignore'):
        return over_pairs(10 * np.log10(_PEAK**2 / np.array(squared)), mean)


def ssim(
    a: UInt8[np.ndarray, 'n t h w c'], b: UInt8[np.ndarray, 'n t h w c'], *, mean: bool = True
) -> float | Float[np.ndarray, 'n']:
    """Structural similarity of pairs of clips: the mean over frames, channels and pixels.

    Wang, Bovik, Sheikh and Simoncelli, "Image Quality Assessment: From Error Visibility to
    Structural Similarity", 2004, with its Gaussian window of 11 x 11 pixels and deviation 1.5, and
    population covariances; windows that reach over the border are left out. scikit-image's
    `structural_similarity` of the authors' settings.

    Raises:
      ValueError: not uint8 videos, of different shapes, or of frames below 11 x 11.
    """
    check_pairs(a, b)
    if min(a.shape[2:4]) < SSIM_WINDOW:
        raise ValueError(
            f'ssim needs frames of {SSIM_WINDOW} x {SSIM_WINDOW} and more, got {a.shape[2:4]}'
        )
    return over_pairs(np.array([_ssim(x, y) for x, y in zip(a, b)], np.float64), mean)


@jax.jit
def _ssim(a: UInt8[Array, 't h w c'], b: UInt8[Array, 't h w c']) -> Float[Array, '']:
    # Variances are small differences of large squares: they are taken about the middle grey.
    a, b = (x.astype(jnp.float32) - _PEAK / 2 for x in (a, b))
    mean_a, mean_b = _blur(a), _blur(b)
    var_a, var_b = _blur(a * a) - mean_a**2, _blur(b * b) - mean_b**2
    cov = _blur(a * b) - mean_a * mean_b
    mean_a, mean_b = mean_a + _PEAK / 2, mean_b + _PEAK / 2
    c1, c2 = (_K1 * _PEAK) ** 2, (_K2 * _PEAK) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * cov + c2) / (var_a + var_b + c2)
    return jnp.mean(luminance * structure)


def _blur(x: Array) -> Array:
    """The Gaussian window, separably; what reaches over the border is cut off."""
    offsets = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    window = np.exp(-(offsets**2) / (2 * _SIGMA**2))
    window = window / window.sum()
    for axis in (1, 2):
        size = x.shape[axis] - SSIM_WINDOW + 1
        x = sum(w * jax.lax.slice_in_dim(x, i, i + size, axis=axis) for i, w in enumerate(window))
    return x


def frechet_distance(
    a: Moments | Float[np.ndarray, 'n d'], b: Moments | Float[np.ndarray, 'm d']
) -> float:
    """Of the Gaussians with the moments of two sets of features, in float64:

        |mu_a - mu_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^(1/2))

    (Dowson and Landau 1982; Heusel et al. 2017, arXiv 1706.08500, equation 6). With factors
    C = F^T F the last trace is the sum of the singular values of F_a F_b^T: no root of a matrix
    that is not symmetric, and nothing to add to the diagonal where there are few features. Says so
    in the log where there are fewer features than dimensions: the distance of such sets is biased
    upwards, by more the fewer there are.
    """
    moments = [_moments(x) for x in (a, b)]
    (count_a, mean_a, factor_a), (count_b, mean_b, factor_b) = moments
    if mean_a.shape != mean_b.shape:
        raise ValueError(f'features of different sizes: {mean_a.shape[0]}, {mean_b.shape[0]}')
    fewest = min(count_a, count_b)
    if fewest <= len(mean_a):
        warn_of_few(fewest, len(mean_a))
    common = np.linalg.svd(factor_a @ factor_b.T, compute_uv=False).sum()
    traces = np.square(factor_a).sum() + np.square(factor_b).sum()
    return float(np.sum((mean_a - mean_b) ** 2) + traces - 2 * common)


@functools.cache
def warn_of_few(features: int, dimensions: int):
    """Says once in a process what a distance of so few features is worth."""
    logging.warning(
        'Frechet distance of %d features of %d dimensions: so few make it far too large; it can be '
        'compared with that of sets of the same size alone',
        *(features, dimensions),
    )


def _moments(x: Moments | np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
    """Count, mean, and a factor F of the covariance, C = F^T F."""
    if isinstance(x, Moments):
        values, vectors = np.linalg.eigh(x.covariance)
        # Rounding gives some variance to directions without, and its roots would add up.
        kept = values > len(values) * np.finfo(np.float64).eps * values[-1]
        return x.count, x.mean, np.sqrt(values[kept])[:, None] * vectors[:, kept].T
    x = finite(x)
    mean = x.mean(axis=0)
    factor = (x - mean) / np.sqrt(len(x) - 1)
    # Its triangle serves as well, and is smaller where there are more features than dimensions.
    factor = factor if len(x) <= x.shape[1] else np.linalg.qr(factor, mode='r')
    return len(x), mean, factor


def kernel_distance(a: Float[np.ndarray, 'n d'], b: Float[np.ndarray, 'm d']) -> float:
    """Squared maximum mean discrepancy of two sets of features under (x.y / d + 1)^3.

    The unbiased estimate (Binkowski et al. 2018, arXiv 1801.01401; Gretton et al. 2012, lemma 6):
    its expectation does not depend on the number of features, and is 0 for equal distributions;
    single values may be negative.
    """
    once = np.ones((1, len(a))), np.ones((1, len(b)))
    return float(kernel_distances(a, b, *once)[0])


def kernel_distances(
    a: Float[np.ndarray, 'n d'],
    b: Float[np.ndarray, 'm d'],
    times_a: Float[np.ndarray, 'k n'],
    times_b: Float[np.ndarray, 'k m'],
) -> Float[np.ndarray, 'k']:
    """Kernel distances of k pairs of sets, in which each feature is so many times."""
    a, b = finite(a), finite(b)

    def within(x, times):
        count = times.sum(axis=1)
        itself = times @ (np.square(x).sum(axis=1) / x.shape[1] + 1) ** 3
        return (_kernel_sums(x, x, times, times) - itself) / (count * (count - 1))

    between = _kernel_sums(a, b, times_a, times_b) / times_a.sum(axis=1) / times_b.sum(axis=1)
    return within(a, times_a) + within(b, times_b) - 2 * between


def _kernel_sums(x, y, times_x, times_y, rows: int = 1024) -> np.ndarray:
    """Sums of the kernel over all pairs, each pair as often as it is there; some rows of the
    kernel's matrix at a time."""
    total = np.zeros(len(times_x))
    for first in range(0, len(x), rows):
        part = slice(first, first + rows)
        kernel = (x[part] @ y.T / x.shape[1] + 1) ** 3
        total += np.einsum('kn,kn->k', times_x[:, part] @ kernel, times_y)
    return total
