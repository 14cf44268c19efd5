"""Arrays for programs whose arguments are only shapes: speed does not depend on weights."""

import jax
import jax.numpy as jnp
import numpy as np


def fill(tree):
    """Random arrays in the place of the shapes of a tree.

    Floats are small and normal, scales of norms about 1, integers 0 or 1, bytes anything, keys
    those of a seed: what comes out is finite, and no product is with zeros, which may be faster.
    """
    largest = max((x.size for x in jax.tree.leaves(tree)), default=1)
    pool = 0.02 * jax.random.normal(jax.random.key(0), (largest,))

    def array(path, x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            keys = jax.random.split(jax.random.key(1), x.size).reshape(x.shape)
            return jax.device_put(keys, x.sharding)
        if x.dtype == jnp.uint8:
            bits = np.random.default_rng(0).integers(0, 256, x.shape, dtype=np.uint8)
            return jax.device_put(bits, x.sharding)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jax.device_put(
                jnp.arange(x.size).reshape(x.shape).astype(x.dtype) % 2, x.sharding
            )
        values = pool[: x.size].reshape(x.shape)
        if jax.tree_util.keystr(path[-1:], simple=True) in ('scale', 'std'):
            values = 1 + values
        elif '/nu/' in jax.tree_util.keystr(path, simple=True, separator='/'):
            values = abs(values)  # Adam's mean of squares
        return jax.device_put(values.astype(x.dtype), x.sharding)

    return jax.tree_util.tree_map_with_path(array, tree)
