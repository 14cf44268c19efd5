"""State dicts of the authors' CMD release and of facebookresearch/DiT as our modules.

A state dict is {name: array} in PyTorch's layouts: Linear [out in], Conv [out in kh kw],
ConvTranspose [in out kh kw]. Each function below is a table: our parameter, their name, and what
turns theirs into ours. Nothing may be missing, left over or of another shape.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from cmd_jax.errors import UserError
from cmd_jax.models.autoencoder import VideoAutoencoder
from cmd_jax.models.content import ContentDiT
from cmd_jax.models.dit import SIZES
from cmd_jax.models.motion import MotionDiT
from cmd_jax.models.rngs import make_rngs

LISTED = 10  # names in an error message
HEADS = 8  # of the authors' autoencoder, whatever its width
UNUSED = r'(encoder|decoder)\.(frame_rot_emb\.inv_freqs|image_rot_emb\.scales)'
LABELS = 'y_embedder.embedding_table.weight'

StateDict = Mapping[str, np.ndarray]


def same(x):
    return x


def transpose(x):
    """Linear: [out in] -> [in out]."""
    return x.T


def patch_conv(x):
    """Convolution of one patch [k c p q] -> Linear [(p q c) k]."""
    return rearrange(x, 'k c p q -> (p q c) k')


def patch_transpose(x):
    """Transposed convolution to one patch [k c p q] -> Linear [k (p q c)]."""
    return rearrange(x, 'k c p q -> k (p q c)')


def pointwise(x):
    """1x1 convolution [out in 1 1] -> Linear [in out]."""
    return x[:, :, 0, 0].T


def row(x):
    """A table [1 n k] -> [n k]."""
    return x[0]


def tiled(patch: int) -> Callable:
    """The bias of a transposed convolution [c] -> of a Linear [(p q c)]."""
    return lambda x: np.tile(x, patch * patch)


def by_head(heads: int) -> Callable:
    """Rows of stacked q, k, v -> rows of q, k, v head by head, as a Linear kernel or a bias."""

    def convert(x):
        return rearrange(x, '(three h d) ... -> (h three d) ...', three=3, h=heads).T

    return convert


def layer(ours: str, theirs: str, kernel: Callable = transpose, bias: Callable = same):
    """The rows of a linear layer."""
    return [
        (f'{ours}/kernel', f'{theirs}.weight', kernel),
        (f'{ours}/bias', f'{theirs}.bias', bias),
    ]


def stacked(ours: str, theirs: str, rows: Iterable[tuple]):
    """Rows of one block -> rows of all: `theirs` names the block as {}."""
    return [(f'{ours}/{a}', f'{theirs}.{b}', convert) for a, b, convert in rows]


def load_nvlabs_autoencoder(
    state_dict: StateDict,
    *,
    frames: int = 16,
    height: int = 64,
    width: int = 64,
    output: str = 'sigmoid',
    dtype=jnp.float32,
) -> VideoAutoencoder:
    """The authors' autoencoder; sizes that are not given are read off the shapes.

    It has no positions: position='none'.

    Args:
      state_dict: see above.
      frames, height, width: of the videos.
      output: 'sigmoid' (pixel mode) or 'linear' (latent mode).
      dtype: what the module computes in.

    Raises:
      UserError: for names that are missing, left over, or of another shape.
    """
    settings = autoencoder_settings(state_dict)
    settings |= dict(frames=frames, height=height, width=width, position='none', output=output)

    def make():
        return VideoAutoencoder(**settings, dtype=dtype, rngs=make_rngs(0))

    return build(make, state_dict, autoencoder_table(settings['patch']), 'autoencoder')


def autoencoder_settings(state_dict: StateDict) -> dict:
    """Sizes of the autoencoder, by the names of VideoAutoencoder's arguments."""
    dim, channels, patch, _ = shape(state_dict, 'to_logit.1.weight', 4)
    inner = shape(state_dict, 'encoder.layers.0.0.fn.qkv.weight', 2)[0] // 3
    return dict(
        channels=channels,
        patch=patch,
        dim=dim,
        depth=depth(state_dict, r'encoder\.layers\.(\d+)\..*'),
        heads=HEADS,
        head_dim=inner // HEADS,
        motion_channels=shape(state_dict, 'pre_xt.weight', 4)[0],
    )


