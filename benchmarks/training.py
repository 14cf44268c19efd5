"""A training step of each network: time, memory, MFU (the paper's table 8).

    python -m benchmarks.training --out=benchmarks/results/training_h200.json

The step of `train.py` on clips of 16 x 512 x 512 (configs/text_to_video.py:sd15), random weights
and a batch that lies on the device: one clip, four, and as many as fit by what these two need
(--batches names others; where that one does not fit, the half). As in the paper without the
networks that are frozen: content and motion train on a latent cache, and the autoencoder on frames
of the latents' size, in three channels instead of four. --frozen takes clips of pixels instead,
with VAE, autoencoder and text encoder in each step. Medians of --repeats steps with their spread.
Model FLOPs are three forward passes of the trained network and what frozen ones do, recomputation
left out; the MFU is of the matrix-product rate measured on the same device in the same dtype.
Memory is that of the state and the batch and of the step's work, by the compiler; and the
allocator's peak, where it tells one and none before was higher (one that did not fit, for example).

After each row the file is written, so that a time limit costs what comes behind it alone: a second
call with the --stages that are missing adds them to the file.
"""

import dataclasses
import gc
import math
import time

import jax
from absl import flags
from ml_collections import config_flags

from benchmarks import filled, rows, timing
from cmd_jax import cli
from cmd_jax.errors import UserError, choose
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
ROOM = 0.9  # of what JAX may take of the device's memory


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


def largest(measured: list[dict]) -> int | None:
    """The largest power of two that fits, by the memory of two batch sizes; None: not known."""
    limit = timing.device_memory('bytes_limit')
    if not limit:
        return None
    (small, low), (large, high) = (
        (row['batch_size'], row['state_and_batch_gb'] + row['work_gb']) for row in measured
    )
    each = max((high - low) / (large - small), 1e-6)
    fits = small + (ROOM * limit - low) / each
    most = min(LARGEST, 2 ** int(math.log2(max(fits, 1))))
    return most if most > large else None


def measure(name: str, config: configs.Config, classes: int, batch_size: int, peak: float) -> dict:
    """A row of the table. `peak`: FLOPs a second of matrix products."""
    before = timing.device_memory('peak_bytes_in_use') or 0.0
    about = {'stage': name, 'batch_size': batch_size, 'frozen_networks': FROZEN.value}
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
            return about | {'fits': False}
    found, memory = timing.median(times), compiled.memory_analysis()
    after = timing.device_memory('peak_bytes_in_use') or 0.0
    data = config.data
    return about | {
        'fits': True,
        'shape': [data.frames, data.height, data.width],
        **found,
        'tflop': flops / 1e12,
        'matmul_tflops': peak / 1e12,
        'mfu': flops / found['seconds'] / peak / mesh.size,
        'mfu_target': TARGETS[name],
        'state_and_batch_gb': memory.argument_size_in_bytes / 1e9,
        'work_gb': memory.temp_size_in_bytes / 1e9,
        # The most of all rows so far: where it grew, it is this one's.
        'allocated_gb': after if after > before else None,
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


def asked() -> list[int] | None:
    """The batch sizes of --batches."""
    for size in BATCHES.value or ():
        if not size.isdecimal() or not int(size):
            raise UserError(f'--batches={size}: give numbers, such as 1,4')
    return BATCHES.value and [int(size) for size in BATCHES.value]


def main():
    for name in STAGES.value:
        choose('--stages', name, configs.STAGES)
    batches, config = asked(), configs.parse(CONFIG.value.to_dict())
    timing.use_the_whole_gpu()
    about = timing.machine() | {'dtype': str(timing.dtype()), 'repeats': REPEATS.value}
    about |= {'config': CONFIG.value.to_dict()}
    part = FROZEN.value or bool(batches) or set(STAGES.value) != set(configs.STAGES)
    table = rows.Rows(OUT.value, about, ('stage', 'batch_size', 'frozen_networks'), part)
    peak = timing.matmul_peak(dtype=timing.dtype()) * 1e9
    for name in STAGES.value:
        mine = config if FROZEN.value else without_frozen(name, config)

        def row(size, name=name, mine=mine):
            found = measure(name, mine, compile_for.known_classes(config), size, peak)
            table.add(found)
            print(line(found), flush=True)
            gc.collect()
            return found

        found = [row(size) for size in batches or (1, 4)]
        if batches or not all(x['fits'] for x in found):
            continue
        size = largest(found)
        while size and size > found[-1]['batch_size'] and not row(size)['fits']:
            size //= 2


def line(row: dict) -> str:
    """For people."""
    if not row['fits']:
        return f'{row["stage"]:12} {row["batch_size"]:4}  does not fit'
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
