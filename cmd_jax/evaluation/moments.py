"""Mean and covariance of features in float64, gathered in any number of pieces.

Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
Variances", 1979: of two sets with counts n, m and means a, b the scatter about the common mean is

    S = S_a + S_b + n m / (n + m) (a - b)(a - b)^T.
"""

import dataclasses

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class Moments:
    """Of a set of features; never changed in place.

    Attributes:
      count: features in the set.
      mean: their mean.
      scatter: sum of the outer products of their differences from the mean.
    """

    count: int
    mean: Float[np.ndarray, 'd']
    scatter: Float[np.ndarray, 'd d']

    @classmethod
    def of(cls, features: Float[np.ndarray, 'n d']) -> 'Moments':
        """The moments of one piece.

        Raises:
          ValueError: no features, or some are not finite.
        """
        x = finite(features, 1)
        mean = x.mean(axis=0)
        return cls(len(x), mean, (x - mean).T @ (x - mean))

    def merge(self, other: 'Moments') -> 'Moments':
        """The moments of both sets together."""
        count = self.count + other.count
        apart = other.mean - self.mean
        mean = self.mean + apart * (other.count / count)
        between = np.outer(apart, apart) * (self.count * other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)

    @property
    def covariance(self) -> Float[np.ndarray, 'd d']:
        """The unbiased estimate (divided by count - 1). Raises ValueError for one feature."""
        if self.count < 2:
            raise ValueError(f'{self.count} features have no covariance')
        return self.scatter / (self.count - 1)


def finite(features: Float[np.ndarray, 'n d'], least: int = 2) -> Float[np.ndarray, 'n d']:
    """Features in float64.

    Raises:
      ValueError: fewer than `least`, or some are not finite.
    """
    if len(features) < least:
        raise ValueError(f'{len(features)} features have no covariance')
    x = np.asarray(features, np.float64)
    if not np.isfinite(x).all():
        raise ValueError(f'{(~np.isfinite(x)).any(axis=1).sum()} features are not finite')
    return x
