"""Samples new videos from a run.

    python sample.py --workdir=runs/ucf101 --labels=3,17 --num_videos=8 --steps=50 --guidance=4
    python sample.py --workdir=runs/t2v --prompt="a teddy bear skating in Times Square"
    python sample.py --workdir=runs/t2v --image=picture.jpg --prompt="waves on a beach"
    python sample.py --config=configs/text_to_video.py:sd21,all --compile_for=v5e:1x1

Writes to --out: one mp4 a video, grid.mp4, grid.gif, frames.png (a row a video) and samples.json.
The fourth command needs no run and writes none of them: it compiles for a TPU that is not here, and
tells what sampling takes.
"""

import dataclasses
import json
import math
from pathlib import Path

from absl import flags, logging
from ml_collections import config_flags

from cmd_jax import atomic, cli
from cmd_jax.errors import UserError, writable

WORKDIR = flags.DEFINE_string('workdir', None, 'The run: where train.py wrote')
OUT = flags.DEFINE_string('out', None, 'Folder of the videos; default WORKDIR/samples')
LABELS = flags.DEFINE_list('labels', None, 'Classes, by number or name; default: the first ones')
PROMPT = flags.DEFINE_multi_string('prompt', None, 'For runs on text; may be given several times')
NEGATIVE_PROMPT = flags.DEFINE_string('negative_prompt', '', 'What guidance leads away from')
IMAGE = flags.DEFINE_string('image', None, 'A picture to animate, as the content frame')
NUM_VIDEOS = flags.DEFINE_integer(
    'num_videos', None, 'Default: one a label or prompt, or 8', lower_bound=1
)
SEED = flags.DEFINE_integer('seed', 0, 'The same seed gives the same videos')
# What is left out is of the config.
SAMPLING = (
    flags.DEFINE_string('sampler', None, 'ddim, ddpm, dpmpp_2m or unipc'),
    flags.DEFINE_integer('steps', None, 'Network evaluations', lower_bound=1),
    flags.DEFINE_string('spacing', None, 'Of the timesteps: leading, trailing or linspace'),
    flags.DEFINE_float('guidance', None, 'Scale; 1: none'),
    flags.DEFINE_integer('motion_steps', None, 'Default: --steps', lower_bound=1),
    flags.DEFINE_float('motion_guidance', None, 'Default: --guidance'),
    flags.DEFINE_float('guidance_rescale', None, 'How much of its contrast is taken away, 0..1'),
    flags.DEFINE_float(
        'guidance_start', None, 'Where on the way from noise (0) to data (1) guidance begins'
    ),
    flags.DEFINE_float(
        'guidance_end', None, 'Where on the way from noise (0) to data (1) guidance ends'
    ),
)
STABLE_DIFFUSION = flags.DEFINE_string(
    'stable_diffusion', None, 'Folder of the pretrained image model, if it has moved'
)
TEXT_ENCODER = flags.DEFINE_string(
    'text_encoder', None, "Folder of the motion stage's own text encoder, if it has moved"
)
BATCH_SIZE = flags.DEFINE_integer('batch_size', 16, 'Videos at a time', lower_bound=1)
CONFIG = config_flags.DEFINE_config_file('config', None, 'With --compile_for, in place of a run')
COMPILE_FOR = flags.DEFINE_list(
    'compile_for',
    None,
    'Only compile, for TPU slices such as v5e:1x1,v5e:2x2, and tell what a batch of --num_videos '
    '(default 1) costs there',
)
COMPILER_SEARCH = flags.DEFINE_bool(
    'compiler_search', False, 'With --compile_for: with the search for the fastest program'
)
COMPILE_REPORT = flags.DEFINE_string('compile_report', None, 'With --compile_for: a JSON file')
FPS = flags.DEFINE_integer('fps', 8, 'Frames per second of the files', lower_bound=1)

cli.compilation_cache_flag()


