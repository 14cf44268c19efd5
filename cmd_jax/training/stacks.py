"""How a train state keeps the parameters of a network: those of one kind and shape as one array.

Of a U-Net's 686 arrays 59 are left, and as few of their averages and moments: the update has fewer
operations to trace and compile, a checkpoint fewer arrays to write.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from cmd_jax.parallel.mesh import PARAMS, abstract_params, platform, rule


def is_kernel(path: str) -> bool:
    """Whether a parameter is the kernel of a layer, whose weights may decay."""
    return path.endswith('kernel')


class Stacks:
    """The parameters of a network, and the stacks that they make.

    A stack has one more leading axis, and the path of its first parameter.

    Attributes:
      graphdef: of the network.
      params: nested dict of the shapes and layouts of its parameters.
    """

    def __init__(self, network: nnx.Module, mesh: jax.sharding.Mesh):
        """`network`: of arrays or of shapes."""
        self.graphdef, state = nnx.split(network, nnx.Param)
        self.params = abstract_params(nnx.to_pure_dict(state), mesh)
        self._paths, flat = {}, flatten_dict(self.params)
        for path in sorted(flat):
            name, x = '/'.join(map(str, path)), flat[path]
            # What the optimizer tells apart, and how it lies on any mesh.
            kind = is_kernel(name), PARAMS[rule(name)][1]
            self._paths.setdefault((*kind, x.shape, x.dtype), []).append(path)

    def stack(self, params: dict) -> dict:
        """A nested dict like `params` -> the nested dict of its stacks."""
        flat = flatten_dict(params)
        return unflatten_dict(
            {paths[0]: jnp.stack([flat[p] for p in paths]) for paths in self._paths.values()}
        )

    def unstack(self, stacks: dict) -> dict:
        """The inverse of `stack`."""
        flat, found = flatten_dict(stacks), {}
        places = range(max(map(len, self._paths.values())))
        index = jax.lax.index_in_dim
        if platform() == 'cpu':
            places = _unknown(places)
            index = functools.partial(jax.lax.dynamic_index_in_dim, allow_negative_indices=False)
        for paths in self._paths.values():
            x = flat[paths[0]]
            found |= {path: index(x, i, keepdims=False) for path, i in zip(paths, places)}
        return unflatten_dict(found)

    @functools.cached_property
    def unstacked(self):
        """`unstack` as a program of its own, for arrays outside of one."""
        return jax.jit(self.unstack, out_shardings=jax.tree.map(lambda x: x.sharding, self.params))

    def network(self, stacks: dict) -> nnx.Module:
        """The network of arrays that are outside of a program."""
        return nnx.merge(self.graphdef, self.unstacked(stacks))


def _unknown(numbers: range) -> list[jax.Array]:
    """The same numbers, as scalars that XLA takes for results of the program.

    Its CPU backend compiles equal operations once. What reads a part of a stack is equal for blocks
    of one form if the part's place is an operand; a constant would be another for each of them.
    """
    numbers = [jnp.int32(i) for i in numbers]
    known = jax.lax.optimization_barrier(jnp.bool(True))
    return jax.lax.cond(known, lambda: numbers, lambda: [-x for x in numbers])
