"""A training step of each network: time, memory, MFU (the paper's table 8).

    python -m benchmarks.training --out=benchmarks/results/training_h200.json

The step of `train.py` on clips of 16 x 512 x 512 (configs/text_to_video.py:sd15), random weights
and a batch that lies on the device: one clip, four, and as many as fit by what these two need
(--batches names others). As in the paper without the networks that are frozen: content and motion
train on a latent cache, and the autoencoder on frames of the latents' size, in three channels
instead of four. --frozen takes clips of pixels instead, with VAE, autoencoder and text encoder in
each step. Medians of --repeats steps with their spread. Model FLOPs are three forward passes of the
trained network and what frozen ones do, recomputation left out; the MFU is of the matrix-product
rate measured on the same device in the same dtype.

After each row the file is written, so that a time limit costs what comes behind it alone.
"""

import dataclasses
import gc
import json
import math
import statistics
import time

import jax
from absl import flags
from ml_collections import config_flags

from benchmarks import filled, timing
from cmd_jax import atomic, cli
from cmd_jax.parallel.mesh import make_mesh
from cmd_jax.training import compile_for, frozen, parts, program, stages
from cmd_jax.training import config as configs

CONFIG = config_flags.DEFINE_config_file('config', 'configs/text_to_video.py:sd15,all')
STAGES = flags.DEFINE_list('stages', list(configs.STAGES), 'Of them')
BATCHES = flags.DEFINE_list('batches', None, 'Batch sizes; 1, 4 and the largest if not given')
FROZEN = flags.DEFINE_bool('frozen', False, 'With the frozen networks in each step')
REPEATS = flags.DEFINE_integer('repeats', 5, 'Timed steps', lower_bound=1)
OUT = flags.DEFINE_string('out', None, 'JSON file')

# Seconds a step and GB of the paper, batch 1 on an A100 80GB; the MFU aimed at on an H200.
PAPER = {'autoencoder': (0.109, 8.93), 'content': (0.151, 21.5), 'motion': (0.100, 18.7)}
TARGETS = {'autoencoder': 0.40, 'content': 0.35, 'motion': 0.45}
LARGEST = 1024
ROOM = 0.85  # of the device's memory, that the largest batch may take


def without_frozen(name: str, config: configs.Config) -> configs.Config:
    """The same network's training without those that are frozen."""
    source = config.stable_diffusion.source
    if name != 'autoencoder':
        data = dataclasses.replace(config.data, source='latents:none')
        return dataclasses.replace(config, data=data)
    stage = config.autoencoder
    loss = dataclasses.replace(stage.loss, l1_weight=0.0, l2_weight=1.0, lpips_weight=0.0)
    if not source:
        return dataclasses.replace(config, autoencoder=dataclasses.replace(stage, loss=loss))
    height, width, _ = parts.frame_shape(config)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, height=height, width=width),
        condition='class',
        stable_diffusion=dataclasses.replace(config.stable_diffusion, source=''),
        autoencoder=dataclasses.replace(stage, loss=loss),
    )


def largest(rows: list[dict]) -> int | None:
    """The largest power of two that fits, by the memory of two batch sizes; None: not known."""
    limit = (jax.devices()[0].memory_stats() or {}).get('bytes_limit')
    if not limit or len(rows) < 2:
        return None
    (small, low), (large, high) = (
        (row['batch_size'], row['state_and_batch_gb'] + row['work_gb']) for row in rows[-2:]
    )
    each = max((high - low) / (large - small), 1e-6)
    fits = small + (ROOM * limit / 1e9 - low) / each
    most = min(LARGEST, 2 ** int(math.log2(max(fits, 1))))
    return most if most > large else None


