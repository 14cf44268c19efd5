"""Convolutions of 3 x 3 pixels with a quarter of the multiplications, on CPUs.

For networks that make videos (`quick_convolutions`), not for training: a step would take longer to
compile. Where it pays, which is decided from shapes, dtype and platform, tiles of 4 x 4 outputs are
computed by Winograd's F(4 x 4, 3 x 3) (Lavin and Gray 2016, arXiv 1509.09308): 36 products in place
of 144, of sums of inputs with sums of kernels. In float32 the result differs from the direct one's
by some 10^-5 of its largest value. Derivatives (reverse mode only), and the forward pass beside
them, are the direct convolution's.

Such a call is marked in the jaxpr by the name of a jit, by which `flops.count` counts it as a
convolution.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from cmd_jax.parallel.mesh import platform, splitting_mesh

MARK = 'winograd'  # the name of the function below

TILE = 4
# What is made of a tile's 6 rows of inputs, of a kernel's 3 and of the 6 rows of products. All is
# linear, so that columns are treated alike and apart.
INPUTS = np.array(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
KERNELS = np.array(
    [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ]
)
OUTPUTS = np.array(
    [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
)

# Below these numbers it gains little, or the sums take longer than the products that they spare:
# `python -m benchmarks.convolution`.
TILES, CHANNELS = 128, 192


def quick_convolutions(network: nnx.Module) -> nnx.Module:
    """The same network, its layers' convolutions by `conv_general_dilated` of this module. Shapes
    may be in the place of arrays."""
    network = nnx.merge(*nnx.split(network))
    for _, module in nnx.iter_modules(network):
        if isinstance(module, nnx.Conv):
            module.conv_general_dilated = conv_general_dilated
    return network


def conv_general_dilated(x: Array, kernel: Array, strides, padding, **kwargs) -> Array:
    """`lax.conv_general_dilated`, for images [b h w c] and kernels [kh kw c c2]."""

    def direct(x, kernel):
        return lax.conv_general_dilated(x, kernel, strides, padding, **kwargs)

    plain = tuple(strides) == (1, 1) and tuple(map(tuple, padding)) == ((1, 1), (1, 1))
    if not plain or not pays(x.shape, kernel.shape, x.dtype, platform()):
        return direct(x, kernel)
    if splitting_mesh() is not None:
        return direct(x, kernel)  # which XLA can split over devices

    function = jax.custom_vjp(winograd)
    function.defvjp(lambda *given: jax.vjp(direct, *given), lambda vjp, grad: vjp(grad))
    return function(x, kernel)


def pays(x_shape: tuple[int, ...], kernel_shape: tuple[int, ...], dtype, backend: str) -> bool:
    """Whether `winograd` is quicker, for one pixel of zeros around images of that shape."""
    batch, height, width, _ = x_shape
    tiles = batch * -(-height // TILE) * -(-width // TILE)
    return (
        backend == 'cpu'
        and jnp.dtype(dtype) == jnp.float32
        and kernel_shape[:2] == (3, 3)
        and kernel_shape[2] == x_shape[-1]  # not in groups of channels
        and min(kernel_shape[2:]) >= CHANNELS
        and tiles >= TILES
    )


@jax.jit
def winograd(
    x: Float[Array, 'b h w c'], kernel: Float[Array, '3 3 c c2']
) -> Float[Array, 'b h w c2']:
    """The convolution with one pixel of zeros around the images."""
    batch, height, width, channels = x.shape
    rows, columns = -(-height // TILE), -(-width // TILE)
    x = jnp.pad(x, ((0, 0), (1, TILE * rows - height + 1), (1, TILE * columns - width + 1), (0, 0)))
    # The barriers keep XLA from computing the sums along one axis anew for each along the other.
    barrier = lax.optimization_barrier

    def tiles(x, i, axis, count):  # the i-th row or column of each
        return lax.slice_in_dim(x, i, i + TILE * (count - 1) + 1, TILE, axis)

    def step(_, weights):
        # One of the six rows of products: a loop, as the program would be six times as long.
        of_inputs, of_kernels = weights
        row = barrier(_sum(of_inputs, [tiles(x, i, 1, rows) for i in range(6)]))
        kernels = barrier(_sum(of_kernels, kernel))
        inputs = _sums(INPUTS, [tiles(row, i, 2, columns).reshape(-1, channels) for i in range(6)])
        factors = barrier((inputs, _sums(KERNELS, kernels)))
        products = barrier([a @ b for a, b in zip(*factors)])
        return None, jnp.stack(_sums(OUTPUTS, products))

    weights = INPUTS.astype(x.dtype), KERNELS.astype(x.dtype)
    products = barrier(lax.scan(step, None, weights)[1])
    out = jnp.stack(_sums(OUTPUTS, products))
    out = out.reshape(TILE, TILE, batch, rows, columns, -1).transpose(2, 3, 0, 4, 1, 5)
    return out.reshape(batch, TILE * rows, TILE * columns, -1)[:, :height, :width]


def _sums(matrix: np.ndarray, arrays) -> list[Array]:
    """matrix @ arrays, without the products by zero."""
    return [
        _sum(*zip(*((float(w), x) for w, x in zip(weights, arrays) if w))) for weights in matrix
    ]


def _sum(weights, arrays) -> Array:
    return functools.reduce(jnp.add, (w * x for w, x in zip(weights, arrays)))
