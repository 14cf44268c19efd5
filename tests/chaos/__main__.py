"""python -m tests.chaos --kills=30 --seed=0 [--steps=30] [--workdir=DIR]

Prints a line a kill, and the verdict; the exit code is 1 where something must not be.
"""

import argparse
import functools
import os
import random
import sys
import tempfile
import time
from pathlib import Path

parser = argparse.ArgumentParser(prog='python -m tests.chaos', description=__doc__)
parser.add_argument('--kills', type=int, default=30)
parser.add_argument('--seed', type=int, default=0)
parser.add_argument('--steps', type=int, default=30)
parser.add_argument('--workdir', type=Path, help='new or empty; kept (else a temporary folder)')
args = parser.parse_args()

with tempfile.TemporaryDirectory(prefix='cmd_jax_chaos_') as temporary:
    workdir = (args.workdir or Path(temporary)).resolve()
    workdir.mkdir(parents=True, exist_ok=True)
    if any(workdir.iterdir()):
        parser.error(f'--workdir={workdir} is not empty')
    os.environ.setdefault('JAX_PLATFORMS', 'cpu')
    os.environ.setdefault('XLA_FLAGS', '--xla_backend_optimization_level=0')
    # Under fire, too: its entries are written by who is killed.
    os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(workdir / 'compiled'))
    os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')

    # Behind the settings: it imports JAX.
    from tests.chaos import run

    begin = time.monotonic()
    targets = run.plan(args.kills, random.Random(args.seed))
    say = functools.partial(print, flush=True)
    verdict = run.campaign(workdir, targets, args.steps, args.seed, say)

print(f'{sum(verdict.tally.values())} kills in {time.monotonic() - begin:.0f} s:')
for where, count in sorted(verdict.tally.items(), key=lambda x: -x[1]):
    print(f'{count:5d}  {where}')
sigterm = ['no process was there for it'] if verdict.sigterm is None else verdict.sigterm
failures = verdict.failures + [f'SIGTERM: {x}' for x in sigterm]
for note in verdict.notes:
    print('note:', note)
for failure in failures:
    print('FAILED:', failure)
print('failed' if failures else 'passed')
sys.exit(bool(failures))
