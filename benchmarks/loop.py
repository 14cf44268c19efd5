"""What the training loop adds to a step, at quickstart size.

    python -m benchmarks.loop [--out=benchmarks/results/loop_cpu.json]

Trains the three stages of configs/quickstart.py, with one batch that lies in memory: the making of
clips is not the loop's work. Windows of log_every steps of the loop (batches brought to the device,
metrics written) alternate with as many bare calls of the same compiled step on a copy of the state;
nothing is saved or previewed within them. Each window of the loop is compared with the mean of the
bare ones right before and behind it. Other work on the machine shows in the spread.

The last column is what the host does for a step, from windows in which the step itself is left out:
most of it is hidden behind the devices' work, so that it bounds the overhead from above. It decides
where the windows differ by more than the target.
"""

import json
import os
import statistics
import tempfile
import time
from unittest import mock

import jax
import jax.numpy as jnp
from absl import flags, logging

from benchmarks.timing import machine
from cmd_jax import atomic, cli
from cmd_jax.training import config as configs
from cmd_jax.training import loop
from configs import quickstart

TURNS = flags.DEFINE_integer('turns', 11, 'Windows of each kind; the first one warms up')
OUT = flags.DEFINE_string('out', None, 'JSON file')

TARGET = 0.02


class Constant:
    """In the place of `pipeline.Batches`: the first batch again and again."""

    def __init__(self, batches):
        self.batch, self.position = next(batches), 0
        batches.close()

    def __next__(self):
        return dict(self.batch)

    def seek(self, position):
        pass

    def close(self):
        pass


class Alternating:
    """In the place of the compiled step: measures windows of its calls, others in between.

    Attributes:
      times: {'bare', 'loop', 'host': seconds a step of each window}.
    """

    def __init__(self, compiled, window: int):
        self.compiled, self.window = compiled, window
        self.calls, self.started, self.scalars = 0, None, None
        self.times = {'bare': [], 'loop': [], 'host': []}

    def __call__(self, state, networks, batch, key):
        turn, place = divmod(self.calls, self.window)
        kind, before = ('loop', 'host') if turn % 2 == 0 else ('host', 'loop')
        if place == 0:
            jax.block_until_ready(state)
            now = time.perf_counter()
            if self.calls:
                self.times[before].append((now - self.started) / self.window)
            if kind == 'loop':
                with jax.transfer_guard('allow'):
                    left_out = self.window if self.calls else 0
                    state = state.replace(step=state.step + left_out)
                self.times['bare'].append(self.bare(state, networks, batch, key))
            self.started = time.perf_counter()
        self.calls += 1
        if kind == 'loop':
            state, self.scalars = self.compiled(state, networks, batch, key)
        return state, self.scalars

    def bare(self, state, networks, batch, key) -> float:
        state = jax.block_until_ready(jax.tree.map(jnp.copy, state))
        started = time.perf_counter()
        for _ in range(self.window):
            state, scalars = self.compiled(state, networks, batch, key)
        jax.block_until_ready((state, scalars))
        return (time.perf_counter() - started) / self.window


def measure(config: configs.Config, workdir: str, window: int) -> Alternating:
    """Trains a stage with the loop as it is; its step and its batches alone are replaced."""
    read, compile_step, made = loop.read, loop.compile_step, []

    def alternating(*args):
        made.append(Alternating(compile_step(*args), window))
        return made[-1]

    with (
        mock.patch.object(loop, 'read', lambda *args: Constant(read(*args))),
        mock.patch.object(loop, 'compile_step', alternating),
    ):
        loop.train(config, workdir)
    return made[-1]


def row(stage: str, found: Alternating) -> dict:
    """Medians and spreads of a stage, without the first windows."""
    bare, looped, host = (found.times[kind][1:] for kind in ('bare', 'loop', 'host'))
    between = [(a + b) / 2 for a, b in zip(bare, bare[1:], strict=False)]
    overhead = [x / y - 1 for x, y in zip(looped, between, strict=True)]
    quarters = statistics.quantiles(overhead, n=4)
    return {
        'stage': stage,
        'bare_ms': 1e3 * statistics.median(bare),
        'bare_ms_spread': [1e3 * min(bare), 1e3 * max(bare)],
        'loop_ms': 1e3 * statistics.median(looped),
        'loop_ms_spread': [1e3 * min(looped), 1e3 * max(looped)],
        'host_ms': 1e3 * statistics.median(host),
        'host_ms_spread': [1e3 * min(host), 1e3 * max(host)],
        'overhead': statistics.median(overhead),
        'overhead_quartiles': [quarters[0], quarters[2]],
        'overhead_spread': [min(overhead), max(overhead)],
        'target': TARGET,
        'windows': len(looped),
        'steps_per_window': found.window,
    }


def main():
    logging.set_verbosity(logging.WARNING)
    load, rows = os.getloadavg()[0], []
    with tempfile.TemporaryDirectory() as workdir:
        for stage in configs.STAGES:
            tree = quickstart.get_config(stage).to_dict()
            train = tree[stage]['train']
            window = train['log_every']
            # The last step, which saves and makes previews, comes behind the last window.
            train.update(steps=2 * window * TURNS.value + 1, preview_every=0)
            train.update(save_every=train['steps'])
            rows.append(row(stage, measure(configs.parse(tree), workdir, window)))
    head = ('bare [ms]', 'loop [ms]', 'overhead [%]', 'host alone [ms]')
    print(f'{"stage":12}', *(f'{x:>24}' for x in head))
    for found in rows:
        print(line(found))
    if OUT.value:
        found = {'rows': rows, 'load_before': load} | machine()
        atomic.write(OUT.value, json.dumps(found, indent=2) + '\n')


def line(found: dict) -> str:
    """A row of the table: medians, (least to most)."""

    def told(name: str, scale: float = 1.0) -> str:
        low, high = (scale * x for x in found[f'{name}_spread'])
        return f'{scale * found[name]:.2f} ({low:.2f} to {high:.2f})'.rjust(24)

    cells = told('bare_ms'), told('loop_ms'), told('overhead', 100), told('host_ms')
    bound = found['host_ms_spread'][1] / found['bare_ms_spread'][0]
    low, high = found['overhead_quartiles']
    verdict = 'MISSED' if low > TARGET else 'met' if min(bound, high) < TARGET else 'undecided'
    verdict += (
        f' (quartiles {100 * low:.1f} to {100 * high:.1f} %, host at most {100 * bound:.1f} %)'
    )
    return f'{found["stage"]:12} {" ".join(cells)}   target: < {100 * TARGET:.0f} %: {verdict}'


if __name__ == '__main__':
    cli.run(main)
