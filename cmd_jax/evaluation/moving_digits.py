"""Asked for by class: are generated moving digits the right ones, and do they move?

The protocol of the quickstart, for a run whose classes are the digits.
"""

import functools
import time

import jax
import numpy as np
from jaxtyping import UInt8

from cmd_jax.errors import UserError
from cmd_jax.evaluation import (
    digit_judge,
    features,
    intervals,
    measure,
    pages,
    panels,
    report,
    run,
)
from cmd_jax.evaluation.distances import psnr
from cmd_jax.evaluation.networks import i3d

# What the quickstart promises: name -> (lowest, highest) accepted.
TARGETS = {
    'psnr': (24, None),
    'class_accuracy': (0.80, None),
    'classifier_real_accuracy': (0.95, None),
    'motion_ratio': (0.7, 1.3),
    'motion_prediction_ratio': (1, None),
    'generation_ratio': (1, None),
    'seconds': (None, 720),
    'memory_gb': (None, 4),
}

_MEANING = {
    'psnr': 'how closely the autoencoder gives held-out real clips back, in dB',
    'class_accuracy': 'how often a generated video shows the digit asked for, says a classifier',
    'classifier_real_accuracy': 'how often that classifier is right on held-out real clips',
    'motion_ratio': 'how far generated digits travel, compared with real ones',
    'motion_prediction_ratio': 'Frechet distance to real clips, of their content frames with '
    'generated motion over that of their reconstructions',
    'generation_ratio': 'the same, of generated videos over that of generated motion',
    'seconds': 'training of all three stages, and this evaluation',
    'memory_gb': 'the most that training or this evaluation held, in GB',
}

# What the ablation compares: clips of each kind, seen by I3D at so many pixels a side. FVD has
# 2,048 and 224, which would take longer than the training.
_COMPARED, _SIZE = 200, 112

_SHOWN, _SAMPLES, _ANIMATED, _MOTIONS, _MISSES = 24, 8, 4, 5, 12  # clips on the page, by section


def evaluate(
    generator,
    *,
    num_videos: int = 200,
    num_real: int = 500,
    seed: int = 0,
    **options,
) -> tuple[dict, dict]:
    """Measures a generator of moving digits against held-out real clips.

    Args:
      generator: what `cmd_jax.load` gives for a run trained on moving_digits.
      num_videos: generated videos, equally many of each digit.
      num_real: held-out clips, for PSNR, the judge's own accuracy and real motion.
      seed: of the samples, the held-out clips and the judge.
      options: of sampling, as `Generator` takes them; else as the run's config says.

    Returns:
      numbers: flat; the keys of TARGETS, what they are made of, and the settings.
      pictures: what `sections` shows.

    Raises:
      UserError: num_videos is not a multiple of the ten digits, or the run is of other videos.
    """
    if num_videos < 10 or num_videos % 10:
        raise UserError(f'num_videos={num_videos} must be a positive multiple of 10, the digits')
    i3d.weights()  # or say now that they are not installed
    start = time.perf_counter()
    sizes = run.clip_sizes(generator, 'moving_digits', 'moving_digits')
    if generator.config['content'].condition == 'text':
        raise UserError(
            "condition='text' of this run: protocol=moving_digits asks for classes, use "
            'protocol=prompted_digits'
        )
    real, real_labels, _ = digit_judge.real_clips('test', num_real, seed=seed, **sizes)
    judge = digit_judge.DigitClassifier.train(seed=seed, **sizes)
    settings = {'seed': seed} | options

    reconstructed = generator.reconstruct(real)
    labels = np.arange(num_videos) % 10
    sampling = time.perf_counter()
    generated = generator(labels=labels.tolist(), **settings)
    sampling = time.perf_counter() - sampling
    content = generator.content_frames(real[:_SHOWN])
    animated = [
        generator.animate(content=content[i], label=int(real_labels[i]), n=_MOTIONS, **settings)
        for i in range(_ANIMATED)
    ]

    count = min(_COMPARED, num_videos, num_real)
    predicted = generator.predict_motion(real[:count], real_labels[:count].tolist(), **settings)
    parts = {
        'reconstruction': reconstructed[:count],
        'motion_prediction': predicted,
        'generation': generated[:count],
    }

    digits, measured = digit_judge.measure(judge, generated, real, real_labels)
    measured |= ablation(real[:count], parts, generator.mesh, seed)
    cost = run.cost(generator, start)
    trained = cost['seconds_training']
    numbers = {
        'psnr': psnr(real, reconstructed),
        'class_accuracy': (digits == labels).mean(),
        **measured,
        'seconds': None if trained is None else trained + cost['seconds_evaluation'],
        **cost,
        'seconds_sampling': sampling,
        'num_videos': num_videos,
        'num_real': num_real,
        'seed': seed,
        **run.settings(generator, **options),
    }
    pictures = {
        'real': real[:_SHOWN],
        'reconstructed': reconstructed[:_SHOWN],
        'content': content,
        'animated': animated,
        'predicted': predicted,
        'generated': generated,
        'labels': labels,
        'digits': digits,
    }
    return numbers, pictures


