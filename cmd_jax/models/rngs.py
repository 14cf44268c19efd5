"""Random keys for the parameters of networks."""

import jax
from flax import nnx


class _Stream(nnx.RngStream):
    """Gives the keys of `nnx.RngStream`, in a time that does not grow with the network.

    Flax asks the counter, under a trace, for a sharding that tracers do not have. JAX answers with
    an error that tells which of the operations so far the counter depends on, and Flax catches it:
    for the U-Net of Stable Diffusion that took 13 s at each time that it was made.
    """

    def __call__(self) -> jax.Array:
        count = self.count.get_value()
        self.count.set_value(count + 1)
        return jax.random.fold_in(self.key.get_value(), count)


def make_rngs(seed: int | jax.Array) -> nnx.Rngs:
    """`nnx.Rngs(seed)`, and the same keys, for networks of many layers.

    `seed`: a number or a key. To be made in the trace (`jax.jit`, `nnx.eval_shape`) that uses it.
    """
    rngs = nnx.Rngs(seed)
    rngs.default = _Stream(seed, tag='default')
    return rngs
