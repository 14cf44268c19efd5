"""Loading Stable Diffusion 2.1 and one call of its U-Net: time and memory at full size.

    python -m benchmarks.stable_diffusion [--out=benchmarks/results/stable_diffusion_cpu.json]

The folder is made with random weights: 5.2 GB under .cache, removed at the end. Each case runs in a
process of its own, whose peak memory (VmHWM: Linux only) is told beside what it held before. The
files are in the page cache: reading them from a cold disk takes as long as the disk needs. On a CPU
the parameters themselves count: all three parts in float32 are 1.5 times the largest.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from absl import flags

from cmd_jax import cli

CASE = flags.DEFINE_string('case', None, 'Run one case in this process')
FOLDER = flags.DEFINE_string('folder', '.cache/benchmark_sd21', 'Made and removed if not there')
KEEP = flags.DEFINE_bool('keep', False, 'Leave the folder that was made')
OUT = flags.DEFINE_string('out', None, 'JSON file')
REPEATS = flags.DEFINE_integer('repeats', 5, 'Timed runs; the median is told', 1)

# What is loaded: (parts, dtype that their parameters are kept in), in turn.
TEXT_VAE = ('text_encoder', 'vae')
LOADS = {
    'load U-Net': [(('unet',), 'float32')],
    'load VAE': [(('vae',), 'float32')],
    'load VAE in bfloat16': [(('vae',), 'bfloat16')],
    'load text encoder': [(('text_encoder',), 'float32')],
    'load text encoder in bfloat16': [(('text_encoder',), 'bfloat16')],
    'load all': [(('unet', *TEXT_VAE), 'float32')],
    'load all, frozen parts in bfloat16': [(('unet',), 'float32'), (TEXT_VAE, 'bfloat16')],
}
FORWARD = 'U-Net forward, 64 x 128 latents'
SIZE, TOKENS = (64, 128), 77
TARGETS = {FORWARD: 'seconds <= 20'} | {
    case: 'seconds <= 60, added <= 1.3 x largest part' for case in LOADS
}


def status(field: str) -> float:
    """GB of a field of this process's status."""
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e9


def load(case: str) -> dict:
    import jax
    from flax import nnx

    from cmd_jax import stable_diffusion

    jax.devices()
    before, started, held = status('VmHWM'), time.perf_counter(), {}
    for parts, dtype in LOADS[case]:
        loaded = stable_diffusion.load(FOLDER.value, parts=parts, param_dtype=dtype)
        held |= {part: jax.block_until_ready(nnx.state(getattr(loaded, part))) for part in parts}
    seconds, peak = time.perf_counter() - started, status('VmHWM')
    leaves = {part: jax.tree.leaves(state) for part, state in held.items()}
    sizes = [sum(x.nbytes for x in tree) / 1e9 for tree in leaves.values()]
    return {
        'times': [seconds],
        'before_gb': before,
        'peak_gb': peak,
        'added_gb': peak - before,
        'parameters_gb': sum(sizes),
        'added_over_largest_part': (peak - before) / max(sizes),
        'parameters': {part: sum(x.size for x in tree) for part, tree in leaves.items()},
    }


def forward() -> dict:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from benchmarks import timing
    from cmd_jax import stable_diffusion
    from cmd_jax.models import flops

    jax.devices()
    before = status('VmHWM')
    graphdef, params = nnx.split(stable_diffusion.load(FOLDER.value, parts=['unet']).unet)
    x = jax.random.normal(jax.random.key(0), (1, *SIZE, 4))
    text = jax.random.normal(jax.random.key(1), (1, TOKENS, 1024))
    args = (params, x, jnp.array([500.0]), text)

    def call(params, *args):
        return nnx.merge(graphdef, params)(*args)

    started = time.perf_counter()
    compiled = jax.jit(call).lower(*args).compile()
    compile_seconds = time.perf_counter() - started
    times = timing.repeated(lambda: compiled(*args), REPEATS.value)
    peak, count = status('VmHWM'), flops.count(call, *args).flops
    size = sum(x.nbytes for x in jax.tree.leaves(params)) / 1e9
    return {
        'times': times,
        'compile_seconds': compile_seconds,
        'before_gb': before,
        'peak_gb': peak,
        'added_gb': peak - before,
        'parameters_gb': size,
        'added_over_largest_part': (peak - before) / size,
        'model_tflop': count / 1e12,
        'gflops_per_second': count / timing.median(times)['seconds'] / 1e9,
        'matmul_gflops_per_second': timing.matmul_peak(),
    }


def collect(case: str) -> dict:
    """A load is repeated in fresh processes, the forward pass in one. The highest peak is told."""
    from benchmarks import timing

    same = f'--folder={FOLDER.value}', f'--repeats={REPEATS.value}'
    runs, load = [], os.getloadavg()[0]
    for _ in range(REPEATS.value if case in LOADS else 1):
        runs.append(timing.in_own_process('stable_diffusion', f'--case={case}', *same))
    row = max(runs, key=lambda run: run['peak_gb'])
    times = timing.median(seconds for run in runs for seconds in run.pop('times'))
    return {'case': case, 'target': TARGETS[case], **times, 'load_before': load, **row}


def main():
    if CASE.value:
        print(json.dumps(forward() if CASE.value == FORWARD else load(CASE.value)))
        return
    from benchmarks import rows, timing

    table = rows.Rows(
        OUT.value, timing.in_own_process('timing') | {'repeats': REPEATS.value}, ('case',)
    )
    folder = Path(FOLDER.value)
    made = not folder.exists()  # nothing else may be removed
    try:
        if made:
            make = [sys.executable, '-m', 'cmd_jax.stable_diffusion.make', '--family=sd21']
            subprocess.run([*make, f'--out={folder}'], check=True)
        for case in TARGETS:
            table.add(row := collect(case))
            print(
                f'{case:34} {row["seconds"]:6.2f} s  peak {row["peak_gb"]:.2f} GB, '
                f'{row["added_gb"]:.2f} of them for {row["parameters_gb"]:.2f} GB of parameters '
                f'({row["added_over_largest_part"]:.2f} x largest part)   target: {row["target"]}',
                flush=True,
            )
    finally:
        if made and not KEEP.value:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == '__main__':
    cli.run(main)
