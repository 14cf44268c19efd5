"""Deterministic solvers of second order, which use the predictions of earlier steps.

With t_0 > t_1 > ... the timesteps, lambda = log(alpha / sigma), h_i = lambda_{i+1} - lambda_i,
r_i = h_{i-1} / h_i and m_i the x_0 predicted at t_i, a step goes in the direction D:

    x_{i+1} = sigma_{i+1} / sigma_i x_i + alpha_{i+1} e_i D,  e_i = 1 - exp(-h_i)                (1)
    DPM-Solver++ (2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2)
      D = m_i + (m_i - m_{i-1}) / (2 r_i)                                                        (2)
    UniPC (Zhao et al. 2023, arXiv 2302.04867) of order 2, B(h) = exp(h) - 1: (2), and as soon as
    m_{i+1} is known, the same step again with
      D = m_i + c_i (m_i - m_{i-1}) / r_i + d_i (m_{i+1} - m_i)                                  (3)
      c_i + d_i = 1 / e_i - 1 / h_i,  d_i - r_i c_i = 2 / h_i^2 + (1 - 2 / h_i) / e_i

The first step has no m_{i-1}: D = m_0, and c = 0, d = 1/2. The last one ends at the data itself,
where h is infinite: x = m. Both solvers need one prediction a step.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

MULTISTEP = ('dpmpp_2m', 'unipc')


def coefficients(
    abar: Float[np.ndarray, 'steps'], corrected: bool
) -> dict[str, Float[np.ndarray, 'steps']]:
    """The weights of what each step adds up, float64.

    Args:
      abar: alpha^2 at the timesteps, increasing; behind them comes the data.
      corrected: whether steps are made again (3).

    Returns:
      {'x', 'm', 'before'}: of x_i, m_i, m_{i-1} in x_{i+1}; where `corrected`, also those of
      x_{i-1}, m_{i-2}, m_{i-1}, m_i in x_i made again, {'again_x', 'again_before', 'again_from',
      'again_m'}. No step is made again at t_0: its weights mean nothing.
    """
    alpha, sigma = np.sqrt(abar), np.sqrt(1 - abar)
    h = np.diff(np.log(alpha / sigma))
    e = -np.expm1(-h)
    ratio, gain = sigma[1:] / sigma[:-1], alpha[1:] * e
    r = h[:-1] / h[1:]
    lean = np.zeros(len(h))
    lean[1:] = 1 / (2 * r)
    # The last step is x = m.
    rows = {
        'x': np.append(ratio, 0.0),
        'm': np.append(gain * (1 + lean), 1.0),
        'before': np.append(-gain * lean, 0.0),
    }
    if not corrected:
        return rows
    c, d = np.zeros(len(h)), np.full(len(h), 0.5)
    c_and_d = 1 / e[1:] - 1 / h[1:]
    d_less_rc = 2 / h[1:] ** 2 + (1 - 2 / h[1:]) / e[1:]
    c[1:] = (c_and_d - d_less_rc) / (1 + r)
    d[1:] = c_and_d - c[1:]
    slope = np.zeros(len(h))
    slope[1:] = c[1:] / r
    return rows | {
        'again_x': np.append(0.0, ratio),
        'again_before': np.append(0.0, -gain * slope),
        'again_from': np.append(0.0, gain * (1 + slope - d)),
        'again_m': np.append(0.0, gain * d),
    }


def solve(
    predict: Callable[[Float[Array, 'b *s'], Int[Array, '']], Array],
    x: Float[Array, 'b *s'],
    ts: Int[np.ndarray, 'steps'],
    abar: Float[np.ndarray, 'steps'],
    corrected: bool,
) -> Float[Array, 'b *s']:
    """x_0 of the noise x. `predict`: (x, t) -> x_0; the rest as in `coefficients`."""
    rows = coefficients(abar, corrected)
    rows = {name: jnp.asarray(row, jnp.float32) for name, row in rows.items()}
    rows |= dict(t=jnp.asarray(ts, jnp.int32), first=jnp.arange(len(ts)) == 0)

    def step(carry, row):
        x, x_from, m_before, m_from = carry
        m = predict(x, row['t'])
        if corrected:
            again = row['again_x'] * x_from + row['again_before'] * m_before
            again += row['again_from'] * m_from + row['again_m'] * m
            x = jnp.where(row['first'], x, again)
        following = row['x'] * x + row['m'] * m + row['before'] * m_from
        return (following, x, m_from, m), None

    nothing = jnp.zeros_like(x)
    return jax.lax.scan(step, (x, nothing, nothing, nothing), rows)[0][0]
