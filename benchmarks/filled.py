"""Arrays for programs whose arguments are only shapes: speed does not depend on weights."""

import math

import jax
import jax.numpy as jnp
import numpy as np

POOL = 2**20  # different values


def fill(tree):
    """Random arrays in the place of the shapes of a tree.

    Floats are small and normal, scales of norms about 1, integers 0 or 1, bytes anything, keys
    those of a seed: what comes out is finite, and no product is with zeros, which may be faster.
    """
    pool = 0.02 * jax.random.normal(jax.random.key(0), (POOL,))

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
        kind = ''
        # Behind the names of modules' parameters comes that of the value.
        words = jax.tree_util.keystr(path, simple=True, separator='/').split('/')
        if [x for x in words if x != 'value'][-1:] in (['scale'], ['std']):
            kind = 'scale'
        elif '/nu/' in jax.tree_util.keystr(path, simple=True, separator='/'):
            kind = 'positive'  # Adam's mean of squares
        return jax.jit(_repeat, static_argnums=(1, 2, 3), out_shardings=x.sharding)(
            pool, x.shape, x.dtype, kind
        )

    return jax.tree_util.tree_map_with_path(array, tree)


def _repeat(pool, shape, dtype, kind: str):
    """The pool again and again. Compiled, nothing is held but the result: what a benchmark tells of
    memory is not that of its beginning."""
    size = math.prod(shape)
    values = jnp.broadcast_to(pool, (-(-size // POOL), POOL)).reshape(-1)[:size].reshape(shape)
    change = {'': lambda x: x, 'scale': lambda x: 1 + x, 'positive': jnp.abs}[kind]
    return change(values).astype(dtype)
