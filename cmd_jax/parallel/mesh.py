"""One mesh, two tables: where parameters and activations lie on it.

The mesh has three axes: `data` (replicas), `fsdp` (parameters, gradients and optimizer slots are
split, batches too) and `tensor` (wide layers and heads are split; the autoencoder's and the VAE's
work, by frames and tokens). PARAMS maps a parameter's path to the mesh
axes of its trailing dimensions, ACTIVATIONS a logical axis name to mesh axes.
"""

import math
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from cmd_jax.errors import UserError

AXES = ('data', 'fsdp', 'tensor')

ACTIVATIONS = {'batch': ('data', 'fsdp'), 'heads': 'tensor', 'mlp': 'tensor', 'frames': 'tensor'}

# First match wins. The spec holds for the trailing dimensions, so a stacked layer (one more leading
# dimension, the depth) needs no rule of its own. The last rule is the safety net: the tests demand
# that no parameter of a shipped config needs it.
PARAMS = (
    (r'.*/(qkv|up|modulation)/kernel', ('fsdp', 'tensor')),
    (r'.*/(out|down)/kernel', ('tensor', 'fsdp')),
    (r'.*/(qkv|up|modulation)/bias', ('tensor',)),
    (r'(.*/)?\w*(embed|head|modulation|hidden|in|out)/kernel', (None, 'fsdp')),
    (r'(.*/)?\w*_embed(ding)?/embedding', (None, 'fsdp')),
    (r'(.*/)?\w*position', (None, 'fsdp')),
    # Stable Diffusion, by diffusers' names; convolutions are split over what they put out.
    (r'.*/(to_[qkv]|[qkv]_proj|fc1|net/0/proj)/kernel', ('fsdp', 'tensor')),
    (r'.*/(to_out/0|out_proj|fc2|net/2)/kernel', ('tensor', 'fsdp')),
    (r'.*/(conv1|time_emb_proj)/kernel', ('fsdp', 'tensor')),
    (r'.*/conv2/kernel', ('tensor', 'fsdp')),
    (r'(.*/)?(\w*conv\w*|linear_[12]|proj_(in|out))/kernel', (None, 'fsdp')),
    (r'.*convolutions/\d+/kernel', (None, 'fsdp')),  # LPIPS
    (r'.*/(bias|scale)', (None,)),
    (r'.*', ()),
)


def make_mesh(
    data: int = -1,
    fsdp: int = -1,
    tensor: int = 1,
    devices: Sequence | None = None,
    batch: int | None = None,
) -> jax.sharding.Mesh:
    """The mesh over all devices, or those given.

    Args:
      data: replicas, a multiple of the slices, as only this axis may cross the slow network between
        them; -1: one a slice.
      fsdp: -1: what the other two leave.
      tensor: -1: as few as let the batch split over the rest; needs `batch`.
      devices: of one slice or several (TPU slices, or nodes of GPUs).
      batch: examples of a batch, over all devices.

    Raises:
      UserError: where the sizes do not multiply to the number of devices, or not to the slices.
    """
    devices = jax.devices() if devices is None else devices
    count, slices = len(devices), len({getattr(d, 'slice_index', None) for d in devices})
    told = f'mesh.data={data}, mesh.fsdp={fsdp}, mesh.tensor={tensor} on {count} devices'
    data = slices if data == -1 else data
    if data < 1 or count % data:
        raise UserError(f'{told}: mesh.data must divide {count}, or be -1')
    if data % slices:
        raise UserError(
            f'{told} in {slices} slices: mesh.data must be a multiple of {slices}, or -1'
        )
    rest = count // data
    if tensor == -1 and fsdp == -1:
        fits = [n for n in range(1, rest + 1) if rest % n == 0 and batch % (data * n) == 0]
        if not fits:
            raise UserError(
                f'{told}: a batch of {batch} does not split into {data} replicas: choose a '
                f'multiple of {data}'
            )
        fsdp = max(fits)
    if tensor == -1:
        tensor = rest // fsdp
    if fsdp == -1:
        fsdp = rest // tensor
    if data * fsdp * tensor != count:
        raise UserError(
            f'{told}: {data} x {fsdp} x {tensor} do not make {count}: choose sizes whose product '
            'is the number of devices'
        )
    shape, options = (data // slices, fsdp, tensor), dict(allow_split_physical_axes=True)
    if slices == 1:
        ordered = mesh_utils.create_device_mesh(shape, devices, **options)
    else:
        across = (slices, 1, 1)
        ordered = mesh_utils.create_hybrid_device_mesh(shape, across, devices, **options)
    # Explicit axes (the default) are refused by stock layers.
    return jax.sharding.Mesh(ordered, AXES, axis_types=(AxisType.Auto,) * 3)


def rule(path: str) -> int:
    """The index in PARAMS of the rule that holds for a parameter's path ('encoder/blocks/…')."""
    return next(i for i, (pattern, _) in enumerate(PARAMS) if re.fullmatch(pattern, path))


def path_name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator='/')


