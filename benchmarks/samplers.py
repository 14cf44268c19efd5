"""What fewer sampling steps cost in quality, on a run of the quickstart.

    make quickstart
    python -m benchmarks.samplers --workdir=runs/quickstart [--out=FILE]

The same noise goes through each sampler. Class accuracy is a classifier's (`digit_judge`); the
Frechet distance is that of FVD, I3D's logits at 224 pixels a side, to as many held-out real clips.
Its clips have the run's 8 frames, and by default there are fewer of them than an FVD has.
"""

import dataclasses
import pathlib
import time

import numpy as np
from absl import flags, logging

import cmd_jax
from benchmarks import rows, tables
from benchmarks.timing import machine
from cmd_jax import cli
from cmd_jax.errors import UserError, writable
from cmd_jax.evaluation import digit_judge, features, intervals, run

WORKDIR = flags.DEFINE_string('workdir', None, 'A run on moving digits.', required=True)
VIDEOS = flags.DEFINE_integer('num_videos', 1000, 'Of each kind; a multiple of 10.', 10)
STEPS = flags.DEFINE_integer('steps', 100, 'Of DDIM, which the others are compared with.', 1)
FEW = flags.DEFINE_integer('few', 15, 'Steps of the others.', 1)
SIZE = flags.DEFINE_integer('size', 224, 'Pixels a side that I3D sees.', 32)
SEED = flags.DEFINE_integer('seed', 0, 'Of samples, real clips, classifier and intervals.', 0)
OUT = flags.DEFINE_string('out', None, 'JSON file')


def main():
    """Measures each sampler, and prints the table."""
    seed, count = SEED.value, VIDEOS.value
    if count % 10:
        raise UserError(f'--num_videos={count} must be a multiple of 10, the digits')
    if OUT.value:
        writable('--out', pathlib.Path(OUT.value).parent)
    generator = cmd_jax.load(WORKDIR.value)
    sizes = run.clip_sizes(generator, 'moving_digits', 'moving_digits')
    judge = digit_judge.DigitClassifier.train(seed=seed, **sizes)
    real = digit_judge.real_clips('test', count, seed=seed, **sizes)[0]
    wanted = features.i3d_logits(real, size=SIZE.value, mesh=generator.mesh)
    labels = np.arange(count) % 10
    about = machine() | sizes | {'num_videos': count, 'i3d_size': SIZE.value, 'seed': seed}
    about |= {f'checkpoint_{stage}': step for stage, step in generator.steps.items()}
    table = rows.Rows(OUT.value, about, ('sampler', 'steps'))
    for sampler, steps in (('ddim', STEPS.value), ('dpmpp_2m', FEW.value), ('unipc', FEW.value)):
        started = time.perf_counter()
        videos = generator(labels.tolist(), seed=seed, sampler=sampler, steps=steps)
        seconds = time.perf_counter() - started
        found = features.i3d_logits(videos, size=SIZE.value, mesh=generator.mesh)
        right = judge(videos)[0] == labels
        row = {
            'sampler': sampler,
            'steps': steps,
            'seconds': seconds,
            'accuracy': dataclasses.asdict(intervals.of_mean(right, seed)),
            'frechet': dataclasses.asdict(intervals.frechet(wanted, found, seed)),
        }
        table.add(row)
        logging.info('%s', row)
    print(tables.samplers(table))


if __name__ == '__main__':
    cli.run(main)
