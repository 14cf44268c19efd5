"""Our networks beside PyTorch's and diffusers', on the same machine in one run.

    python -m benchmarks.baseline [--out=benchmarks/results/baseline_cpu.json]

Needs requirements-parity.txt. Ours and another side of a case are each a process of its own, whose
memory is its own, and are called in turn, --repeats times each: so what else the machine does falls
on both, and what is told of two is the median of their ratios. float32 on CPUs, on as many threads
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
ONLY = flags.DEFINE_string('only', '', 'Cases with this in their names')
REPEATS = flags.DEFINE_integer('repeats', 5, 'Timed calls of each side', lower_bound=1)
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
    """The other end of `work`."""

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

    def row(self) -> dict:
        """Ends the process."""
        self.process.stdin.close()
        self.told |= self.read()
        self.process.wait()
        spread = [min(self.times), max(self.times)]
        return {'seconds': statistics.median(self.times), 'seconds_spread': spread} | self.told


def compare(case: str, names: tuple[str, ...]) -> list[dict]:
    """A row for each of these sides, called in turn; ratios in those behind the first."""
    sides = []
    try:
        for name in names:
            sides.append(Side(case, name))
        return timed_in_turn(case, names, sides)
    finally:
        for side in sides:
            side.process.kill()


def timed_in_turn(case: str, names: tuple[str, ...], sides: list[Side]) -> list[dict]:
    for _ in range(REPEATS.value):
        for side in sides:
            side.call()
    rows = [{'case': case, 'side': side.name} | side.row() for side in sides]
    for side, row in zip(sides[1:], rows[1:]):
        ratios = [a / b for a, b in zip(sides[0].times, side.times)]
        row |= {
            'against': names[0],
            'seconds_ratio': statistics.median(ratios),
            'seconds_ratio_spread': [min(ratios), max(ratios)],
            'gb_ratio': rows[0]['gb'] / row['gb'],
        }
    return rows


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
    about = timing.machine() | {'torch': torch.__version__, 'repeats': REPEATS.value}
    about['matmul_gflops'] = timing.matmul_peak(dtype=timing.dtype())
    for case, pairs in PAIRS.items():
        if ONLY.value not in case:
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
