"""A number with what it would vary by: bootstrap confidence intervals (Efron 1979)."""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from cmd_jax.evaluation.distances import frechet_distance, kernel_distance

RESAMPLES = 200
LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A measured number.

    Attributes:
      value: from all that was measured.
      low, high: ends of the interval of the confidence LEVEL.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f'{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]'


def of_mean(values: Float[np.ndarray, 'n'], seed: int = 0) -> Estimate:
    """The mean of independent values, resampled with replacement."""
    values = np.asarray(values, np.float64)
    rng = np.random.default_rng(seed)
    index = rng.integers(len(values), size=(RESAMPLES, len(values)))
    return _estimate(float(values.mean()), values[index].mean(axis=1))


def frechet(
    real: Float[np.ndarray, 'n d'], fake: Float[np.ndarray, 'm d'], seed: int = 0
) -> Estimate:
    """The Frechet distance; both sets are resampled.

    Features drawn twice make a set look smaller than it is, and the distance of small sets is
    biased upwards: the interval is that of the resampled distances moved to the measured one. It
    tells what other sets of the same sizes would give, and nothing of the bias.
    """
    real, fake = _compact(np.asarray(real, np.float64), np.asarray(fake, np.float64))
    return _resampled(frechet_distance, real, fake, seed)


def kernel(
    real: Float[np.ndarray, 'n d'], fake: Float[np.ndarray, 'm d'], seed: int = 0
) -> Estimate:
    """The kernel distance; both sets are resampled, and the interval is moved as in `frechet`
    (a feature that was drawn twice is nearer to itself than any two are)."""
    return _resampled(kernel_distance, real, fake, seed)


def _resampled(distance: Callable, real: np.ndarray, fake: np.ndarray, seed: int) -> Estimate:
    rng = np.random.default_rng(seed)
    value = distance(real, fake)
    draws = [
        distance(*(x[rng.integers(len(x), size=len(x))] for x in (real, fake)))
        for _ in range(RESAMPLES)
    ]
    return _estimate(value, np.array(draws) - np.mean(draws) + value)


def _estimate(value: float, draws: np.ndarray) -> Estimate:
    tail = (1 - LEVEL) / 2
    # Infinite values (the PSNR of equal clips) have no quantiles between them.
    low, high = np.quantile(draws, [tail, 1 - tail], method='nearest')
    return Estimate(value, float(low), float(high))


def _compact(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both in the fewest dimensions that keep all distances: of the space that they span. With
    fewer features than dimensions that is several times faster."""
    origin = a.mean(axis=0)
    both = np.concatenate([a, b]) - origin
    if len(both) >= both.shape[1]:
        return a, b
    _, _, basis = np.linalg.svd(both, full_matrices=False)
    return (a - origin) @ basis.T, (b - origin) @ basis.T
