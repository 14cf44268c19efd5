"""Linear layers and GELU on CPUs: what `layers.linear` and `layers.gelu` gain over stock ones.

    python -m benchmarks.linear [--out=benchmarks/results/linear_cpu.json]

Gradients of the kernels of the autoencoder at the paper's UCF-101 size (16 frames of 1,024 tokens),
in a scan as the network has them: outside a loop XLA chooses other products. Medians of five
calls or more.
"""

import jax
import jax.numpy as jnp
from absl import flags
from flax import nnx

from benchmarks import rows, timing
from cmd_jax import cli
from cmd_jax.models import layers

TOKENS = (16, 1024)
LAYERS = {'up': (384, 3072), 'down': (1536, 384), 'qkv': (384, 1152), 'out': (384, 384)}
DEPTH = 3

OUT = flags.DEFINE_string('out', None, 'JSON file')


def kernel_gradients(graphdef, params, x, grad):
    """d(x W) / dW against `grad` for each of the stacked layers, their inputs differing."""

    def body(scale, params):
        def product(params):
            return nnx.merge(graphdef, params)(x * scale)

        return 0.9 * scale, jax.vjp(product, params)[1](grad * scale)

    return jax.lax.scan(body, jnp.ones(()), params)[1]


def main():
    """Prints the table, a line for each layer and implementation."""
    table = rows.Rows(OUT.value, timing.machine(), ('layer', 'implementation'))
    normal = jax.random.normal
    for name, (before, after) in LAYERS.items():
        x = normal(jax.random.key(0), (*TOKENS, before))
        grad = normal(jax.random.key(1), (*TOKENS, after))
        stock = nnx.Linear(before, after, rngs=nnx.Rngs(0))
        ours = layers.linear(before, after, dtype=jnp.float32, rngs=nnx.Rngs(0))
        for kind, layer in (('stock', stock), ('cmd_jax', ours)):
            graphdef, params = nnx.split(layer, nnx.Param)
            params = jax.tree.map(lambda p: jnp.stack([p] * DEPTH), params)

            def run(params, x, grad, graphdef=graphdef):
                return kernel_gradients(graphdef, params, x, grad)

            row = timing.measure(run, params, x, grad)
            # The forward products are not needed, and XLA leaves them out.
            row['gflops_per_second'] = 2e-9 * DEPTH * x.size * after / row['seconds']
            table.add({'layer': f'gradient of {name}', 'implementation': kind} | row)
    hidden = normal(jax.random.key(2), (*TOKENS, 1536))
    stock_gelu = jax.tree_util.Partial(jax.nn.gelu, approximate=False)
    for kind, gelu in (('stock', stock_gelu), ('cmd_jax', layers.gelu)):
        row = timing.measure(gelu, hidden)
        table.add({'layer': 'gelu', 'implementation': kind} | row)
    for row in table:
        rate = row['gflops_per_second']
        print(
            f'{row["layer"]:20} {row["implementation"]:8} {1e3 * row["seconds"]:8.1f} ms'
            + (f'{rate:8.1f} GFLOP/s' if rate else '')
        )


if __name__ == '__main__':
    cli.run(main)
