"""The weights of a DiT as the start of a content network in another setting: other classes, or
content frames of another size."""

import math

import jax
import numpy as np
from flax import nnx

from cmd_jax.errors import UserError
from cmd_jax.interop import torch_dicts
from cmd_jax.models.content import ContentDiT
from cmd_jax.models.rngs import make_rngs
from cmd_jax.parallel.mesh import path_name


def dit_start(
    state_dict: torch_dicts.StateDict,
    *,
    height: int,
    width: int,
    num_classes: int,
    heads: int | None = None,
) -> dict[str, np.ndarray]:
    """What a ContentDiT of another setting takes over from a DiT.

    That is everything but the table of classes, where there are other ones, and the table of
    positions, where the grid is another one (DiT's grids are square): a new network has both
    already, the positions by the same formula.

    Args:
      state_dict: of facebookresearch/DiT, or of the authors' content network.
      height, width: of what the new network denoises.
      num_classes: its number of classes.
      heads: of the DiT; those of the usual size of its width if not given.

    Returns:
      {path of the parameter ('trunk/blocks/…'): float32 array}.

    Raises:
      UserError: for names that are missing, left over or of another shape.
    """
    settings = torch_dicts.dit_settings(state_dict, heads)
    patch, classes = settings['patch'], torch_dicts.classes(state_dict)
    positions = torch_dicts.shape(state_dict, 'pos_embed', 3)[1]

    def make():
        # One row of patches: the table of positions is as long in any arrangement.
        sizes = dict(height=patch, width=patch * positions, num_classes=classes)
        return ContentDiT(**settings, **sizes, rngs=make_rngs(0))

    params = nnx.to_pure_dict(nnx.state(nnx.eval_shape(make), nnx.Param))
    table = torch_dicts.content_table(settings['heads'])
    params = torch_dicts.fill(params, state_dict, table, 'DiT')
    start = {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
    if classes != num_classes:
        del start['label_embed/embedding']
    side = math.isqrt(positions)
    if side**2 != positions or (height // patch, width // patch) != (side, side):
        del start['positions/position']
    return start


def check_start(start: dict[str, np.ndarray], network: ContentDiT):
    """Raises UserError where the arrays of `dit_start` are not those of such a network.

    Args:
      start: see `dit_start`.
      network: which is to take them over; `nnx.eval_shape` of it is enough.
    """
    params = nnx.to_pure_dict(nnx.state(network, nnx.Param))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    given = sizes(start)
    wanted = sizes({path_name(path): x for path, x in leaves})
    wanted['heads'] = network.trunk.blocks.attention.heads
    given['heads'] = torch_dicts.usual_heads(given['dim']) or wanted['heads']
    wrong = [
        f'{FIELDS[name]}={wanted[name]} (the weights: {given[name]})'
        for name in FIELDS
        if wanted[name] != given[name]
    ]
    if wrong:
        raise UserError(
            f'the weights are of another network than the config describes: {"; ".join(wrong)}: '
            'set the fields as the weights have them, or start without weights'
        )


# What sizes() tells, as the config calls it.
FIELDS = {
    'dim': 'content.model.dim',
    'depth': 'content.model.depth',
    'heads': 'content.model.heads',
    'values': 'values in a patch, content.model.patch squared times channels',
    'learn_sigma': 'content.process.learn_sigma',
}


def sizes(arrays: dict) -> dict:
    """Of a ContentDiT's arrays (or shapes) by path; they determine the shape of all of them."""
    values, dim = arrays['patch_embed/kernel'].shape
    return {
        'dim': dim,
        'depth': arrays['trunk/blocks/attention/qkv/bias'].shape[0],
        'values': values,
        'learn_sigma': arrays['trunk/head/bias'].shape[0] == 2 * values,
    }