def param_sharding(params, mesh: jax.sharding.Mesh):
    """A tree of NamedShardings for a tree of arrays (or ShapeDtypeStructs).

    A mesh axis is kept only where it divides the dimension.
    """

    return jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, _spec(path_name(path), x.shape, mesh)), params
    )


def abstract_params(params, mesh: jax.sharding.Mesh, dtype=None):
    """ShapeDtypeStructs that lie on the mesh as `param_sharding` says, of another dtype if one is
    given."""
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=where),
        params,
        param_sharding(params, mesh),
    )


def _spec(path: str, shape: tuple[int, ...], mesh) -> P:
    spec = PARAMS[rule(path)][1]
    spec = (None,) * (len(shape) - len(spec)) + spec
    return P(*(a if a and shape[i] % mesh.shape[a] == 0 else None for i, a in enumerate(spec)))


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Examples are split over `data` and `fsdp`."""
    return NamedSharding(mesh, P(ACTIVATIONS['batch']))


def batch_ways(mesh: jax.sharding.Mesh) -> int:
    """Parts that a batch is split into."""
    return math.prod(mesh.shape[axis] for axis in ACTIVATIONS['batch'])


def check_batch(name: str, batch_size: int, mesh: jax.sharding.Mesh):
    """Raises UserError where the batch of a stage does not split over this mesh."""
    ways = batch_ways(mesh)
    if batch_size % ways:
        raise UserError(
            f'{name}.train.batch_size={batch_size} is not divisible by {ways} devices: choose a '
            f'multiple of {ways}, or set mesh.fsdp=-1 and mesh.tensor=-1'
        )


def accumulation(batch_size: int, device_batch: int, mesh: jax.sharding.Mesh) -> int:
    """The fewest equal parts of a batch that each leave a device no more than `device_batch`
    examples; 0: one part."""
    each = batch_size // batch_ways(mesh)
    if not device_batch:
        return 1
    return next(n for n in range(1, each + 1) if each % n == 0 and each // n <= device_batch)


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def platform() -> str:
    """Of the mesh if one is set (it may describe devices that are not here), else of this host."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def compute_dtype(precision: str):
    """What linear layers compute in: 'auto' is bfloat16 on the accelerators of the mesh that is set
    (or of this host), and float32 on CPUs."""
    if precision == 'auto':
        precision = 'float32' if platform() == 'cpu' else 'bfloat16'
    return jnp.dtype(precision)


def splitting_mesh():
    """The mesh that is set, where arrays may be split over it: None outside a mesh, for one device,
    and inside a shard_map, where they are split already."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types:
        return None
    return mesh


def shard(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation's layout by logical axis names; does nothing outside a mesh."""
    mesh = splitting_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, P(*(ACTIVATIONS.get(a) for a in axes)))


def gather(x: jax.Array, path: str, keep: tuple[str, ...]) -> jax.Array:
    """A parameter as a layer computes with it: split over the mesh axes `keep` alone.

    Left to itself the compiler may multiply by one part of a kernel after the other, and add up
    results that are many times larger than the kernel.
    """
    mesh = splitting_mesh()
    if mesh is None:
        return x
    spec = _spec(path, x.shape, mesh)
    kept = P(*(axis if axis in keep else None for axis in spec))
    # Split here first, or what is sent may be what x was cast from.
    x = jax.lax.with_sharding_constraint(x, spec)
    return jax.lax.with_sharding_constraint(x, kept)


def split_frames(function: Callable, params, keys, x: jax.Array, places: jax.Array) -> jax.Array:
    """function(params, keys [b], x [b t ...], places [t]) -> [b t ...], on each device for its own
    examples and frames; outside a mesh, for all.

    Every device gathers the params. An axis that the mesh does not divide is not split.
    """
    mesh = splitting_mesh()
    if mesh is None:
        return function(params, keys, x, places)
    batch, frames = ACTIVATIONS['batch'], ACTIVATIONS['frames']
    batch = batch if x.shape[0] % math.prod(mesh.shape[a] for a in batch) == 0 else None
    frames = frames if x.shape[1] % mesh.shape[frames] == 0 else None
    specs = (P(), P(batch), P(batch, frames), P(frames))
    return jax.shard_map(function, in_specs=specs, out_specs=P(batch, frames), check_vma=False)(
        params, keys, x, places
    )
