"""Convolutions of 3 x 3 on CPUs: XLA's own beside `cmd_jax.models.convolution.winograd`.

    python -m benchmarks.convolution [--out=benchmarks/results/convolution_cpu.json]

Images of the U-Net's and the VAE's sizes. Medians of five calls or more; GFLOP/s are of the direct
convolution's multiply-adds for both, the error is that of float32 against float64's result, over
its largest value. 'chosen' is what `conv_general_dilated` takes for that shape.
"""

import time

import jax
import numpy as np
from absl import flags
from jax import lax

from benchmarks import rows, timing
from cmd_jax import cli
from cmd_jax.models import convolution

# Image height, width, channels in and out.
SHAPES = [
    (64, 128, 320, 320),
    (64, 128, 960, 320),
    (64, 128, 640, 640),
    (32, 64, 640, 640),
    (32, 64, 1920, 640),
    (32, 64, 1280, 1280),
    (16, 32, 1280, 1280),
    (8, 16, 1280, 1280),
    (64, 64, 512, 512),
    (256, 256, 256, 256),
    (256, 256, 128, 128),
]

OUT = flags.DEFINE_string('out', None, 'JSON file')


@jax.jit
def direct(x, kernel):
    numbers = ('NHWC', 'HWIO', 'NHWC')
    return lax.conv_general_dilated(x, kernel, (1, 1), 'SAME', dimension_numbers=numbers)


def row(height: int, width: int, before: int, after: int) -> dict:
    """Both ways for a shape."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, height, width, before))
    kernel = rng.standard_normal((3, 3, before, after)) * (9 * before) ** -0.5
    with jax.enable_x64(True):
        exact = np.asarray(direct(x, kernel))
    given = tuple(jax.numpy.asarray(a, dtype='float32') for a in (x, kernel))
    found = {'image': [height, width], 'channels': [before, after]}
    found['winograd_chosen'] = convolution.pays(x.shape, kernel.shape, 'float32', 'cpu')
    for name, function in (('direct', direct), ('winograd', convolution.winograd)):
        started = time.perf_counter()
        compiled = jax.jit(function).lower(*given).compile()
        seconds = time.perf_counter() - started
        error = np.abs(np.asarray(compiled(*given)) - exact).max() / np.abs(exact).max()
        measured = timing.measure(function, *given)
        found[name] = {
            'seconds': measured['seconds'],
            'seconds_spread': measured['seconds_spread'],
            'gflops_per_second': 18e-9 * x.size * after / measured['seconds'],
            'temporary_mb': measured['temporary_mb'],
            'compile_seconds': seconds,
            'error': float(error),
        }
    return found


def main():
    """Prints a line for each shape."""
    table = rows.Rows(OUT.value, timing.machine(), ('image', 'channels'))
    for shape in SHAPES:
        table.add(found := row(*shape))
        told = f'{" x ".join(map(str, shape)):24}'
        for name in ('direct', 'winograd'):
            one = found[name]
            told += (
                f'{name:>10} {1e3 * one["seconds"]:7.1f} ms {one["gflops_per_second"]:6.0f} GFLOP/s'
            )
            told += f' {one["temporary_mb"]:6.0f} MB, error {one["error"]:.0e}'
        print(told + f'   chosen: {("direct", "winograd")[found["winograd_chosen"]]}', flush=True)


if __name__ == '__main__':
    cli.run(main)
