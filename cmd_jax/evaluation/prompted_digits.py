"""Asked for in words: does a moving digit's video show the digit of its prompt, going that way?

The protocol of a text-to-video run on moving digits. Prompts are the captions that it was trained
on: each of ten digits in each of eight directions.
"""

import time

import numpy as np
from jaxtyping import Int

from cmd_jax.data.moving_digits import CLASS_NAMES, DIRECTIONS, caption
from cmd_jax.errors import UserError
from cmd_jax.evaluation import digit_judge, panels, report, run
from cmd_jax.evaluation.distances import psnr

# What a run must reach: name -> (lowest, highest) accepted.
TARGETS = {
    'digit_accuracy': (0.70, None),
    'direction_agreement': (0.70, None),
    'classifier_real_accuracy': (0.95, None),
    'direction_real_agreement': (0.90, None),
    'negative_prompt_changes': (1, None),
    'seconds': (None, 900),
}

_MEANING = {
    'digit_accuracy': 'how often a video shows the digit of its prompt, says a classifier',
    'direction_agreement': 'how often it sets out in the direction of its prompt, one of eight',
    'classifier_real_accuracy': 'how often that classifier is right on held-out real clips',
    'direction_real_agreement': 'how often the direction measured on those is the one of their '
    'caption: what a perfect generator could reach',
    'negative_prompt_changes': 'mean difference of pixels (0 to 255) that a negative prompt makes '
    'to videos of the same prompts and noise',
    'seconds': 'training of all stages',
}

_COMPARED = 8  # prompts that are sampled again with a negative prompt, and without guidance
_NEGATIVE = caption(9, 4)  # no digit of the first prompts
_SHOWN, _SAMPLES, _STRIPS, _MISSES = 24, 4, 10, 12  # clips on the page, by section


def evaluate(
    generator,
    *,
    num_videos: int = 160,
    num_real: int = 500,
    seed: int = 0,
    **options,
) -> tuple[dict, dict]:
    """Measures a text-to-video generator of moving digits against held-out real clips.

    Args:
      generator: what `cmd_jax.load` gives for a run with text, trained on moving_digits.
      num_videos: generated videos, equally many of each of the 80 prompts.
      num_real: held-out clips, for PSNR, what the judge makes of them, and real motion.
      seed: of the samples, the held-out clips, the judge and the control.
      options: of sampling, as `Generator` takes them; else as the run's config says.

    Returns:
      numbers: flat; the keys of TARGETS, what they are made of, and the settings.
      pictures: what `sections` shows.

    Raises:
      UserError: num_videos is not a multiple of 80, or the run is of other videos or without text.
    """
    pairs = len(CLASS_NAMES) * len(DIRECTIONS)
    if num_videos < pairs or num_videos % pairs:
        raise UserError(
            f'num_videos={num_videos} must be a positive multiple of {pairs}, '
            'ten digits in eight directions'
        )
    start = time.perf_counter()
    sizes = run.clip_sizes(generator, 'moving_digits', 'prompted_digits')
    condition = generator.config['content'].condition
    if condition != 'text':
        raise UserError(
            f'condition={condition!r} of this run: protocol=prompted_digits prompts with text, '
            'use protocol=moving_digits'
        )
    real, real_labels, real_directions = digit_judge.real_clips(
        'test', num_real, seed=seed, **sizes
    )
    judge = digit_judge.DigitClassifier.train(seed=seed, **sizes)
    settings = {'seed': seed} | options
    labels, directions = asked(num_videos)
    prompts = [caption(*pair) for pair in zip(labels.tolist(), directions.tolist())]

    # First what can be refused: it takes a moment, the rest minutes.
    few = prompts[:_COMPARED]
    negative = generator(prompt=few, negative_prompt=_NEGATIVE, **settings)
    unguided = generator(prompt=few, **settings | {'guidance': 1.0, 'motion_guidance': None})
    reconstructed = generator.reconstruct(real)
    sampling = time.perf_counter()
    generated = generator(prompt=prompts, **settings)
    sampling = time.perf_counter() - sampling
    content = generator.content_frames(real[:_SHOWN])

    digits, measured = digit_judge.measure(judge, generated, real, real_labels)
    headings = digit_judge.direction(generated)
    right_digit, right_way = digits == labels, headings == directions
    turned = (headings - directions) % len(DIRECTIONS)
    # The control: every video is compared with the prompt of another, drawn at random.
    order = np.random.default_rng(seed).permutation(num_videos)
    other = np.empty(num_videos, int)
    other[order] = np.roll(order, 1)
    # Video i of a seed starts from the same noise however many are asked for: these differ by the
    # negative prompt only.
    changes = np.abs(negative.astype(np.int16) - generated[:_COMPARED])
    cost = run.cost(generator, start)
    numbers = {
        'digit_accuracy': right_digit.mean(),
        'direction_agreement': right_way.mean(),
        'direction_within_45': (np.isin(turned, (0, 1, 7)) & (headings >= 0)).mean(),
        'both_right': (right_digit & right_way).mean(),
        'digit_accuracy_other': (digits == labels[other]).mean(),
        'direction_agreement_other': (headings == directions[other]).mean(),
        'digit_reconstructed_accuracy': (judge(reconstructed)[0] == real_labels).mean(),
        'direction_real_agreement': (digit_judge.direction(real) == real_directions).mean(),
        'direction_reconstructed_agreement': (
            digit_judge.direction(reconstructed) == real_directions
        ).mean(),
        'negative_prompt_changes': changes.mean(),
        **measured,
        'psnr': psnr(real, reconstructed),
        'seconds': cost['seconds_training'],
        **cost,
        'seconds_sampling': sampling,
        'num_videos': num_videos,
        'num_real': num_real,
        'negative_prompt': _NEGATIVE,
        'seed': seed,
        **run.settings(generator, **options),
    }
    pictures = {
        'real': real[:_SHOWN],
        'reconstructed': reconstructed[:_SHOWN],
        'content': content,
        'generated': generated,
        'negative': negative,
        'unguided': unguided,
        'prompts': prompts,
        'labels': labels,
        'directions': directions,
        'digits': digits,
        'headings': headings,
    }
    return numbers, pictures


