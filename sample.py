"""Samples new videos from a run.

    python sample.py --workdir=runs/ucf101 --labels=3,17 --num_videos=8 --steps=50 --guidance=4

Writes to --out: one mp4 a video, grid.mp4, grid.gif and samples.json.
"""

import json
from pathlib import Path

from absl import flags, logging

from cmd_jax import cli
from cmd_jax.errors import UserError

WORKDIR = flags.DEFINE_string('workdir', None, 'The run: where train.py wrote')
OUT = flags.DEFINE_string('out', None, 'Folder of the videos; default WORKDIR/samples')
LABELS = flags.DEFINE_list('labels', None, 'Classes, by number or name; default: all in turn')
NUM_VIDEOS = flags.DEFINE_integer('num_videos', None, 'Default: one a label', lower_bound=1)
SEED = flags.DEFINE_integer('seed', 0, 'The same seed gives the same videos')
SAMPLER = flags.DEFINE_string('sampler', None, 'ddim or ddpm; default: of the config')
STEPS = flags.DEFINE_integer('steps', None, 'Default: of the config', lower_bound=1)
GUIDANCE = flags.DEFINE_float('guidance', None, '1: none; default: of the config')
MOTION_STEPS = flags.DEFINE_integer('motion_steps', None, 'Default: --steps', lower_bound=1)
MOTION_GUIDANCE = flags.DEFINE_float('motion_guidance', None, 'Default: --guidance')
BATCH_SIZE = flags.DEFINE_integer('batch_size', 16, 'Videos at a time', lower_bound=1)
FPS = flags.DEFINE_integer('fps', 8, 'Frames per second of the files', lower_bound=1)


def main():
    if not WORKDIR.value:
        raise UserError('--workdir is missing: for example --workdir=runs/quickstart')
    import cmd_jax
    from cmd_jax import video

    generator = cmd_jax.load(WORKDIR.value)
    labels = None
    if LABELS.value is not None:
        labels = [number(label, generator.class_names) for label in LABELS.value]
    out = Path(OUT.value or Path(WORKDIR.value) / 'samples')
    settings = dict(
        seed=SEED.value,
        sampler=SAMPLER.value,
        steps=STEPS.value,
        guidance=GUIDANCE.value,
        motion_steps=MOTION_STEPS.value,
        motion_guidance=MOTION_GUIDANCE.value,
    )
    drawn = [int(i) for i in generator.check_labels(labels, NUM_VIDEOS.value)]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f'--out={out} cannot be written: {e.strerror}') from e
    labels = drawn if generator.class_names else None
    videos = generator(labels, num_videos=len(drawn), batch_size=BATCH_SIZE.value, **settings)
    scale = max(1, 128 // videos.shape[2])
    names = []
    for i, clip in enumerate(videos):
        names.append(f'{i:04d}.mp4')
        video.write(out / names[-1], clip, fps=FPS.value, scale=scale)
    grid = video.grid(videos)
    video.write(out / 'grid.mp4', grid, fps=FPS.value, scale=scale)
    video.write(out / 'grid.gif', grid, fps=FPS.value, scale=scale)
    record = settings | {
        'checkpoint_steps': generator.steps,
        'videos': [
            {'file': name, 'label': label} for name, label in zip(names, drawn, strict=True)
        ],
    }
    (out / 'samples.json').write_text(json.dumps(record, indent=2) + '\n')
    logging.info('%d videos in %s', len(videos), out)


def number(label: str, names: list[str]) -> int:
    """A class given by number or by name."""
    if label in names:
        return names.index(label)
    try:
        return int(label)
    except ValueError:
        raise UserError(
            f'--labels: {label!r} is no class of this run: {", ".join(names)}'
        ) from None


if __name__ == '__main__':
    cli.run(main)
