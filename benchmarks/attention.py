"""Speed and memory of attention at the shapes of CMD, by implementation.

    python -m benchmarks.attention [--out=FILE]

In what networks compute in on this device, unless --dtype says otherwise. GFLOP/s are of the
model's own products (2 forward, 6 with the gradients), so recomputation shows as a lower rate.
Times are medians of five calls or more; the memory is XLA's temporary allocation.
"""

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import rows, timing
from cmd_jax import cli
from cmd_jax.models import attention

SHAPES = {
    'autoencoder, spatial, UCF-101 (16 frames)': (16, 1024, 8, 48),
    'DiT-L/2, 64x64 latent': (1, 1024, 16, 64),
    'autoencoder, temporal, UCF-101': (1024, 16, 8, 48),
    'quickstart, spatial': (64, 64, 4, 32),
    'quickstart, temporal': (512, 8, 4, 32),
}

OUT = flags.DEFINE_string('out', None, 'JSON file')
DTYPE = flags.DEFINE_enum('dtype', None, ['float32', 'bfloat16'], 'Of q, k and v')


def main():
    """Prints the table, a line for each shape, implementation and pass."""
    rng, dtype = np.random.default_rng(0), DTYPE.value or str(timing.dtype())
    table = rows.Rows(
        OUT.value, timing.machine() | {'dtype': dtype}, ('shape', 'implementation', 'pass')
    )
    print(f'{"":42} {"implementation":14} {"pass":9} {"ms":>8} {"GFLOP/s":>8} {"MB":>6}')
    for name, shape in SHAPES.items():
        q, k, v, grad = (jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(4))
        chosen = attention.implementation(shape, shape[1], q.dtype, jax.default_backend())
        for implementation in dict.fromkeys(('xla', chosen)):
            compute = attention.marked(implementation, shape[1])

            def both(q, k, v, grad, compute=compute):
                out, vjp = jax.vjp(compute, q, k, v)
                return out, vjp(grad)

            for direction, fn, args in (('forward', compute, ()), ('both', both, (grad,))):
                row = timing.measure(fn, q, k, v, *args)
                about = {'shape': shape, 'implementation': implementation, 'pass': direction}
                table.add(about | row)
                print(
                    f'{name:42} {implementation:14} {direction:9} {1e3 * row["seconds"]:8.1f} '
                    f'{row["gflops_per_second"]:8.1f} {row["temporary_mb"]:6.0f}',
                    flush=True,
                )


if __name__ == '__main__':
    cli.run(main)
