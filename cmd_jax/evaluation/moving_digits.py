"""Asked for by class: are generated moving digits the right ones, and do they move?

The protocol of the quickstart, for a run whose classes are the digits.
"""

import time

import numpy as np

from cmd_jax.errors import UserError
from cmd_jax.evaluation import digit_judge, panels, report, run
from cmd_jax.evaluation.distances import psnr

# What the quickstart promises: name -> (lowest, highest) accepted.
TARGETS = {
    'psnr': (24, None),
    'class_accuracy': (0.80, None),
    'classifier_real_accuracy': (0.95, None),
    'motion_ratio': (0.7, 1.3),
    'seconds': (None, 720),
    'memory_gb': (None, 4),
}

_MEANING = {
    'psnr': 'how closely the autoencoder gives held-out real clips back, in dB',
    'class_accuracy': 'how often a generated video shows the digit asked for, says a classifier',
    'classifier_real_accuracy': 'how often that classifier is right on held-out real clips',
    'motion_ratio': 'how far generated digits travel, compared with real ones',
    'seconds': 'training of all three stages, and this evaluation',
    'memory_gb': 'the most that training or this evaluation held, in GB',
}

_SHOWN, _SAMPLES, _ANIMATED, _MOTIONS, _MISSES = 24, 8, 4, 5, 12  # clips on the page, by section


def evaluate(
    generator,
    *,
    num_videos: int = 200,
    num_real: int = 500,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
) -> tuple[dict, dict]:
    """Measures a generator of moving digits against held-out real clips.

    Args:
      generator: what `cmd_jax.load` gives for a run trained on moving_digits.
      num_videos: generated videos, equally many of each digit.
      num_real: held-out clips, for PSNR, the judge's own accuracy and real motion.
      steps, guidance: as `Generator` takes them; None is what the run's config says.
      seed: of the samples, the held-out clips and the judge.

    Returns:
      numbers: flat; the keys of TARGETS, what they are made of, and the settings.
      pictures: what `sections` shows.

    Raises:
      UserError: num_videos is not a multiple of the ten digits, or the run is of other videos.
    """
    if num_videos < 10 or num_videos % 10:
        raise UserError(f'num_videos={num_videos} must be a positive multiple of 10, the digits')
    start = time.perf_counter()
    sizes = run.clip_sizes(generator, 'moving_digits', 'moving_digits')
    real, real_labels, _ = digit_judge.real_clips('test', num_real, seed=seed, **sizes)
    judge = digit_judge.DigitClassifier.train(seed=seed, **sizes)
    settings = {'seed': seed, 'steps': steps, 'guidance': guidance}

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

    digits, measured = digit_judge.measure(judge, generated, real, real_labels)
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
        **run.settings(generator, steps, guidance),
    }
    pictures = {
        'real': real[:_SHOWN],
        'reconstructed': reconstructed[:_SHOWN],
        'content': content,
        'animated': animated,
        'generated': generated,
        'labels': labels,
        'digits': digits,
    }
    return numbers, pictures


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
