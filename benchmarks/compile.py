"""How long programs take to compile, and `sample.py` from its start to its last video.

    python -m benchmarks.compile [--out=benchmarks/results/compile_cpu.json]

Steps of the shipped configs are traced and compiled with a batch of one, each in a process of its
own and without a cache. `sample.py` makes one video with a run of quickstart's size (trained for
one step, in a temporary folder), first with an empty cache of compiled programs, then with what the
first start left there.
"""

import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

from absl import flags

from cmd_jax import atomic, cli

CASE = flags.DEFINE_string('case', None, 'CONFIG ARGUMENT: compile its step in this process')
REPEATS = flags.DEFINE_integer('repeats', 3, 'Starts with a full cache', lower_bound=1)
ONLY = flags.DEFINE_string('only', '', 'Rows with this in their names')
OUT = flags.DEFINE_string('out', None, 'JSON file')

STEPS = [
    (name, f'{words}{stage}')
    for name, words in (('quickstart', ''), ('ucf101', ''), ('text_to_video', 'sd21,'))
    for stage in ('autoencoder', 'content', 'motion')
]
COMPILE_TARGET, START_TARGET = 60, 10  # seconds on two cores


def compile_step(name: str, arg: str) -> dict:
    """Seconds to trace and to compile the step of a config."""
    import dataclasses

    import jax

    from cmd_jax.parallel.mesh import make_mesh
    from cmd_jax.training import compile_for, frozen, program, stages
    from cmd_jax.training import config as configs

    config = configs.parse(importlib.import_module(f'configs.{name}').get_config(arg).to_dict())
    section = getattr(config, config.stage)
    train = dataclasses.replace(section.train, batch_size=1, device_batch=0)
    config = dataclasses.replace(
        config, **{config.stage: dataclasses.replace(section, train=train)}
    )
    mesh, classes = make_mesh(devices=jax.devices()[:1]), compile_for.known_classes(config)
    started = time.perf_counter()
    with jax.set_mesh(mesh):
        made = program.make(stages.make(config.stage, config, classes, mesh))
        given, shapes = frozen.abstract(config.stage, config, mesh)
        batch, key = program.abstract_batch(shapes, mesh), program.abstract_key(mesh)
        lowered = made.step.lower(made.abstract, given.networks, batch, key)
        traced = time.perf_counter()
        lowered.compile()
    return {'trace_seconds': traced - started, 'compile_seconds': time.perf_counter() - traced}


def starts() -> dict:
    """Seconds that `sample.py` takes for a video, with an empty cache and with a full one."""
    with tempfile.TemporaryDirectory() as folder:
        run, cache = f'{folder}/run', f'--compilation_cache={folder}/cache'
        one = [f'--config.{s}.train.steps=1' for s in ('autoencoder', 'content', 'motion')]
        script('train.py', '--config=configs/quickstart.py:all', f'--workdir={run}', cache, *one)
        sample = ['sample.py', f'--workdir={run}', '--num_videos=1', f'--out={folder}/out']
        sample.append(f'--compilation_cache={folder}/sampled')
        first = script(*sample)
        again = [script(*sample) for _ in range(REPEATS.value)]
    return {
        'first_seconds': first,
        'second_seconds': statistics.median(again),
        'second_seconds_spread': [min(again), max(again)],
        'target': START_TARGET,
    }


def script(*command: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    return time.perf_counter() - started


def main():
    if CASE.value:
        print(json.dumps(compile_step(*CASE.value.split())))
        return
    from benchmarks import timing

    rows = []
    for name, arg in STEPS:
        title = f'step of {name}:{arg}'
        if ONLY.value not in title:
            continue
        row = {'case': title, 'load_before': os.getloadavg()[0], 'target': COMPILE_TARGET}
        rows.append(row | timing.in_own_process('compile', f'--case={name} {arg}'))
        seconds = rows[-1]['trace_seconds'] + rows[-1]['compile_seconds']
        print(f'{title:40} {seconds:6.1f} s   target <= {COMPILE_TARGET} s', flush=True)
    if ONLY.value in 'sample.py':
        rows.append({'case': 'sample.py', 'load_before': os.getloadavg()[0]} | starts())
        row = rows[-1]
        print(
            f'{"sample.py, one video of the quickstart":40} first {row["first_seconds"]:.1f} s, '
            f'again {row["second_seconds"]:.1f} s   target <= {START_TARGET} s again'
        )
    if OUT.value:
        atomic.write(OUT.value, json.dumps(timing.machine() | {'rows': rows}, indent=1) + '\n')


if __name__ == '__main__':
    cli.run(main)