def asked(num_videos: int) -> tuple[Int[np.ndarray, 'n'], Int[np.ndarray, 'n']]:
    """The digit and the direction of each prompt: all 80 pairs, again and again, in an order that
    brings ten digits and eight directions early."""
    i = np.arange(num_videos)
    return i % len(CLASS_NAMES), (i + i // len(CLASS_NAMES)) % len(DIRECTIONS)


def sections(numbers: dict, pictures: dict) -> list[report.Section]:
    """The page's sections, from what `evaluate` returned."""
    real, generated, prompts = (pictures[name] for name in ('real', 'generated', 'prompts'))
    labels, directions = pictures['labels'], pictures['directions']
    right_digit, right_way = pictures['digits'] == labels, pictures['headings'] == directions
    missed = np.flatnonzero(~(right_digit & right_way))
    read = [_read(*pair) for pair in zip(pictures['digits'], pictures['headings'])]
    samples = [
        [i for i, other in enumerate(prompts) if other == prompt][:_SAMPLES]
        for prompt in prompts[:_STRIPS]
    ]
    guidance = f'{report.text(numbers["guidance_content"])} for content frames, '
    guidance += f'{report.text(numbers["guidance_motion"])} for motion'
    compared = [
        (generated[:_COMPARED], 'As prompted'),
        (pictures['unguided'], 'Without guidance (1)'),
        (pictures['negative'], f'With the negative prompt "{numbers["negative_prompt"]}"'),
    ]
    return [
        panels.outcome(
            numbers,
            TARGETS,
            _MEANING,
            'A text-to-video generator was trained on short captioned clips of handwritten digits '
            'that move and bounce, and then prompted for '
            f'{numbers["num_videos"]} new ones: each of ten digits in each of eight directions. '
            f'Digit and direction are both right in {numbers["both_right"]:.0%} of them; the '
            f'direction is at most 45 degrees off in {numbers["direction_within_45"]:.0%}. '
            'Chance, measured by comparing each video with the prompt of another: '
            f'{numbers["digit_accuracy_other"]:.0%} of the digits and '
            f'{numbers["direction_agreement_other"]:.0%} of the directions. '
            f'{numbers["num_real"]} real clips, of digits it has never seen, say how far the '
            'measuring can be trusted.',
        ),
        panels.reconstructions(real, pictures['reconstructed']),
        panels.content_frames(pictures['content'], real),
        report.Section(
            heading='New videos, asked for in words',
            text='Nothing here is a recording. For each prompt a content frame was generated from '
            'noise, then a motion for it, then the two were decoded. Below: the prompt, and what '
            'was read off its videos.',
            figures=[
                panels.clips(
                    generated[same],
                    2,
                    f'"{prompts[same[0]]}" read as: {"; ".join(read[i] for i in same)}',
                )
                for same in samples
            ],
            width=150,
        ),
        report.Section(
            heading='Every digit in every direction',
            text='The first video of each prompt. A digit counts as moving in the direction that '
            'it sets out in; it may bounce off a wall in the second half of the clip.',
            figures=[
                panels.clips(
                    np.stack([generated[(labels == d) & way][0] for d in range(len(CLASS_NAMES))]),
                    5,
                    f'"... moving {name}": {right_digit[way].sum()} digits and '
                    f'{right_way[way].sum()} directions of {way.sum()} as asked',
                )
                for name, way in zip(DIRECTIONS, np.arange(len(DIRECTIONS))[:, None] == directions)
            ],
            width=250,
        ),
        report.Section(
            heading='Frame by frame',
            text='A good video keeps its digit and moves it evenly.',
            figures=[
                panels.stills(
                    np.stack([generated[i] for i in half]),
                    f'From top to bottom: {", ".join(prompts[i] for i in half)}',
                )
                for half in (range(_STRIPS // 2), range(_STRIPS // 2, _STRIPS))
            ],
            width=320,
        ),
        report.Section(
            heading='The same noise, steered in other ways',
            text=f'The first {_COMPARED} prompts from the same noise: as prompted (guidance '
            f'{guidance}), without guidance, and steered away from a negative prompt. That changes '
            f'a pixel by {report.text(numbers["negative_prompt_changes"])} of 255 on average.',
            figures=[panels.clips(videos, 4, said) for videos, said in compared],
            width=250,
        ),
        report.Section(
            heading='Where it failed',
            text=f'Of {len(labels)} generated videos {(~right_digit).sum()} were not recognised as '
            f'the digit of their prompt, {(~right_way).sum()} did not set out in its direction. '
            f'The first {_MISSES} at most are shown.',
            figures=[
                panels.clips(generated[i : i + 1], 1, f'"{prompts[i]}" read as: {read[i]}')
                for i in missed[:_MISSES]
            ],
            width=130,
        ),
    ]


def _read(digit, direction):
    """What was read off a video, in words."""
    what = CLASS_NAMES[digit] if digit >= 0 else 'no digit'
    return f'{what}, {DIRECTIONS[direction] if direction >= 0 else "not moving"}'
