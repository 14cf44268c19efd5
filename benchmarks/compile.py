"""How long programs take to compile, and `sample.py` from its start to its last video.

    python -m benchmarks.compile [--out=benchmarks/results/compile_cpu.json]

Steps of the shipped configs are traced and compiled with a batch of one, --repeats times, each in a
process of its own and without a cache: medians, with the least and the greatest. `sample.py` makes
one video with a run of quickstart's size (trained for one step, in a temporary folder), first with
an empty cache of compiled programs, then with what the first start left there.

After each row the file is written; `--only` adds its rows to the file.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time

from absl import flags

from cmd_jax import cli
from cmd_jax.errors import UserError

CASE = flags.DEFINE_string('case', None, 'CONFIG ARGUMENT: compile its step in this process')
REPEATS = flags.DEFINE_integer('repeats', 5, 'Compilations of a step; starts with a full cache', 1)
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
    from benchmarks import timing

    with tempfile.TemporaryDirectory() as folder:
        run, cache = f'{folder}/run', f'--compilation_cache={folder}/cache'
        one = [f'--config.{s}.train.steps=1' for s in ('autoencoder', 'content', 'motion')]
        script('train.py', '--config=configs/quickstart.py:all', f'--workdir={run}', cache, *one)
        sample = ['sample.py', f'--workdir={run}', '--num_videos=1', f'--out={folder}/out']
        sample.append(f'--compilation_cache={folder}/sampled')
        first = script(*sample)
        again = [script(*sample) for _ in range(REPEATS.value)]
    again = timing.median(again, 'second_seconds')
    return {'case': 'sample.py', 'first_seconds': first, **again, 'target': START_TARGET}


def script(*command: str) -> float:
    started = time.perf_counter()
    if subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL).returncode:
        raise UserError(f'{command[0]} failed: its error is above')
    return time.perf_counter() - started


def main():
    if CASE.value:
        print(json.dumps(compile_step(*CASE.value.split())))
        return
    from benchmarks import rows, timing

    titles = {f'step of {name}:{arg}': (name, arg) for name, arg in STEPS}
    chosen = [title for title in (*titles, 'sample.py') if ONLY.value in title]
    if not chosen:
        raise UserError(f'--only={ONLY.value}: it is in no name: sample.py; {"; ".join(titles)}')
    about = timing.in_own_process('timing') | {'repeats': REPEATS.value}
    table = rows.Rows(OUT.value, about, ('case',), part=bool(ONLY.value))
    for title in chosen:
        load = os.getloadavg()[0]
        found = steps(title, *titles[title]) if title in titles else starts()
        table.add(found | {'load_before': load})
        print(line(found), flush=True)


def steps(title: str, name: str, arg: str) -> dict:
    """A step's row."""
    from benchmarks import timing

    found = [timing.in_own_process('compile', f'--case={name} {arg}') for _ in range(REPEATS.value)]
    parts = [
        timing.median((x[part] for x in found), part)
        for part in ('trace_seconds', 'compile_seconds')
    ]
    both = timing.median((sum(x.values()) for x in found), 'seconds')
    return {'case': title, **parts[0], **parts[1], **both, 'target': COMPILE_TARGET}


def line(row: dict) -> str:
    """For people."""
    if row['case'] == 'sample.py':
        return (
            f'{"sample.py, one video of the quickstart":40} first {row["first_seconds"]:.1f} s, '
            f'again {row["second_seconds"]:.1f} s   target <= {START_TARGET} s again'
        )
    return f'{row["case"]:40} {row["seconds"]:6.1f} s   target <= {COMPILE_TARGET} s'


if __name__ == '__main__':
    cli.run(main)
