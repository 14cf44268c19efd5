"""A number with what it would vary by: bootstrap confidence intervals (Efron 1979)."""

import dataclasses

import numpy as np
from jaxtyping import Float

from cmd_jax.evaluation.distances import frechet_distance, kernel_distances

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
    rng = np.random.default_rng(seed)

    def drawn(x):
        return x[rng.integers(len(x), size=len(x))]

    draws = np.array([frechet_distance(drawn(real), drawn(fake)) for _ in range(RESAMPLES)])
    return _moved(frechet_distance(real, fake), draws)


def kernel(
    real: Float[np.ndarray, 'n d'], fake: Float[np.ndarray, 'm d'], seed: int = 0
) -> Estimate:
    """The kernel distance; both sets are resampled, and the interval is moved as in `frechet`
    (a feature that was drawn twice is nearer to itself than any two are)."""
    rng = np.random.default_rng(seed)
    # How often each feature is drawn: first the set itself, each once.
    times = [
        np.concatenate([np.ones((1, n)), rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES)])
        for n in (len(real), len(fake))
    ]
    value, *draws = kernel_distances(real, fake, *times)
    return _moved(float(value), np.array(draws))


def _moved(value: float, draws: np.ndarray) -> Estimate:
    return _estimate(value, draws - draws.mean() + value)


def _estimate(value: float, draws: np.ndarray) -> Estimate:
    tail = (1 - LEVEL) / 2
    # Infinite values (the PSNR of equal clips) have no quantiles between them.
    low, high = np.quantile(draws, [tail, 1 - tail], method='nearest')
    return Estimate(value, float(low), float(high))
