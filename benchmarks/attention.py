"""Speed and memory of attention at the shapes of CMD, by implementation.

    python -m benchmarks.attention [--out=attention.json]

GFLOP/s are of the model's own products (2 forward, 6 with the gradients), so recomputation shows
as a lower rate. Times are the best of several runs; the memory is XLA's temporary allocation.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks.timing import measure
from cmd_jax import cli
from cmd_jax.models import attention

SHAPES = {
    'autoencoder, spatial, UCF-101 (16 frames)': (16, 1024, 8, 48),
    'DiT-L/2, 64x64 latent': (1, 1024, 16, 64),
    'autoencoder, temporal, UCF-101': (1024, 16, 8, 48),
    'quickstart, spatial': (64, 64, 4, 32),
    'quickstart, temporal': (512, 8, 4, 32),
}

OUT = flags.DEFINE_string('out', None, 'Where to write the table as JSON.')
DTYPE = flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'Of q, k and v.')


def main():
    """Prints the table, a line for each shape, implementation and pass."""
    rng, rows = np.random.default_rng(0), []
    print(f'{"":42} {"implementation":14} {"pass":9} {"ms":>8} {"GFLOP/s":>8} {"MB":>6}')
    for name, shape in SHAPES.items():
        q, k, v, grad = (jnp.asarray(rng.standard_normal(shape), DTYPE.value) for _ in range(4))
        chosen = attention.implementation(shape, shape[1], q.dtype, jax.default_backend())
        for implementation in dict.fromkeys(('xla', chosen)):
            compute = attention.marked(implementation, shape[1])

            def both(q, k, v, grad, compute=compute):
                out, vjp = jax.vjp(compute, q, k, v)
                return out, vjp(grad)

            for direction, fn, args in (('forward', compute, ()), ('both', both, (grad,))):
                row = measure(fn, q, k, v, *args)
                rows.append(
                    {'shape': shape, 'implementation': implementation, 'pass': direction} | row
                )
                print(
                    f'{name:42} {implementation:14} {direction:9} {1e3 * row["seconds"]:8.1f} '
                    f'{row["gflops_per_second"]:8.1f} {row["temporary_mb"]:6.0f}',
                    flush=True,
                )
    if OUT.value:
        with open(OUT.value, 'w') as f:
            json.dump({'device': jax.devices()[0].device_kind, 'rows': rows}, f, indent=1)


if __name__ == '__main__':
    cli.run(main)
