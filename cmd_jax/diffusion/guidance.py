"""Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598).

    guided = null + scale * (conditional - null)                                                 (1)

so that scale 1 is the conditional model itself. The paper writes 1 + w for scale (section 4), but
gives Stable Diffusion's usual scale, 7.5, as w: its values are taken as scales here. Besides:

    guided' = (phi std(conditional) / std(guided) + 1 - phi) guided                              (2)

takes the excess contrast of large scales away (Lin et al. 2023, arXiv 2305.08891, section 3.4), and
an interval of timesteps outside of which nothing is guided leaves more variety, and half the work
(Kynkaanniemi et al. 2024, arXiv 2404.07724).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree


def guide(
    network: Callable[[Array, Array, PyTree], Array],
    condition: PyTree,
    null: PyTree,
    scale: float,
    *,
    learn_sigma: bool,
    rescale: float = 0.0,
    interval: tuple[float, float] | None = None,
) -> Callable[[Float[Array, 'b *s'], Float[Array, 'b']], Array]:
    """`denoise(x, t)` for `sample`: the network under condition, guided away from `null` (1).

    Guidance acts on every channel of the prediction; variance channels, if any, are those of the
    conditional branch. Both branches run as one batch. Conditions are trees of arrays [b, ...];
    with scale 1 `null` is not evaluated.

    Args:
      network: (x, t, condition) -> output.
      condition, null, scale: see (1).
      learn_sigma: whether the second half of the output's channels is the variance.
      rescale: phi of (2) in 0..1; 0: none.
      interval: (lowest, highest) timestep that is guided, both included, in a batch of one t; the
        conditional branch alone runs at the others. None: all are guided.
    """

    def alone(x, t):
        return network(x, t, condition)

    if scale == 1:
        return alone
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), condition, null)

    def guided(x, t):
        out = network(jnp.concatenate([x, x]), jnp.concatenate([t, t]), both)
        conditional, unconditional = jnp.split(out, 2)
        if not learn_sigma:
            return mix(conditional, unconditional)
        prediction, variance = jnp.split(conditional, 2, axis=-1)
        base = jnp.split(unconditional, 2, axis=-1)[0]
        return jnp.concatenate([mix(prediction, base), variance], axis=-1)

    def mix(conditional, unconditional):
        out = unconditional + scale * (conditional - unconditional)
        if not rescale:
            return out
        axes = tuple(range(1, out.ndim))
        ratio = conditional.std(axes, keepdims=True) / out.std(axes, keepdims=True)
        return (rescale * ratio + 1 - rescale) * out

    if interval is None:
        return guided

    def denoise(x, t):
        low, high = interval
        return jax.lax.cond((low <= t[0]) & (t[0] <= high), guided, alone, x, t)

    return denoise
