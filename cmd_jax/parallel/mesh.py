"""One mesh, two tables: where parameters and activations lie on it.

The mesh has three axes: `data` (replicas), `fsdp` (parameters, gradients and optimizer slots are
split, batches too) and `tensor` (wide layers are split). PARAMS maps a parameter's path to the mesh
axes of its trailing dimensions, ACTIVATIONS a logical axis name to mesh axes.
"""

import re
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from cmd_jax.errors import UserError

AXES = ('data', 'fsdp', 'tensor')

ACTIVATIONS = {'batch': ('data', 'fsdp'), 'heads': 'tensor', 'mlp': 'tensor'}

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
    (r'(.*/)?(\w*conv\w*|linear_[12]|proj_(in|out)|time_emb_proj)/kernel', (None, 'fsdp')),
    (r'.*/(bias|scale)', (None,)),
    (r'.*', ()),
)


def make_mesh(
    data: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence | None = None
) -> jax.sharding.Mesh:
    """The mesh over all devices (or those given); `fsdp=-1` takes what the other two leave.

    Raises UserError where the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    if fsdp == -1:
        fsdp = count // (data * tensor)
    if data * fsdp * tensor != count:
        raise UserError(
            f'mesh data={data} x fsdp={fsdp} x tensor={tensor} does not make {count} devices: '
            'choose sizes whose product is the number of devices'
        )
    # Explicit axes (the default of make_mesh) are refused by stock layers.
    shape, types = (data, fsdp, tensor), (AxisType.Auto,) * 3
    return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)


def rule(path: str) -> int:
    """The index in PARAMS of the rule that holds for a parameter's path ('encoder/blocks/…')."""
    return next(i for i, (pattern, _) in enumerate(PARAMS) if re.fullmatch(pattern, path))


def path_name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator='/')


def param_sharding(params, mesh: jax.sharding.Mesh):
    """A tree of NamedShardings for a tree of arrays (or ShapeDtypeStructs).

    A mesh axis is kept only where it divides the dimension.
    """

    def one(path, x):
        spec = PARAMS[rule(path_name(path))][1]
        spec = (None,) * (x.ndim - len(spec)) + spec
        spec = [a if a and x.shape[i] % mesh.shape[a] == 0 else None for i, a in enumerate(spec)]
        return NamedSharding(mesh, P(*spec))

    return jax.tree_util.tree_map_with_path(one, params)


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Examples are split over `data` and `fsdp`."""
    return NamedSharding(mesh, P(ACTIVATIONS['batch']))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def platform() -> str:
    """Of the mesh if one is set (it may describe devices that are not here), else of this host."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def shard(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation's layout by logical axis names; does nothing outside a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, P(*(ACTIVATIONS.get(a) for a in axes)))
