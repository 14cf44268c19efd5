"""Measures a trained run; writes `report.html` and `report.json` and prints the numbers.

    python evaluate.py --workdir=runs/quickstart --protocol=moving_digits

Exit code 0 means that the evaluation ran, whether or not its targets are met: the table says which.
"""

import pathlib

from absl import flags

import cmd_jax
from cmd_jax import cli
from cmd_jax.errors import UserError, writable
from cmd_jax.evaluation import moving_digits, prompted_digits, report

# A protocol is a module with TARGETS, evaluate() -> (numbers, pictures) and sections().
PROTOCOLS = {'moving_digits': moving_digits, 'prompted_digits': prompted_digits}

_WORKDIR = flags.DEFINE_string('workdir', None, 'The run to measure.', required=True)
_PROTOCOL = flags.DEFINE_string('protocol', 'moving_digits', f'One of: {", ".join(PROTOCOLS)}.')
_STEPS = flags.DEFINE_integer('steps', None, "Sampling steps; the run's own if not given.", 1)
_GUIDANCE = flags.DEFINE_float('guidance', None, "Guidance scale; the run's own if not given.")
_SEED = flags.DEFINE_integer('seed', 0, 'Seed of the samples and of the held-out clips.')
_NUM_VIDEOS = flags.DEFINE_integer(
    'num_videos', None, "How many videos to generate; the protocol's own number if not given."
)
_OUT = flags.DEFINE_string('out', None, 'Folder of the report; the run itself if not given.')

cli.compilation_cache_flag()


def main():
    """Loads the run, measures it, writes the page and prints what it says."""
    if _PROTOCOL.value not in PROTOCOLS:
        raise UserError(f'protocol={_PROTOCOL.value!r} is not one of: {", ".join(PROTOCOLS)}')
    protocol = PROTOCOLS[_PROTOCOL.value]
    generator = cmd_jax.load(_WORKDIR.value)
    out = writable('--out', _OUT.value or _WORKDIR.value)
    given = (_NUM_VIDEOS, _STEPS, _GUIDANCE, _SEED)
    settings = {flag.name: flag.value for flag in given if flag.value is not None}
    numbers, pictures = protocol.evaluate(generator, **settings)
    numbers |= {'protocol': _PROTOCOL.value, **report.environment()}
    title = f'{pathlib.Path(_WORKDIR.value).resolve().name}: {_PROTOCOL.value}'
    page = report.write(out, title, protocol.sections(numbers, pictures), numbers)
    print(report.lines(report.check(numbers, protocol.TARGETS)))
    print(f'report: {page}')


if __name__ == '__main__':
    cli.run(main)
