"""Sampling one video and several: time, memory, FLOPs (the paper's table 9).

    python -m benchmarks.sampling --out=benchmarks/results/sampling_h200.json

Stable Diffusion 2.1's U-Net on 64 x 128 latents, the motion transformer XL/2, the autoencoder, with
random weights, on one device: 16 frames of 512 x 1024. `--config` takes another one
(`configs/quickstart.py:all`). A case is a batch, steps of both stages, a guidance scale, and
whether the frames go through the VAE's decoder to pixels on the host, as for a user; without, as in
the paper, a case ends with the latent video on the device. All is warmed up; medians of --repeats
runs, with their spread, also of each program by itself. The MFU is of the matrix-product rate
measured on the same device in the same dtype. Memory is that of the networks' weights (without text
encoders, which do not take part) and of the largest program's work, by the compiler; and the
allocator's peak, where it tells one.

After each case the file is written, so that a time limit costs what comes behind it alone: a second
call with `--cases` of these adds them to the file. Cases share their compiled programs.
"""

import dataclasses
import itertools
import statistics
import time

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

from benchmarks import filled, rows, timing
from benchmarks.counts import without_vae
from cmd_jax import cli
from cmd_jax.errors import UserError
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


# What there is a target or a figure of the paper for, first where the paper tells the memory; then
# all others.
FIRST = (
    Case(paper='3.13 s, 5.56 GB', target=0.45),
    Case(batch=4, paper='8.57 GB'),
    Case(guidance=7.5, pixels=True, target=1.0),
    Case(sampler='dpmpp_2m', steps=10, guidance=7.5, pixels=True, target=0.35),
    Case(steps=100, paper='6.05 s'),
)
ALL = [
    Case(batch=batch, steps=steps, guidance=guidance, pixels=pixels)
    for batch, steps, guidance, pixels in itertools.product(
        (1, 4), (50, 100), (1.0, 7.5), (False, True)
    )
]


def plain(case: Case) -> Case:
    return dataclasses.replace(case, paper='', target=None)


CASES = (*FIRST, *(case for case in ALL if case not in map(plain, FIRST)))


class Programs:
    """The compiled programs that cases consist of, each compiled once.

    Attributes:
      compiled: {what tells programs apart: compiled}.
      calls: {the same: the program with its arguments, shapes in the place of arrays}.
      flops: {the same: floating-point operations}.
    """

    def __init__(self, config: configs.Config, mesh):
        self.config, self.mesh = config, mesh
        self.compiled, self.calls, self.flops = {}, {}, {}

    def of(self, case: Case) -> tuple[dict, float]:
        """{name: key} of a case's programs, and the seconds that compiling those took that were
        not there."""
        how = (case.batch, case.sampler, case.steps, case.guidance)
        video = ('video', case.batch, case.pixels)
        keys = {name: (name, *how) for name in ('content frame', 'motion latent')}
        keys |= {'video': video}
        missing = {name: key for name, key in keys.items() if key not in self.compiled}
        if not missing:
            return keys, 0.0
        calls = self._calls(case)
        started = time.perf_counter()
        for name, key in missing.items():
            self.calls[key] = calls[name]
            self.compiled[key] = calls[name].lower().compile()
        seconds = time.perf_counter() - started
        self.flops |= {key: self.calls[key].flops() for key in missing.values()}
        return keys, seconds

    def _calls(self, case: Case) -> dict[str, compile_sampler.Call]:
        how = dict(sampler=case.sampler, steps=case.steps, guidance=case.guidance)
        changed = {}
        for stage in ('content', 'motion'):
            section = getattr(self.config, stage)
            sampling = dataclasses.replace(section.sampling, **how)
            changed[stage] = dataclasses.replace(section, sampling=sampling)
        config = dataclasses.replace(self.config, **changed)
        classes = compile_for.known_classes(config)
        calls = compile_sampler.calls(config, classes, case.batch, self.mesh)[1]
        if not case.pixels:
            calls['video'] = without_vae(calls['video'])
        return calls


def weights_gb(calls: dict[str, compile_sampler.Call]) -> float:
    """Of the networks that take part."""
    networks = [calls['content frame'].arrays['model'], calls['motion latent'].arrays['model']]
    networks += [x for name, x in calls['video'].arrays.items() if name in ('autoencoder', 'vae')]
    return sum(map(compile_for.bytes_on_chip, networks)) / 1e9


def working_bytes(compiled) -> int:
    memory = compiled.memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes


def measure(programs: Programs, case: Case, peak: float) -> dict:
    """A row of the table. `peak`: FLOPs a second that matrix products reach."""
    before = timing.device_memory('peak_bytes_in_use') or 0.0
    keys, compiling = programs.of(case)
    calls = {name: programs.calls[key] for name, key in keys.items()}
    compiled = {name: programs.compiled[key] for name, key in keys.items()}
    arrays = filled.fill({name: call.arrays for name, call in calls.items()})

    def run():
        """The video, and {part: its seconds}. It waits for each part."""
        times, made = {}, {}
        for name, key in (('content frame', 'content'), ('motion latent', 'motion'), ('video', '')):
            given = arrays[name] | {x: made[x] for x in arrays[name] if x in made}
            started = time.perf_counter()
            made[key] = jax.block_until_ready(compiled[name](**given))
            if name == 'video' and case.pixels:
                made[key] = np.asarray(made[key])
            times[name] = time.perf_counter() - started
        return made[''], times

    shape = run()[0].shape
    times = [run()[1] for _ in range(REPEATS.value)]
    parts = {name: statistics.median(x[name] for x in times) for name in compiled}
    flops = {name: programs.flops[key] for name, key in keys.items()}
    total, found = sum(flops.values()), timing.median(sum(x.values()) for x in times)
    after = timing.device_memory('peak_bytes_in_use') or 0.0
    return dataclasses.asdict(case) | {
        'shape': list(shape),
        **found,
        'seconds_a_video': found['seconds'] / case.batch,
        'seconds_by_part': parts,
        'tflop': total / 1e12,
        'tflop_by_part': {name: x / 1e12 for name, x in flops.items()},
        'matmul_tflops': peak / 1e12,
        'mfu': total / found['seconds'] / peak,
        'mfu_by_part': {name: flops[name] / parts[name] / peak for name in parts},
        'weights_gb': weights_gb(calls),
        'work_gb': max(map(working_bytes, compiled.values())) / 1e9,
        # The most of all cases so far: where it grew, it is this one's.
        'allocated_gb': after if after > before else None,
        'compile_seconds': compiling,
    }


def chosen() -> list[Case]:
    """The cases that are asked for."""
    known = [str(i) for i in range(len(CASES))]
    for number in ONLY.value or ():
        if number not in known:
            raise UserError(f'--cases={number}: choose of 0 to {known[-1]}')
    return [case for i, case in zip(known, CASES) if ONLY.value is None or i in ONLY.value]


def main():
    cases, config = chosen(), configs.parse(CONFIG.value.to_dict())
    timing.use_the_whole_gpu()
    mesh = make_mesh(devices=jax.devices()[:1])
    about = timing.machine() | {'dtype': str(timing.dtype()), 'repeats': REPEATS.value}
    about |= {'config': CONFIG.value.to_dict()}
    names = tuple(field.name for field in dataclasses.fields(Case))
    found = rows.Rows(OUT.value, about, names, part=ONLY.value is not None)
    with jax.set_mesh(mesh):
        peak = timing.matmul_peak(dtype=timing.dtype()) * 1e9
        programs = Programs(config, mesh)
        for case in cases:
            row = measure(programs, case, peak)
            found.add(row)
            print(line(row), flush=True)


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
