"""Our networks beside PyTorch's and diffusers', on the same machine in one run.

    python -m benchmarks.baseline [--out=benchmarks/results/baseline_cpu.json]

Needs requirements-parity.txt. Ours and another side of a case are each a process of its own, whose
memory is its own, and are called in turn, --repeats times each: so what else the machine does falls
on both, and what is told of two is the median of their ratios. Both start --starts times, so that
one process that is slow in all of its calls does not decide. float32 on CPUs, on as many threads
as there are cores; bfloat16 on a GPU. Random weights. 'plain' is attention by matrix products and a
softmax, as in the authors' release; 'compiled', on a GPU, torch.compile of theirs.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from absl import flags

from benchmarks import networks
from benchmarks.networks import AUTOENCODER, DIT, OURS, TARGETS, UNET, UNET3D
from cmd_jax import atomic, cli

CASE = flags.DEFINE_string('case', None, 'Run one case in this process')
SIDE = flags.DEFINE_string('side', None, 'The side of it')
ONLY = flags.DEFINE_list('only', '', 'Cases with one of these in their names; default: all')
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
    return found / 1e9 if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


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
        self.told = self.read()

    def read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise Ended(f'{self.name} ended with {self.process.wait()}: its error is above')
        return json.loads(line)

    def call(self) -> None:
        self.process.stdin.write('\n')
        self.process.stdin.flush()
        self.times.append(self.read()['seconds'])

    def end(self) -> None:
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
        for _ in range(REPEATS.value):
            for side in sides:
                side.call()
        for side in sides:
            side.end()
    finally:
        for side in sides:
            side.process.kill()
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


def main():
    if CASE.value:
        work(CASE.value, SIDE.value)
        return
    # Or this process and each of ours would take the most of a GPU's memory at once.
    os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
    # Behind the branch above: PyTorch's processes do without JAX.
    import torch

    from benchmarks import timing

    rows = []
    about = timing.machine() | {'torch': torch.__version__}
    about |= {'starts': STARTS.value, 'repeats': REPEATS.value}
    about['matmul_gflops'] = timing.matmul_peak(dtype=timing.dtype())
    for case, pairs in PAIRS.items():
        if ONLY.value and not any(x in case for x in ONLY.value):
            continue
        if torch.cuda.is_available():
            others = (pairs[0][:1] if pairs[0][0] == OURS else ()) + ('compiled',)
            pairs += (others,)
        for names in pairs:
            try:
                found = compare(case, names)
            except Ended as e:  # the other pairs do not need it
                print(f'{case}: {e}', flush=True)
                rows.append({'case': case, 'sides': names, 'error': str(e)})
                continue
            rows += found
            print(*map(line, found), sep='\n', flush=True)
        if OUT.value:
            atomic.write(OUT.value, json.dumps(about | {'rows': rows}, indent=1) + '\n')


def line(row: dict) -> str:
    """For people."""
    low, high = row['seconds_spread']
    told = f'{row["case"]:46} {row["side"]:10} {row["seconds"]:7.2f} s ({low:.2f} to {high:.2f})  '
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