def ablation(
    real: UInt8[np.ndarray, 'n t h w 3'],
    parts: dict[str, UInt8[np.ndarray, 'm t h w 3']],
    mesh: jax.sharding.Mesh,
    seed: int,
) -> dict[str, float]:
    """Frechet and kernel distances of I3D's features between real clips and what stands in their
    place, with intervals: what each part of the model costs (paper, table 4a)."""
    logits = functools.partial(features.i3d_logits, size=_SIZE, batch_size=16, mesh=mesh)
    wanted, numbers = logits(real), {'compared': len(real), 'i3d_size': _SIZE}
    for part, videos in parts.items():
        found = logits(videos)
        estimates = {
            'frechet': intervals.frechet(wanted, found, seed),
            'kernel': intervals.kernel(wanted, found, seed),
        }
        numbers |= measure.flat(part, estimates)
    distances = [numbers[f'{part}_frechet'] for part in parts]
    numbers['motion_prediction_ratio'] = distances[1] / distances[0]
    numbers['generation_ratio'] = distances[2] / distances[1]
    return numbers


def sections(numbers: dict, pictures: dict) -> list[report.Section]:
    """The page's sections, from what `evaluate` returned."""
    real, generated = pictures['real'], pictures['generated']
    labels, digits = pictures['labels'], pictures['digits']
    frames = real.shape[1]
    by_class = [generated[labels == digit] for digit in range(10)]
    found = [(digits[labels == digit] == digit) for digit in range(10)]
    missed = np.flatnonzero(digits != labels)
    read = [f'read as {digit}' if digit >= 0 else 'no digit seen' for digit in digits]
    return [
        panels.outcome(
            numbers,
            TARGETS,
            _MEANING,
            'A video generator was trained from nothing on short clips of handwritten digits '
            'that move and bounce, and then asked for '
            f'{numbers["num_videos"]} new ones. Measured against {numbers["num_real"]} real clips '
            'of digits it has never seen:',
        ),
        panels.reconstructions(real, pictures['reconstructed']),
        panels.content_frames(pictures['content'], real),
        report.Section(
            heading='New videos, asked for by class',
            text='Nothing here is a recording. For each digit a content frame was generated from '
            'noise, then a motion for it, then the two were decoded.',
            figures=[
                panels.clips(
                    by_class[digit][:_SAMPLES],
                    4,
                    f'Asked for {digit}: {found[digit].sum()} of {len(found[digit])} recognised',
                )
                for digit in range(10)
            ],
            width=150,
        ),
        report.Section(
            heading='What each part costs',
            text=f'{numbers["compared"]} real clips against what the autoencoder makes of them, '
            'against their own content frames with generated motion, and against generated videos: '
            f'distances of what I3D sees at {numbers["i3d_size"]} pixels a side, with 95 % '
            'intervals. They are not FVD, which takes 2,048 clips and more pixels, and comparable '
            'only with each other.',
            table=report.Table(
                columns=('instead of real clips', 'Frechet distance', 'kernel distance'),
                rows=[
                    (
                        title,
                        *(pages.interval(numbers, f'{part}_{x}') for x in ('frechet', 'kernel')),
                    )
                    for part, title in pages.TITLES.items()
                    if part != 'real'
                ],
            ),
            figures=[
                panels.clips(real, 6, 'Real, held out'),
                panels.clips(pictures['predicted'][:_SHOWN], 6, pages.TITLES['motion_prediction']),
            ],
            width=320,
        ),
        report.Section(
            heading='Frame by frame',
            text='The first generated video of each digit. A good one keeps its digit and moves it '
            'evenly.',
            figures=[
                panels.stills(
                    np.stack([by_class[digit][0] for digit in half]),
                    f'Generated {half[0]} to {half[-1]}, frame 1 to {frames} from left to right',
                )
                for half in (range(5), range(5, 10))
            ],
            width=320,
        ),
        report.Section(
            heading='One content frame, several motions',
            text='The content frame is kept (first clip, standing still) and only the motion is '
            'drawn again: same digit, other ways to go.',
            figures=[
                panels.clips(
                    np.concatenate([np.repeat(content[None, None], frames, axis=1), motions]),
                    3,
                    f'Content frame {i + 1} and {len(motions)} motions',
                )
                for i, (content, motions) in enumerate(
                    zip(pictures['content'], pictures['animated'], strict=False)
                )
            ],
            width=200,
        ),
        report.Section(
            heading='Where it failed',
            text=f'{len(missed)} of {len(labels)} generated videos were not recognised as the '
            f'digit asked for. The first {_MISSES} at most are shown.',
            figures=[
                panels.clips(generated[i : i + 1], 1, f'asked for {labels[i]}, {read[i]}')
                for i in missed[:_MISSES]
            ],
            width=130,
        ),
    ]
