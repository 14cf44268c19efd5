"""Many examples through a program in batches of one size, over all devices of a mesh."""

import collections
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np

from cmd_jax.errors import UserError
from cmd_jax.parallel.mesh import batch_sharding, batch_ways


def run(
    program: Callable, mesh: jax.sharding.Mesh, batch_size: int, *arrays: np.ndarray | jax.Array
) -> Iterator[tuple[jax.Array, int]]:
    """Yields (program(*batch), how many of its examples count) for consecutive batches.

    All batches have the same size (one compilation); the last is filled up with repetitions.
    Results stay on the devices, and the next batch is under way when one is yielded.

    Args:
      program: of arrays with a leading axis of examples, split over the devices.
      batch_size: examples at a time; the next multiple of the devices is taken.
      arrays: equally many examples each.

    Raises:
      UserError: no examples.
    """
    n, ways = len(arrays[0]), batch_ways(mesh)
    if not n:
        raise UserError('no videos were given: give one at least')
    size = -(-min(batch_size, n) // ways) * ways
    sharding = batch_sharding(mesh)

    def results():
        for first in range(0, n, size):
            index = np.minimum(np.arange(first, first + size), n - 1)
            with jax.set_mesh(mesh):
                result = program(*(jax.device_put(x[index], sharding) for x in arrays))
            yield result, min(size, n - first)

    return ahead(results())


def ahead(results: Iterable) -> Iterator:
    """The same, asked for one earlier than it is yielded: devices compute what is asked for next
    while the caller has its hands full with this one."""
    waiting = collections.deque()
    for result in results:
        waiting.append(result)
        if len(waiting) > 1:
            yield waiting.popleft()
    yield from waiting


def collect(results: Iterable[tuple[jax.Array, int]]) -> np.ndarray:
    """The examples of `run` in one array of the host."""
    return np.concatenate([np.asarray(result)[:count] for result, count in results])
