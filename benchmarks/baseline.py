"""Our networks beside PyTorch's and diffusers', on the same machine in one run.

    python -m benchmarks.baseline [--out=benchmarks/results/baseline_cpu.json]

Needs requirements-parity.txt. Ours and another side of a case are each a process of its own, whose
memory is its own, and are called in turn, --repeats times each: so what else the machine does falls
on both, and what is told of two is the median of their ratios. Both start --starts times, so that
one process that is slow in all of its calls does not decide. The first call of each, which
compiles, is told by itself; on a GPU a few more are not told. float32 on CPUs, on as many threads
as there are cores; bfloat16 on a GPU, with float32 parameters where there is a backward pass.
Random weights. 'plain' is attention by matrix products and a softmax, as in the authors' release;
'compiled', on a GPU, torch.compile of theirs: last, as it takes longest.

After each pair the file is written; `--only` adds its rows to the file.
"""

import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from absl import flags

from benchmarks import networks
from benchmarks.networks import AUTOENCODER, COMPILED, DIT, OURS, TARGETS, UNET, UNET3D
from cmd_jax import cli
from cmd_jax.errors import UserError
from cmd_jax.memory import peak_memory_gb

CASE = flags.DEFINE_string('case', None, 'Run one case in this process')
SIDE = flags.DEFINE_string('side', None, 'The side of it')
ONLY = flags.DEFINE_list('only', '', "Pairs with one of these in 'CASE: SIDE'; default: all")
STARTS = flags.DEFINE_integer('starts', 3, 'Processes of each side, one after the other', 1)
REPEATS = flags.DEFINE_integer('repeats', 3, 'Timed calls of each process', 1)
OUT = flags.DEFINE_string('out', None, 'JSON file')

# {case: the pairs of sides that run together}
PAIRS = {
    AUTOENCODER: ((OURS, 'plain'),),
    DIT: ((OURS, 'diffusers'),),
    UNET: ((OURS, 'diffusers'),),
    UNET3D: (('diffusers',),),
}
# Untimed calls of each side on a GPU, whose clock falls while others compile, and where
# torch.compile records the second one.
WARM = 3


def work(case: str, side: str) -> None:
    """One side's process: a call for each line that comes in, a line of JSON for each that goes
    out: what the first call took, the later ones, and at the end the most that was held."""
    run, adds = networks.ours(case) if side == OURS else networks.theirs(case, side)
    tell({'first_seconds': timed(run), 'tera_multiply_adds': adds})
    for _ in sys.stdin:
        tell({'seconds': timed(run)})
    tell({'gb': held(side)})


def held(side: str) -> float:
    """GB: the most that was allocated on the GPU, or of the process where there is none."""
    if side == OURS:
        import jax

        found = (jax.devices()[0].memory_stats() or {}).get('peak_bytes_in_use')
    else:
        import torch

        found = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return found / 1e9 if found else peak_memory_gb()


def timed(run: Callable) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def tell(what: dict) -> None:
    print(json.dumps(what), flush=True)


class Ended(Exception):
    """A side's process."""


