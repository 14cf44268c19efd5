"""What an FVD costs: I3D's features of many clips, and the intervals of the distances.

    python -m benchmarks.features [--out=benchmarks/results/features_cpu.json]

Random clips of 16 frames in memory: what is in them does not change the time. Target on two CPU
cores: 2,048 clips in 35 minutes and 4 GB.
"""

import json
import time

import numpy as np
from absl import flags

from benchmarks.timing import machine, matmul_peak
from cmd_jax import atomic, cli
from cmd_jax.evaluation import features, intervals
from cmd_jax.evaluation.networks import i3d
from cmd_jax.memory import peak_memory_gb
from cmd_jax.models import flops

CLIPS = flags.DEFINE_integer('clips', 2048, 'How many.', 2)
SIZE = flags.DEFINE_integer('size', 64, 'Pixels a side of the clips, before they are resized.', 1)
BATCH = flags.DEFINE_integer('batch', 4, 'Clips at a time.', 1)
OUT = flags.DEFINE_string('out', None, 'Where to write the table as JSON.')
PORTION = 256  # clips in memory
TARGET = {'minutes': 35, 'memory_gb': 4}


def main():
    """Prints the table, and whether the target is met."""
    rng = np.random.default_rng(0)
    shape = (16, SIZE.value, SIZE.value, 3)
    found, started = [], time.perf_counter()
    for first in range(0, CLIPS.value, PORTION):
        count = min(PORTION, CLIPS.value - first)
        clips = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
        found.append(features.i3d_logits(clips, batch_size=BATCH.value))
        each = (time.perf_counter() - started) / (first + count)
        print(f'{first + count} clips, {each:.3f} s each', flush=True)
    seconds = time.perf_counter() - started
    memory = peak_memory_gb()
    one = np.zeros((1, *shape), np.uint8)
    work = flops.count(features.i3d_program, i3d.load(), one).flops
    found = np.concatenate(found)
    half = len(found) // 2
    before = time.perf_counter()
    intervals.frechet(found[:half], found[half:])
    frechet = time.perf_counter() - before
    before = time.perf_counter()
    intervals.kernel(found[:half], found[half:])
    row = {
        'clips': CLIPS.value,
        'batch': BATCH.value,
        'minutes': seconds / 60,
        'seconds_a_clip': seconds / CLIPS.value,
        'memory_gb': memory,
        'gflop_a_clip': work / 1e9,
        'gflops_per_second': work * CLIPS.value / seconds / 1e9,
        'matmul_gflops_per_second': matmul_peak(),
        'seconds_frechet_interval': frechet,
        'seconds_kernel_interval': time.perf_counter() - before,
    }
    for name, value in row.items():
        aim = f' (target <= {TARGET[name]})' if name in TARGET and CLIPS.value == 2048 else ''
        print(f'{name:28s}{value:.4g}{aim}')
    if OUT.value:
        atomic.write(OUT.value, json.dumps({'machine': machine(), 'i3d': row}, indent=2) + '\n')


if __name__ == '__main__':
    cli.run(main)
