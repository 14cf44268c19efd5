"""What training and sampling would cost on TPU slices, by the TPU compiler on this machine.

    pip install -r requirements-tpu-compile.txt
    python -m benchmarks.pods

Compiles the steps of the shipped configs for v5e:4x4, v5e:8x8, v5p:4x4x4 and v6e:8x8, and sampling
at 512 x 1024 for one chip, each in a process of its own as users do; writes results/pods.json and
prints the tables. A row that is there is kept (--again: made anew; --only=NAME: some of them).
`make pods` gives the compiler TBB's allocator.
"""

import importlib
import json
from pathlib import Path

import jax
from absl import flags

from benchmarks import timing
from cmd_jax import atomic, cli
from cmd_jax.parallel import compile_only
from cmd_jax.training import compile_for, compile_sampler
from cmd_jax.training import config as configs

RESULTS = Path(__file__).parent / 'results' / 'pods.json'
SLICES = ('v5e:4x4', 'v5e:8x8', 'v5p:4x4x4', 'v6e:8x8')
CONFIGS = [
    (f'{name}:{words}{stage}', name, f'{words}{stage}')
    for name, words in (('ucf101', ''), ('text_to_video', 'sd15,'), ('text_to_video', 'sd21,'))
    for stage in configs.STAGES
]
SAMPLERS = tuple(
    (f'text_to_video:{name}', place)
    for name in ('sd21', 'sd15')
    for place in ('v5e:1x1', 'v5p:1x1x1', 'v6e:1x1')
)

AGAIN = flags.DEFINE_bool('again', False, 'Make rows anew that are there already')
CASE = flags.DEFINE_string('case', None, 'Make this row in this process')
ONLY = flags.DEFINE_string('only', '', 'Rows with this in their names, such as sd21,content')


def shipped(name: str, arg: str) -> configs.Config:
    """A config of configs/."""
    return configs.parse(importlib.import_module(f'configs.{name}').get_config(arg).to_dict())


def train_row(config: configs.Config, place: compile_only.Slice) -> dict:
    """The cost of the config's stage on a slice."""
    report = compile_for.measure(config.stage, config, place)
    print(report.lines(), flush=True)
    return report.row()


def sampler_row(config: configs.Config, place: compile_only.Slice) -> dict:
    """The cost of one video."""
    report = compile_sampler.measure(config, place, 1)
    print(report.lines(), flush=True)
    return report.row()


def table(rows: dict) -> str:
    """The rows as Markdown: training, then sampling."""
    lines = [
        '| config | slice | mesh | batch | parts | state | peak | of | TFLOP a chip | collectives '
        '| step at 40 % | compiled in |',
        '|---|---|---|---|---|---|---|---|---|---|---|---|',
    ]
    for key, row in rows.items():
        if 'stage' not in row:
            continue
        config, place = key.split(' on ')
        mesh = ' x '.join(str(n) for n in row['mesh'].values())
        common = f'| {config} | {place} | {mesh} | {row["batch_size"]} | {row["accumulation"]} '
        if not row['cost']:
            lines.append(common + '| does not fit | | | | | | |')
            continue
        moved = sum(x['bytes'] for x in row['cost']['collectives'].values())
        lines.append(
            f'{common}| {compile_for.gigabytes(row["state_bytes"])} '
            f'| {compile_for.gigabytes(row["cost"]["peak"])} '
            f'| {row["memory_bytes"] / 2**30:.0f} GiB '
            f'| {row["model_flops"] / row["chips"] / 1e12:.1f} '
            f'| {compile_for.gigabytes(moved)} | {row["step_seconds"]:.2g} s '
            f'| {row["cost"]["seconds"]:.0f} s |'
        )
    lines += [
        '',
        '| sampling | slice | video | networks | peak | of | TFLOP | at 40 % | compiled in |',
        '|---|---|---|---|---|---|---|---|---|',
    ]
    for key, row in rows.items():
        if 'stage' in row:
            continue
        config, place = key.removeprefix('sampling ').split(' on ')
        if not row['fits']:
            lines.append(f'| {config} | {place} | | does not fit | | | | | |')
            continue
        seconds = sum(cost['seconds'] for cost in row['programs'].values())
        lines.append(
            f'| {config} | {place} | {" x ".join(map(str, row["size"]))} '
            f'| {compile_for.gigabytes(row["weights_bytes"])} '
            f'| {compile_for.gigabytes(row["peak"])} | {row["memory_bytes"] / 2**30:.0f} GiB '
            f'| {sum(row["flops"].values()) / 1e12:.0f} | {row["seconds"]:.2g} s '
            f'| {seconds:.0f} s |'
        )
    return '\n'.join(lines)


def make(key: str) -> dict:
    """The row of that name."""
    jax.config.update('jax_enable_compilation_cache', False)
    title, name = key.removeprefix('sampling ').split(' on ')
    place = compile_only.find_all([name])[0]
    file, arg = title.split(':')
    if key.startswith('sampling '):
        row = sampler_row(shipped(file, f'{arg},all'), place)
    else:
        row = train_row(shipped(file, arg), place)
    return row | {'machine': timing.machine()}


def main():
    """Makes the rows that are missing, and prints the tables."""
    if CASE.value:
        print(json.dumps(make(CASE.value)))
        return
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    keys = [f'{title} on {name}' for title, *_ in CONFIGS for name in SLICES]
    keys += [f'sampling {title} on {name}' for title, name in SAMPLERS]
    for key in keys:
        if ONLY.value not in key or (key in rows and not AGAIN.value):
            continue
        rows[key] = timing.in_own_process('pods', f'--case={key}')
        rows = {key: rows[key] for key in keys if key in rows}
        atomic.write(RESULTS, json.dumps(rows, indent=1) + '\n')
    print(table(rows))


if __name__ == '__main__':
    cli.run(main)
