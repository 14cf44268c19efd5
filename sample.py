"""Samples new videos from a run.

    python sample.py --workdir=runs/ucf101 --labels=3,17 --num_videos=8 --steps=50 --guidance=4

Writes to --out: one mp4 a video, grid.mp4, grid.gif, frames.png (a row a video) and samples.json.
"""

import json
from pathlib import Path

from absl import flags, logging

from cmd_jax import cli
from cmd_jax.errors import UserError, writable

WORKDIR = flags.DEFINE_string('workdir', None, 'The run: where train.py wrote')
OUT = flags.DEFINE_string('out', None, 'Folder of the videos; default WORKDIR/samples')
LABELS = flags.DEFINE_list('labels', None, 'Classes, by number or name; default: the first ones')
NUM_VIDEOS = flags.DEFINE_integer('num_videos', None, 'Default: one a label, or 8', lower_bound=1)
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
    labels = LABELS.value and [number(label, generator.class_names) for label in LABELS.value]
    drawn = generator.check_labels(labels, NUM_VIDEOS.value or (len(labels) if labels else 8))
    settings = dict(
        sampler=SAMPLER.value,
        steps=STEPS.value,
        guidance=GUIDANCE.value,
        motion_steps=MOTION_STEPS.value,
        motion_guidance=MOTION_GUIDANCE.value,
    )
    options = generator.options(**settings)
    out = writable('--out', OUT.value or Path(WORKDIR.value) / 'samples')
    drawn = [int(label) for label in drawn]
    videos = generator(
        drawn if generator.class_names else None,
        num_videos=len(drawn),
        seed=SEED.value,
        batch_size=BATCH_SIZE.value,
        **settings,
    )
    scale = max(1, 128 // videos.shape[2])
    record = {'seed': SEED.value, **options, 'checkpoint_steps': generator.steps, 'videos': []}
    for i, (clip, label) in enumerate(zip(videos, drawn, strict=True)):
        name = f'{i:04d}.mp4'
        video.write(out / name, clip, fps=FPS.value, scale=scale)
        entry = {'file': name}
        if generator.class_names:
            entry |= {'label': label, 'class': generator.class_names[label]}
        record['videos'].append(entry)
    grid = video.grid(videos)
    video.write(out / 'grid.mp4', grid, fps=FPS.value, scale=scale)
    video.write(out / 'grid.gif', grid, fps=FPS.value, scale=scale)
    video.write_image(out / 'frames.png', video.filmstrip(videos), scale=scale)
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
