"""Sampling one video and several: time, memory, FLOPs (the paper's table 9).

    python -m benchmarks.sampling --out=benchmarks/results/sampling_h200.json

Stable Diffusion 2.1's U-Net on 64 x 128 latents, the motion transformer XL/2, the autoencoder, with
random weights: 16 frames of 512 x 1024. `--config` takes another one (`configs/quickstart.py:all`).
A case is a batch, steps of both stages, a guidance scale, and whether the frames go through the
VAE's decoder to pixels on the host, as for a user; without, as in the paper, a case ends with the
latent video on the device. All is warmed up; medians of --repeats runs, with their spread. The MFU
is of the matrix-product rate measured on the same device in the same dtype. Memory is that of the
weights and of the largest program's work, by the compiler; and the allocator's peak, where it
tells one.

After each case the file is written, so that a time limit costs what comes behind it alone.
"""

import dataclasses
import json
import statistics
import time

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

from benchmarks import filled, timing
from benchmarks.counts import without_vae
from cmd_jax import atomic, cli
from cmd_jax.parallel.mesh import make_mesh
from cmd_jax.training import compile_for, compile_sampler
from cmd_jax.training import config as configs

CONFIG = config_flags.DEFINE_config_file('config', 'configs/text_to_video.py:sd21,all')
REPEATS = flags.DEFINE_integer('repeats', 5, 'Timed runs of a case', lower_bound=1)
OUT = flags.DEFINE_string('out', None, 'JSON file')
ONLY = flags.DEFINE_list('cases', None, 'Numbers of the cases to run; all if not given')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    batch: int = 1
    sampler: str = 'ddim'
    steps: int = 50
    guidance: float = 1.0
    pixels: bool = False
    paper: str = ''  # its time and memory on an A100 40GB, float16
    target: float | None = None  # seconds on an H200


CASES = (
    Case(paper='3.13 s, 5.56 GB', target=0.45),
    Case(guidance=7.5, pixels=True, target=1.0),
    Case(sampler='dpmpp_2m', steps=10, guidance=7.5, pixels=True, target=0.35),
    Case(batch=4, paper='8.57 GB'),
    Case(steps=100, paper='6.05 s'),
    Case(batch=4, guidance=7.5, pixels=True),
    # The rest of the paper's table, with guidance and pixels or without.
    Case(guidance=7.5),
    Case(pixels=True),
    Case(steps=100, guidance=7.5, pixels=True),
    Case(batch=4, steps=100),
    Case(batch=4, steps=100, guidance=7.5, pixels=True),
)


def prepared(config: configs.Config, case: Case, mesh):
    """(run, networks, {program: FLOPs}, {program: bytes of its work}, seconds of compilation)."""
    how = dict(sampler=case.sampler, steps=case.steps, guidance=case.guidance)
    changed = {}
    for stage in ('content', 'motion'):
        section = getattr(config, stage)
        sampling = dataclasses.replace(section.sampling, **how)
        changed[stage] = dataclasses.replace(section, sampling=sampling)
    config = dataclasses.replace(config, **changed)
    networks, calls = compile_sampler.calls(
        config, compile_for.known_classes(config), case.batch, mesh
    )
    if not case.pixels:
        calls['video'] = without_vae(calls['video'])
    flops = {name: call.flops() for name, call in calls.items()}
    started = time.perf_counter()
    compiled = {name: call.lower().compile() for name, call in calls.items()}
    seconds = time.perf_counter() - started
    work = {name: working_bytes(program) for name, program in compiled.items()}
    arrays = filled.fill({name: call.arrays for name, call in calls.items()})

    def run():
        frame = compiled['content frame'](**arrays['content frame'])
        motion = compiled['motion latent'](**arrays['motion latent'] | {'content': frame})
        video = arrays['video'] | {'content': frame, 'motion': motion}
        video = compiled['video'](**video)
        return np.asarray(video) if case.pixels else jax.block_until_ready(video)

    return run, networks, flops, work, seconds


def working_bytes(compiled) -> int:
    memory = compiled.memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes


def allocated() -> int:
    """Most bytes that were allocated on the device, 0 where it does not tell."""
    return (jax.devices()[0].memory_stats() or {}).get('peak_bytes_in_use', 0)


def measure(config: configs.Config, case: Case, mesh, peak: float) -> dict:
    """A row of the table. `peak`: FLOPs a second that matrix products reach."""
    before = allocated()
    run, networks, flops, work, compiling = prepared(config, case, mesh)
    first = run()
    times = []
    for _ in range(REPEATS.value):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    seconds, total = statistics.median(times), sum(flops.values())
    weights = compile_for.bytes_on_chip(networks)
    return dataclasses.asdict(case) | {
        'shape': list(first.shape),
        'seconds': seconds,
        'seconds_spread': [min(times), max(times)],
        'seconds_a_video': seconds / case.batch,
        'tflop': total / 1e12,
        'tflop_by_part': {name: x / 1e12 for name, x in flops.items()},
        'mfu': total / seconds / peak,
        'weights_gb': weights / 1e9,
        'work_gb': max(work.values()) / 1e9,
        # The most of all cases so far: where it grew, it is this one's.
        'allocated_gb': allocated() / 1e9 if allocated() > before else None,
        'compile_seconds': compiling,
    }


def main():
    config = configs.parse(CONFIG.value.to_dict())
    mesh = make_mesh()
    rows, only = [], ONLY.value and {int(i) for i in ONLY.value}
    with jax.set_mesh(mesh):
        peak = timing.matmul_peak(dtype=timing.dtype()) * 1e9
        about = timing.machine() | {'matmul_tflops': peak / 1e12, 'repeats': REPEATS.value}
        about |= {'data': CONFIG.value.to_dict()['data']}
        for i, case in enumerate(CASES):
            if only is not None and i not in only:
                continue
            rows.append(measure(config, case, mesh, peak))
            print(line(rows[-1]), flush=True)
            if OUT.value:
                atomic.write(OUT.value, json.dumps(about | {'rows': rows}, indent=1) + '\n')


def line(row: dict) -> str:
    """For people."""
    low, high = row['seconds_spread']
    told = f'{row["batch"]} x {row["sampler"]} {row["steps"]}, guidance {row["guidance"]:g}'
    told += ', to pixels' if row['pixels'] else ''
    target = f'   target <= {row["target"]} s on an H200' if row['target'] else ''
    return (
        f'{told:48} {row["seconds"]:8.3f} s ({low:.3f} to {high:.3f})  {row["tflop"]:7.2f} TFLOP  '
        f'MFU {row["mfu"]:.0%}  weights {row["weights_gb"]:.2f} GB, work {row["work_gb"]:.2f} GB  '
        f'compiled in {row["compile_seconds"]:.0f} s   paper: {row["paper"] or "-"}{target}'
    )


if __name__ == '__main__':
    cli.run(main)
