"""Time and memory of the networks at the paper's UCF-101 size: 16 x 64 x 64, batch 1, float32.

    make benchmark

Each case runs in a process of its own, so that its peak memory is its own. PyTorch's original needs
37.5 s and 14.7 GB for the first (2 CPU cores). Times depend on the memory allocator's settings: the
Makefile has them. Beside each case stands the rate of plain matrix products right after it: what
the machine could do at that time.
"""

import json
import time

from absl import flags

from cmd_jax import cli
from cmd_jax.memory import peak_memory_gb

CASE = flags.DEFINE_string('case', None, 'Run one case in this process')
OUT = flags.DEFINE_string('out', None, 'JSON file')
REMAT = flags.DEFINE_string('remat', 'attention', 'What the backward pass keeps: see layers.REMAT')
REPEATS = flags.DEFINE_integer('repeats', 5, 'Timed runs; the median is told', 1)

CASES = {
    'autoencoder forward + backward': 'seconds <= 37, GB <= 7',
    'MotionDiT-L/2 forward': 'seconds <= 1.6',
    'ContentDiT-L/2 forward': 'seconds <= 3.6',
}


def build(case: str):
    """(function, arguments) of a case, with random weights."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    import cmd_jax
    from cmd_jax.models.dit import SIZES

    rngs = nnx.Rngs(0)
    uniform = jax.random.uniform

    if case.startswith('autoencoder'):
        model = cmd_jax.VideoAutoencoder(
            frames=16, height=64, width=64, remat=REMAT.value, rngs=rngs
        )
        graphdef, params = nnx.split(model, nnx.Param)
        video = uniform(jax.random.key(0), (1, 16, 64, 64, 3), minval=-1)

        def loss(params, video):
            return jnp.abs(nnx.merge(graphdef, params)(video) - video).mean()

        return jax.value_and_grad(loss), (params, video), loss
    t = jnp.array([500.0])
    frame = uniform(jax.random.key(0), (1, 64, 64, 3))
    label = jnp.array([3])
    if case.startswith('Content'):
        model = cmd_jax.ContentDiT(height=64, width=64, num_classes=101, **SIZES['L'], rngs=rngs)
        args = (frame, t, label)
    else:
        model = cmd_jax.MotionDiT(
            frames=16,
            tokens=64,
            channels=8,
            content_size=(64, 64, 3),
            num_classes=101,
            **SIZES['L'],
            rngs=rngs,
        )
        args = (uniform(jax.random.key(1), (1, 16, 64, 8)), t, frame, label)
    graphdef, params = nnx.split(model, nnx.Param)

    def forward(params, *args):
        return nnx.merge(graphdef, params)(*args)

    return forward, (params, *args), forward


def measure(case: str) -> dict:
    """Median seconds, peak memory of this process and model FLOPs of a case."""
    import jax

    from benchmarks import timing
    from cmd_jax.models import flops

    function, args, forward = build(case)
    compiled = jax.jit(function)
    started = time.perf_counter()
    jax.block_until_ready(compiled(*args))
    first = time.perf_counter() - started
    found = timing.median(timing.repeated(lambda: compiled(*args), REPEATS.value))
    memory = peak_memory_gb()
    count = flops.count(forward, *args).flops * (3 if function is not forward else 1)
    return {
        'case': case,
        'target': CASES[case],
        **found,
        'first_call_seconds': first,
        'peak_gb': memory,
        'model_tflop': count / 1e12,
        'gflops_per_second': count / found['seconds'] / 1e9,
        'matmul_gflops_per_second': timing.matmul_peak(),
        'remat': REMAT.value if case.startswith('autoencoder') else None,
    }


def main():
    if CASE.value:
        print(json.dumps(measure(CASE.value)))
        return
    from benchmarks import rows, timing

    about = timing.in_own_process('timing') | {'repeats': REPEATS.value}
    table = rows.Rows(OUT.value, about, ('case', 'remat'))
    same = f'--remat={REMAT.value}', f'--repeats={REPEATS.value}'
    for case in CASES:
        row = timing.in_own_process('models', f'--case={case}', *same)
        table.add(row)
        print(
            f'{case:32} {row["seconds"]:7.2f} s  {row["peak_gb"]:5.2f} GB  '
            f'{row["gflops_per_second"]:6.0f} GFLOP/s (matrix product: '
            f'{row["matmul_gflops_per_second"]:.0f})   target: {row["target"]}'
        )


if __name__ == '__main__':
    cli.run(main)