def autoencoder_table(patch: int) -> list[tuple]:
    """The rows of the autoencoder."""
    attention = [
        *layer('{}/qkv', '{}.fn.qkv', by_head(HEADS), by_head(HEADS)),
        *layer('{}/out', '{}.fn.proj'),
    ]
    block = []
    for ours, theirs in (('time', '0'), ('space', '1')):
        block += [(a.format(ours), b.format(theirs), convert) for a, b, convert in attention]
    block += layer('mlp/up', '2.fn.net.0') + layer('mlp/down', '2.fn.net.3')
    for ours, theirs in (('time_norm', '0'), ('space_norm', '1'), ('mlp_norm', '2')):
        block += [(f'{ours}/scale', f'{theirs}.norm.weight', same)]
        block += [(f'{ours}/bias', f'{theirs}.norm.bias', same)]
    table = [
        *layer('patch_embed', 'encoder.to_patch_embedding'),
        *layer('content_embed', 'to_patch_embedding_xy'),
        *layer('importance_head', 'to_logit.1', patch_transpose, tiled(patch)),
        *layer('output_head', 'to_output.1', patch_transpose, tiled(patch)),
        *layer('width_head', 'pre_xt', pointwise),
        *layer('height_head', 'pre_yt', pointwise),
        *layer('width_embed', 'post_xt', pointwise),
        *layer('height_embed', 'post_yt', pointwise),
    ]
    for side in ('encoder', 'decoder'):
        table += stacked(f'{side}/blocks', f'{side}.layers.{{}}', block)
    return table


def dit_trunk(heads: int) -> list[tuple]:
    """The rows that both diffusion transformers have."""
    block = [
        *layer('attention/qkv', 'attn.qkv', by_head(heads), by_head(heads)),
        *layer('attention/out', 'attn.proj'),
        *layer('mlp/up', 'mlp.fc1'),
        *layer('mlp/down', 'mlp.fc2'),
        *layer('modulation', 'adaLN_modulation.1'),
    ]
    return [
        *layer('patch_embed', 'x_embedder.proj', patch_conv),
        ('positions/position', 'pos_embed', row),
        *layer('time_embed/hidden', 't_embedder.mlp.0'),
        *layer('time_embed/out', 't_embedder.mlp.2'),
        *stacked('trunk/blocks', 'blocks.{}', block),
        *layer('trunk/final_modulation', 'final_layer.adaLN_modulation.1'),
        *layer('trunk/head', 'final_layer.linear'),
    ]


def content_table(heads: int) -> list[tuple]:
    """The rows of a DiT with classes."""
    return [
        *dit_trunk(heads),
        ('label_embed/embedding', LABELS, same),
    ]


def motion_table(heads: int) -> list[tuple]:
    """The rows of the authors' motion network."""
    return [
        *dit_trunk(heads),
        *layer('content_embed', 'keyframe_embedder.proj', patch_conv),
        ('content_positions/position', 'keyframe_pos_embed', row),
    ]


def usual_heads(dim: int) -> int | None:
    """Attention heads of the usual size of that width, if there is one."""
    return {size['dim']: size['heads'] for size in SIZES.values()}.get(dim)


def dit_settings(state_dict: StateDict, heads: int | None) -> dict:
    """Sizes of either diffusion transformer, by the names of its arguments."""
    dim, channels, patch, _ = shape(state_dict, 'x_embedder.proj.weight', 4)
    heads = heads or usual_heads(dim)
    if heads is None:
        raise UserError(f'heads: a network of width {dim} is of no usual size; give its heads')
    if dim % heads:
        raise UserError(f'heads={heads} do not divide the width {dim}')
    out = shape(state_dict, 'final_layer.linear.weight', 2)[0]
    return dict(
        channels=channels,
        patch=patch,
        dim=dim,
        depth=depth(state_dict, r'blocks\.(\d+)\..*'),
        heads=heads,
        learn_sigma=out == 2 * patch * patch * channels,
    )


def load_nvlabs_motion_dit(
    state_dict: StateDict,
    *,
    frames: int = 16,
    tokens: int | None = None,
    content_size: tuple[int, int] | None = None,
    heads: int | None = None,
    dtype=jnp.float32,
) -> MotionDiT:
    """The authors' motion network, which has no condition.

    Args:
      state_dict: see above.
      frames, tokens: of the motion latent; tokens are read off the table of positions if not given.
      content_size: (height, width) of the content frame; square if not given.
      heads: attention heads; those of the usual size of this width if not given.
      dtype: what the module computes in.

    Raises:
      UserError: for names that are missing, left over or of another shape, and sizes that do not
        fit.
    """
    settings = dit_settings(state_dict, heads)
    patch = settings['patch']
    _, content_channels, content_patch, _ = shape(state_dict, 'keyframe_embedder.proj.weight', 4)
    if tokens is None:
        tokens = shape(state_dict, 'pos_embed', 3)[1] * patch * patch // frames
    if content_size is None:
        side = math.isqrt(shape(state_dict, 'keyframe_pos_embed', 3)[1]) * content_patch
        content_size = (side, side)
    settings |= dict(
        frames=frames,
        tokens=tokens,
        content_size=(*content_size, content_channels),
        content_patch=content_patch,
    )

    def make():
        return MotionDiT(**settings, dtype=dtype, rngs=make_rngs(0))

    return build(make, state_dict, motion_table(settings['heads']), 'motion DiT')


