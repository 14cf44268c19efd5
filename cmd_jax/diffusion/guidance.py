"""Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598).

    guided = null + scale * (conditional - null)                                                 (1)

so that scale 1 is the conditional model itself and the paper's weight w is scale - 1.
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
) -> Callable[[Float[Array, 'b *s'], Float[Array, 'b']], Array]:
    """`denoise(x, t)` for `sample`: the network under condition, guided away from `null` (1).

    Guidance acts on every channel of the prediction; variance channels, if any, are those of the
    conditional branch. Both branches run as one batch. Conditions are trees of arrays [b, ...];
    with scale 1 `null` is not evaluated.
    """
    if scale == 1:
        return lambda x, t: network(x, t, condition)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), condition, null)

    def denoise(x, t):
        out = network(jnp.concatenate([x, x]), jnp.concatenate([t, t]), both)
        conditional, unconditional = jnp.split(out, 2)
        if not learn_sigma:
            return unconditional + scale * (conditional - unconditional)
        prediction, variance = jnp.split(conditional, 2, axis=-1)
        base = jnp.split(unconditional, 2, axis=-1)[0]
        return jnp.concatenate([base + scale * (prediction - base), variance], axis=-1)

    return denoise
