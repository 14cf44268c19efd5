"""Between the arrays of this host and global ones, which lie on the devices of all hosts."""

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from cmd_jax.errors import UserError
from cmd_jax.parallel.mesh import batch_sharding, batch_ways


def put(tree, sharding):
    """Arrays of this host, the same in every process, as global arrays.

    `sharding` is one for all leaves, or a tree of them.
    """

    def one(x, where):
        x = np.asarray(x)
        return assemble(x.shape, where, lambda index: x[index])

    if isinstance(sharding, jax.sharding.Sharding):
        sharding = jax.tree.map(lambda _: sharding, tree)
    return jax.tree.map(one, tree, sharding)


def fetch(x: jax.Array) -> np.ndarray:
    """The whole of an array, in every process; all have to call."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


def batch_share(mesh: jax.sharding.Mesh) -> tuple[int, int]:
    """(index, count): which share of each batch this process has on its devices, out of how many.

    Processes that `tensor` joins have the same share.

    Raises:
      UserError: where the processes' shares overlap.
    """
    ways = batch_ways(mesh)
    parts = {}
    for device, (index,) in batch_sharding(mesh).devices_indices_map((ways,)).items():
        parts.setdefault(device.process_index, set()).add(index.start or 0)
    shares = sorted({tuple(sorted(rows)) for rows in parts.values()})
    if sum(map(len, shares)) != ways:
        raise UserError(
            f'mesh.tensor={mesh.shape["tensor"]} joins parts of several hosts: choose a divisor or '
            'a multiple of the devices of a host'
        )
    return shares.index(tuple(sorted(parts[jax.process_index()]))), len(shares)


def put_batch(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """The shares of a batch that the processes have, as global arrays.

    Which row lies where follows from the mesh: rows know their place by themselves.
    """
    sharding, ways, (_, count) = batch_sharding(mesh), batch_ways(mesh), batch_share(mesh)
    local = {i.start or 0 for (i,) in sharding.addressable_devices_indices_map((ways,)).values()}
    starts = {start: i for i, start in enumerate(sorted(local))}

    def one(x):
        size, rows = len(x) // len(starts), len(x) * count

        def part(index):
            i = starts[(index[0].start or 0) // (rows // ways)]
            return x[i * size : (i + 1) * size]

        return assemble((rows, *x.shape[1:]), sharding, part)

    return {name: one(x) for name, x in batch.items()}


def assemble(shape: tuple[int, ...], sharding, part: Callable) -> jax.Array:
    """A global array from the parts that the devices of this host hold, part(index)."""
    found = sharding.addressable_devices_indices_map(shape)
    # Transfers that guards know to be meant, as those of make_array_from_callback are not.
    arrays = [jax.device_put(part(index), device) for device, index in found.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)