def load_dit(
    state_dict: StateDict,
    *,
    height: int | None = None,
    width: int | None = None,
    heads: int | None = None,
    dtype=jnp.float32,
) -> ContentDiT:
    """A class-conditional DiT of facebookresearch/DiT as content network.

    Args:
      state_dict: see above.
      height, width: of what it denoises; square, as the table of positions says, if not given.
      heads: attention heads; those of the usual size of this width if not given.
      dtype: what the module computes in.

    Raises:
      UserError: for names that are missing, left over or of another shape, and sizes that do not
        fit.
    """
    settings = dit_settings(state_dict, heads)
    area = shape(state_dict, 'pos_embed', 3)[1] * settings['patch'] ** 2
    if height is None:
        height = area // width if width else math.isqrt(area)
    if width is None:
        width = area // height
    settings |= dict(
        height=height,
        width=width,
        num_classes=classes(state_dict),
    )

    def make():
        return ContentDiT(**settings, dtype=dtype, rngs=make_rngs(0))

    return build(make, state_dict, content_table(settings['heads']), 'DiT')


# The authors' content network is DiT's own.
load_nvlabs_content_dit = load_dit


def shape(state_dict: StateDict, name: str, ndim: int) -> tuple[int, ...]:
    """The shape of an array that sizes are read off."""
    if name not in state_dict:
        raise UserError(f'the state dict has no {name}: is it of another network?')
    found = np.shape(state_dict[name])
    if len(found) != ndim:
        raise UserError(f'{name} has the shape {found}, but {ndim} axes are expected')
    return found


def classes(state_dict: StateDict) -> int:
    """Number of classes of a DiT; the last row of its table is for none."""
    return shape(state_dict, LABELS, 2)[0] - 1


def depth(state_dict: StateDict, pattern: str) -> int:
    """Number of blocks."""
    found = [int(m[1]) for name in state_dict if (m := re.fullmatch(pattern, name))]
    if not found:
        raise UserError('the state dict has no blocks: is it of another network?')
    return max(found) + 1


def build(make: Callable[[], nnx.Module], state_dict: StateDict, table: list, what: str):
    """The module with the arrays that the table names."""
    graphdef, params = nnx.split(nnx.eval_shape(make), nnx.Param)
    params = fill(nnx.to_pure_dict(params), state_dict, table, what)
    return nnx.merge(graphdef, jax.tree.map(jnp.asarray, params))


def fill(params: dict, state_dict: StateDict, table: list, what: str) -> dict:
    """A tree of shapes, filled with the arrays that the table names, as float32.

    Raises:
      UserError: for names that are missing, left over or of another shape.
    """
    rows = {ours: (theirs, convert) for ours, theirs, convert in table}
    missing, wrong = [], []
    left = {name for name in state_dict if not re.fullmatch(UNUSED, name)}

    def one(name, convert, expected):
        if name not in state_dict:
            missing.append(name)
            return None
        left.discard(name)
        x = np.asarray(state_dict[name])
        try:
            x = convert(x)
        except (ValueError, IndexError):  # another number of axes
            x = None
        if x is None or x.shape != expected:
            wrong.append(f'{name} {np.shape(state_dict[name])}')
            return None
        return np.asarray(x, np.float32)

    def get(path, leaf):
        theirs, convert = rows['/'.join(str(key.key) for key in path)]
        if '{}' not in theirs:
            return one(theirs, convert, leaf.shape)
        parts = [one(theirs.format(i), convert, leaf.shape[1:]) for i in range(leaf.shape[0])]
        return None if any(part is None for part in parts) else np.stack(parts)

    filled = jax.tree_util.tree_map_with_path(get, params)
    problems = [
        f'{len(names)} {problem}: {", ".join(names[:LISTED])}'
        for problem, names in (
            ('missing', sorted(missing)),
            ('of another shape', wrong),
            ('left over', sorted(left)),
        )
        if names
    ]
    if problems:
        raise UserError(f'the state dict does not fit the {what}: {"; ".join(problems)}')
    return filled