def measure(
    name: str, config: configs.Config, classes: int, batch_size: int, peak: float
) -> dict | None:
    """A row of the table, None where it does not fit. `peak`: FLOPs a second of matrix products."""
    section = getattr(config, name)
    train = dataclasses.replace(section.train, batch_size=batch_size, device_batch=0)
    config = dataclasses.replace(config, **{name: dataclasses.replace(section, train=train)})
    mesh = make_mesh(**vars(config.mesh), batch=batch_size)
    stages.check(name, config, classes, mesh)
    with jax.set_mesh(mesh):
        made = program.make(stages.make(name, config, classes, mesh))
        given, shapes = frozen.abstract(name, config, mesh)
        batch, key = program.abstract_batch(shapes, mesh), program.abstract_key(mesh)
        flops = made.flops(given.networks, batch)
        started = time.perf_counter()
        try:
            compiled = made.step.lower(made.abstract, given.networks, batch, key).compile()
            compiling = time.perf_counter() - started
            state, networks, batch, key = filled.fill((made.abstract, given.networks, batch, key))
            times = steps(compiled, state, networks, batch, key)
        except jax.errors.JaxRuntimeError as e:
            if 'RESOURCE_EXHAUSTED' not in str(e):
                raise
            return None
    seconds, memory = statistics.median(times), compiled.memory_analysis()
    return {
        'stage': name,
        'batch_size': batch_size,
        'seconds': seconds,
        'seconds_spread': [min(times), max(times)],
        'tflop': flops / 1e12,
        'mfu': flops / seconds / peak / mesh.size,
        'mfu_target': TARGETS[name],
        'state_and_batch_gb': memory.argument_size_in_bytes / 1e9,
        'work_gb': memory.temp_size_in_bytes / 1e9,
        'compile_seconds': compiling,
        'paper_seconds': PAPER[name][0] if batch_size == 1 else None,
        'paper_gb': PAPER[name][1] if batch_size == 1 else None,
    }


def steps(compiled, state, networks, batch, key) -> list[float]:
    """Seconds of each step behind the first two."""
    times = []
    for _ in range(REPEATS.value + 2):
        started = time.perf_counter()
        state, scalars = compiled(state, networks, batch, key)
        jax.block_until_ready((state, scalars))
        times.append(time.perf_counter() - started)
    return times[2:]


def main():
    config = configs.parse(CONFIG.value.to_dict())
    peak = timing.matmul_peak(dtype=timing.dtype()) * 1e9
    about = timing.machine() | {'matmul_tflops': peak / 1e12, 'repeats': REPEATS.value}
    about |= {'data': CONFIG.value.to_dict()['data'], 'frozen': FROZEN.value}
    rows = []
    for name in STAGES.value:
        mine, found = config if FROZEN.value else without_frozen(name, config), []
        sizes = [int(size) for size in BATCHES.value or (1, 4)]
        while sizes:
            size = sizes.pop(0)
            row = measure(name, mine, compile_for.known_classes(config), size, peak)
            gc.collect()
            if row is None:
                print(f'{name:12} {size:4}  does not fit', flush=True)
                break
            found.append(row)
            rows.append(row)
            print(line(row), flush=True)
            if not (BATCHES.value or sizes) and len(found) == 2 and (most := largest(found)):
                sizes.append(most)
            if OUT.value:
                atomic.write(OUT.value, json.dumps(about | {'rows': rows}, indent=1) + '\n')


def line(row: dict) -> str:
    """For people."""
    low, high = row['seconds_spread']
    paper = f'{row["paper_seconds"]} s, {row["paper_gb"]} GB' if row['paper_gb'] else '-'
    return (
        f'{row["stage"]:12} {row["batch_size"]:4}  {row["seconds"]:8.3f} s '
        f'({low:.3f} to {high:.3f})  {row["tflop"]:7.2f} TFLOP  '
        f'MFU {row["mfu"]:.1%} (target {row["mfu_target"]:.0%})  '
        f'state and batch {row["state_and_batch_gb"]:.2f} GB, work {row["work_gb"]:.2f} GB  '
        f'compiled in {row["compile_seconds"]:.0f} s   paper: {paper}'
    )


if __name__ == '__main__':
    cli.run(main)