class Side:
    """The other end of `work`. `told` is what it has said, `times` of its later calls."""

    def __init__(self, case: str, name: str):
        command = [sys.executable, '-m', 'benchmarks.baseline', f'--case={case}', f'--side={name}']
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.name, self.process, self.times = name, subprocess.Popen(command, **pipes), []

    def begin(self) -> None:
        self.told = self.read()

    def read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise Ended(f'{self.name} ended with {self.process.wait()}: its error is above')
        return json.loads(line)

    def call(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended, which reading tells
            self.process.stdin.write('\n')
            self.process.stdin.flush()
        self.times.append(self.read()['seconds'])

    def end(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.told |= self.read()
        self.process.wait()


def compare(case: str, names: tuple[str, ...]) -> list[dict]:
    """A row for each of these sides; ratios in those behind the first."""
    alone = len(names) == 1  # starts matter to ratios
    starts = [called_in_turn(case, names) for _ in range(1 if alone else STARTS.value)]
    rows = [row(case, sides) for sides in zip(*starts)]
    for i in range(1, len(names)):
        ratios = [a / b for start in starts for a, b in zip(start[0].times, start[i].times)]
        rows[i] |= {
            'against': names[0],
            'seconds_ratio': statistics.median(ratios),
            'seconds_ratio_spread': [min(ratios), max(ratios)],
            'gb_ratio': rows[0]['gb'] / rows[i]['gb'],
        }
    return rows


def called_in_turn(case: str, names: tuple[str, ...]) -> list[Side]:
    """A process of each of these sides, ended."""
    sides = []
    try:
        for name in names:
            sides.append(Side(case, name))
            sides[-1].begin()
        for _ in range(WARM if on_gpu() else 0):
            for side in sides:
                side.call()
        for side in sides:
            side.times.clear()
        for _ in range(REPEATS.value):
            for side in sides:
                side.call()
        for side in sides:
            side.end()
    finally:
        for side in sides:
            side.process.kill()
            side.process.wait()  # its memory is the next one's
    return sides


def row(case: str, starts: tuple[Side, ...]) -> dict:
    """What the processes of one side took."""
    times = [x for side in starts for x in side.times]
    return {
        'case': case,
        'side': starts[0].name,
        'seconds': statistics.median(times),
        'seconds_spread': [min(times), max(times)],
        'first_seconds': statistics.median(side.told['first_seconds'] for side in starts),
        'tera_multiply_adds': starts[0].told['tera_multiply_adds'],
        'gb': max(side.told['gb'] for side in starts),
    }


def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def chosen() -> list[tuple[str, tuple[str, ...]]]:
    """Cases, each with the sides that run together, in turn."""
    pairs = [(case, names) for case, found in PAIRS.items() for names in found]
    if on_gpu():
        pairs += [(case, (*names[:-1], COMPILED)) for case, names in pairs]
    titles = [f'{case}: {names[-1]}' for case, names in pairs]
    for word in ONLY.value:
        if not any(word in title for title in titles):
            raise UserError(f'--only={word}: it is in none of {"; ".join(titles)}')
    wanted = [not ONLY.value or any(x in title for x in ONLY.value) for title in titles]
    return [pair for pair, chosen in zip(pairs, wanted) if chosen]


def main():
    if CASE.value:
        work(CASE.value, SIDE.value)
        return
    missing = [name for name in ('torch', 'diffusers') if not importlib.util.find_spec(name)]
    if missing:
        raise UserError(f'{missing[0]} is missing: pip install -r requirements-parity.txt')
    pairs = chosen()
    # Or this process and each of ours would take the most of a GPU's memory at once.
    os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
    # Behind the branch above: PyTorch's processes do without JAX.
    import diffusers
    import jax
    import torch

    from benchmarks import rows, timing

    if on_gpu() != (jax.default_backend() == 'gpu'):
        raise UserError(
            f'JAX runs on {jax.default_backend()}, PyTorch {"finds a" if on_gpu() else "finds no"} '
            'GPU: install both for the same device, and hide it from neither (JAX_PLATFORMS=cpu, '
            'as make has it, or CUDA_VISIBLE_DEVICES=)'
        )
    about = timing.machine() | {'dtype': str(timing.dtype()), 'torch': torch.__version__}
    about |= {'diffusers': diffusers.__version__}
    about |= {'starts': STARTS.value, 'repeats': REPEATS.value}
    table = rows.Rows(OUT.value, about, ('case', 'side'), part=bool(ONLY.value))
    peak, told = timing.matmul_peak(dtype=timing.dtype()), set()
    for case, names in pairs:
        try:
            found = compare(case, names)
        except Ended as e:  # the other pairs do not need it
            print(f'{case}: {e}', flush=True)
            found = [{'case': case, 'side': names[-1], 'error': str(e)}]
        else:
            print(*map(line, found), sep='\n', flush=True)
        for row in found:  # ours is told of beside the first of the others
            if (case, row['side']) not in told:
                table.add(row | {'matmul_gflops': peak})
        told |= {(case, row['side']) for row in found}


def line(row: dict) -> str:
    """For people."""
    low, high = row['seconds_spread']
    told = f'{row["case"]:46} {row["side"]:10} {row["seconds"]:8.4g} s ({low:.4g} to {high:.4g})  '
    told += f'{row["gb"]:5.2f} GB  {row["tera_multiply_adds"]:6.2f} T multiply-adds'
    if 'seconds_ratio' in row:
        low, high = row['seconds_ratio_spread']
        told += f'   {row["against"]} / {row["side"]}: time {row["seconds_ratio"]:.2f}'
        told += f' ({low:.2f} to {high:.2f}), memory {row["gb_ratio"]:.2f}'
        target = TARGETS.get(row['case'], {})
        told += ''.join(f', target {name} <= {x}' for name, x in target.items())
    return told


if __name__ == '__main__':
    cli.run(main)