def main():
    cli.only_with('compile_for', 'config', 'compiler_search', 'compile_report')
    if COMPILE_FOR.value:
        compile_only()
        return
    if not WORKDIR.value:
        raise UserError('--workdir is missing: for example --workdir=runs/quickstart')
    import cmd_jax
    from cmd_jax import video

    moved = dict(stable_diffusion=STABLE_DIFFUSION.value, text_encoder=TEXT_ENCODER.value)
    generator = cmd_jax.load(WORKDIR.value, **moved)
    about = drawn(generator)
    settings = {flag.name: flag.value for flag in SAMPLING}
    if IMAGE.value:
        options = generator.animation_options(bool(about[0]), **settings)
    else:
        options = generator.options(**settings)
    out = writable('--out', OUT.value or Path(WORKDIR.value) / 'samples')
    common = dict(
        negative_prompt=NEGATIVE_PROMPT.value, seed=SEED.value, batch_size=BATCH_SIZE.value
    )
    if IMAGE.value:
        image = video.read(IMAGE.value, count=1)[0]
        videos = generator.animate(
            image=image,
            n=len(about),
            label=about[0].get('label'),
            prompt=about[0].get('prompt'),
            **settings,
            **common,
        )
    else:
        labels = [entry['label'] for entry in about] if generator.class_names else None
        prompts = [entry['prompt'] for entry in about] if generator.text else None
        videos = generator(labels, prompt=prompts, num_videos=len(about), **settings, **common)
    scale = max(1, 128 // videos.shape[2])
    used = {stage: dataclasses.asdict(asked['sampling']) for stage, asked in options.items()}
    record = {'seed': SEED.value, **used, 'checkpoint_steps': generator.steps, 'videos': []}
    if generator.text:
        record['negative_prompt'] = NEGATIVE_PROMPT.value
    if IMAGE.value:
        record['image'] = IMAGE.value
    for i, (clip, entry) in enumerate(zip(videos, about, strict=True)):
        name = f'{i:04d}.mp4'
        video.write(out / name, clip, fps=FPS.value, scale=scale)
        record['videos'].append({'file': name} | entry)
    grid = video.grid(videos)
    video.write(out / 'grid.mp4', grid, fps=FPS.value, scale=scale)
    video.write(out / 'grid.gif', grid, fps=FPS.value, scale=scale)
    video.write_image(out / 'frames.png', video.filmstrip(videos), scale=scale)
    atomic.write(out / 'samples.json', json.dumps(record, indent=2) + '\n')
    logging.info('%d videos in %s', len(videos), out)


def compile_only():
    """Tells what sampling costs on machines that are not here."""
    from cmd_jax.training import compile_sampler, config, trained

    classes = None
    if CONFIG.value is not None:
        found = config.parse(CONFIG.value.to_dict())
    elif WORKDIR.value:
        folder = Path(WORKDIR.value) / 'motion'
        if not (folder / 'inputs.json').exists():
            raise UserError(f'--workdir={WORKDIR.value} has no motion stage: or give --config')
        found = config.load(folder / 'config.json')
        classes = len(trained.read_inputs(folder).class_names)
    else:
        raise UserError('--compile_for needs --config=configs/NAME.py:all or a --workdir')
    compile_sampler.run(
        found,
        COMPILE_FOR.value,
        # All at a time, where nothing else is asked for: a batch is a multiple of the chips.
        min(NUM_VIDEOS.value or 1, BATCH_SIZE.value if BATCH_SIZE.present else math.inf),
        classes=classes,
        options={flag.name: flag.value for flag in SAMPLING},
        search=COMPILER_SEARCH.value,
        out=COMPILE_REPORT.value,
    )


def drawn(generator) -> list[dict]:
    """What is asked for, video by video: {'prompt'}, {'label', 'class'} or nothing."""
    from cmd_jax.conditions import check_prompts

    asked = PROMPT.value if generator.text else LABELS.value
    count = NUM_VIDEOS.value or len(asked or ()) or 8
    if IMAGE.value and len(asked or ()) > 1:
        raise UserError('--image: one picture takes one prompt or label')
    if generator.text:
        if LABELS.value:
            raise UserError('--labels: this run takes --prompt instead')
    elif PROMPT.value or NEGATIVE_PROMPT.value:
        raise UserError('--prompt: this run is not conditioned on text')
    if IMAGE.value and not asked:
        return [{}] * count
    if generator.text:
        return [{'prompt': prompt} for prompt in check_prompts(PROMPT.value, count)]
    labels = asked and [number(label, generator.class_names) for label in asked]
    labels = [int(label) for label in generator.check_labels(labels, count)]
    if not generator.class_names:
        return [{}] * len(labels)
    return [{'label': label, 'class': generator.class_names[label]} for label in labels]


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
