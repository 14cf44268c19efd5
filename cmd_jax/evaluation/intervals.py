"""A number with what it would vary by from one sample of videos to another.

It tells nothing of the bias of small sets, which all samples of one size share.
"""

import dataclasses

import numpy as np
from jaxtyping import Float

from cmd_jax.evaluation.distances import frechet_distance, kernel_distances

RESAMPLES = 200
FEWEST = 3  # videos that a distance can have an interval of: one is left out, two are a set
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
    """The mean of independent values, by the bootstrap (Efron 1979)."""
    values = np.asarray(values, np.float64)
    rng = np.random.default_rng(seed)
    index = rng.integers(len(values), size=(RESAMPLES, len(values)))
    return _estimate(float(values.mean()), values[index].mean(axis=1))


def frechet(
    real: Float[np.ndarray, 'n d'], fake: Float[np.ndarray, 'm d'], seed: int = 0
) -> Estimate:
    """The Frechet distance of FEWEST features or more each; a tenth of both sets is left out, again
    and again (`_kept`)."""
    rng = np.random.default_rng(seed)
    kept = [_kept(rng, len(x)) for x in (real, fake)]
    draws = np.array([frechet_distance(real[i], fake[j]) for i, j in zip(*kept)])
    return _spread(frechet_distance(real, fake), draws, min(len(real), len(fake)))


def kernel(
    real: Float[np.ndarray, 'n d'], fake: Float[np.ndarray, 'm d'], seed: int = 0
) -> Estimate:
    """The kernel distance, with the interval of `frechet`."""
    rng = np.random.default_rng(seed)
    # How often each feature is there: first the sets themselves.
    times = [np.ones((1 + RESAMPLES, len(x))) for x in (real, fake)]
    for there in times:
        count = there.shape[1]
        there[1:] = 0
        np.put_along_axis(there[1:], _kept(rng, count), 1, axis=1)
    value, *draws = kernel_distances(real, fake, *times)
    return _spread(float(value), np.array(draws), min(len(real), len(fake)))


def _kept(rng: np.random.Generator, count: int) -> np.ndarray:
    """RESAMPLES times the places of nine tenths of `count` features, without repetition.

    The delete-d jackknife (Shao and Wu 1989). The bootstrap's sets have some features twice, look
    smaller than they are, and spread up to four times as much as independent ones where the two
    distributions are near each other.
    """
    order = rng.permuted(np.tile(np.arange(count), (RESAMPLES, 1)), axis=1)
    return order[:, : count - _left_out(count)]


def _left_out(count: int) -> int:
    return max(1, round(count / 10))


def _spread(value: float, draws: np.ndarray, count: int) -> Estimate:
    """Distances of what is left, moved to the measured one and spread as whole sets are."""
    factor = np.sqrt(count / _left_out(count) - 1)
    return _estimate(value, value + factor * (draws - draws.mean()))


def _estimate(value: float, draws: np.ndarray) -> Estimate:
    tail = (1 - LEVEL) / 2
    # Infinite values (the PSNR of equal clips) have no quantiles between them.
    low, high = np.quantile(draws, [tail, 1 - tail], method='nearest')
    return Estimate(value, float(low), float(high))
