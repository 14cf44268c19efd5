"""The judge of the quickstart: are generated moving digits the right ones, and do they move?

Digits make an honest judge cheap: a classifier that has seen only the training split's digit images
recognises held-out real clips nearly always, so what it says about generated clips can be trusted.
Nothing here looks at the generator: video goes in, numbers come out.
"""

import time

import numpy as np
from jaxtyping import Float, Int, UInt8
from scipy import ndimage, special
from sklearn import svm

from cmd_jax import video as video_lib
from cmd_jax.data.moving_digits import DIGIT_SHARE, MovingDigits
from cmd_jax.errors import UserError
from cmd_jax.evaluation import report
from cmd_jax.evaluation.distances import psnr
from cmd_jax.training.metrics import peak_memory_gb

# What the quickstart promises: name -> (lowest, highest) accepted.
TARGETS = {
    'psnr': (24, None),
    'class_accuracy': (0.80, None),
    'classifier_real_accuracy': (0.95, None),
    'motion_ratio': (0.7, 1.3),
    'seconds': (None, 720),
    'memory_gb': (None, 4),
}

_GRID = 16  # crops are classified at this many pixels a side
_MARGIN = 1.25  # side of a crop in digit sizes: room for a centroid off the box's centre
_FAINT = 0.35  # of a frame's peak; darker pixels are background, noise or blur
_CONTRAST = 0.1  # of full scale; a frame whose peak stands out less shows no digit

_MEANING = {
    'psnr': 'how closely the autoencoder gives held-out real clips back, in dB',
    'class_accuracy': 'how often a generated video shows the digit asked for, says a classifier',
    'classifier_real_accuracy': 'how often that classifier is right on held-out real clips',
    'motion_ratio': 'how far generated digits travel, compared with real ones',
    'seconds': 'training of all three stages, and this evaluation',
    'memory_gb': 'the most that training or this evaluation held, in GB',
}

_FPS = 8
_SHOWN, _SAMPLES, _ANIMATED, _MOTIONS, _MISSES = 24, 8, 4, 5, 12  # clips on the page, by section


class DigitClassifier:
    """Which digit does a clip show? A support vector machine on crops around the digit.

    Each frame is cropped about its brightness centroid and classified; a clip's scores are the mean
    over its frames, so one odd frame does not decide.
    """

    def __init__(self, machine: svm.SVC, side: float):
        self._machine = machine
        self._side = side

    @classmethod
    def train(
        cls,
        *,
        frames: int = 8,
        height: int = 32,
        width: int = 32,
        digit_size: int | None = None,
        seed: int = 0,
        clips: int = 3000,
    ) -> 'DigitClassifier':
        """Trains on `clips` clips of the training split, for videos of the given sizes.

        Half of the crops are blurred a little, as generated video is. Takes about two seconds.
        """
        rng = np.random.default_rng(seed)
        videos, labels = real_clips(
            'train',
            clips,
            seed=seed,
            frames=frames,
            height=height,
            width=width,
            digit_size=digit_size,
        )
        chosen = videos[np.arange(clips)[:, None], rng.integers(frames, size=(clips, 2))]
        for clip in chosen[: clips // 2]:
            blur = rng.uniform(0.3, 1.2)
            clip[:] = ndimage.gaussian_filter(clip, (0, blur, blur, 0))
        side = _MARGIN * (digit_size or DIGIT_SHARE * min(height, width))
        crops = _crops(_light(chosen), side).reshape(2 * clips, -1)
        machine = svm.SVC(C=3.0, gamma='scale', decision_function_shape='ovr')
        machine.fit(crops, np.repeat(labels, 2))
        return cls(machine, side)

    def __call__(
        self, videos: UInt8[np.ndarray, 'n t h w 3']
    ) -> tuple[Int[np.ndarray, 'n'], Float[np.ndarray, 'n']]:
        """The digit each clip shows, and the fraction of its frames that agree with the clip.

        The digit is -1 for a clip without any; a frame without a digit agrees with nothing.
        """
        n, t = videos.shape[:2]
        light = _light(videos)
        crops = _crops(light, self._side).reshape(n * t, -1)
        # Decision values grow by about one with each other digit that is beaten; sharpened so much,
        # a digit that comes second in every frame does not win the clip.
        scores = special.softmax(4 * self._machine.decision_function(crops), axis=-1)
        seen = light.any(axis=(2, 3))
        scores = scores.reshape(n, t, -1) * seen[..., None]
        frames = np.where(seen, scores.argmax(axis=-1), -1)
        clips = np.where(seen.any(axis=1), scores.mean(axis=1).argmax(axis=-1), -1)
        return clips, ((frames == clips[:, None]) & seen).mean(axis=1)


def motion(videos: UInt8[np.ndarray, 'n t h w 3']) -> Float[np.ndarray, 'n']:
    """The distance in pixels that each clip's digit travels: its centroid's path length.

    Steps into or out of a frame without a digit count as no travel, so flashing is not motion.
    """
    steps = np.diff(_centres(_light(videos)), axis=1)
    return np.nansum(np.linalg.norm(steps, axis=-1), axis=1)


def real_clips(
    split: str, count: int, *, seed: int = 0, **settings
) -> tuple[UInt8[np.ndarray, 'n t h w 3'], Int[np.ndarray, 'n']]:
    """The first `count` clips of a split, with their digits; settings as for MovingDigits."""
    source = MovingDigits(split=split, size=count, seed=seed, **settings)
    records = [source[i] for i in range(count)]
    videos = np.stack([record['video'] for record in records])
    return videos, np.array([record['label'] for record in records])


def _light(videos: UInt8[np.ndarray, 'n t h w 3']) -> Float[np.ndarray, 'n t h w']:
    """Brightness above each frame's background (its median), 1 at the frame's peak.

    The peak is the mean of the brightest hundredth, which one bad pixel cannot move. A frame
    without contrast is all 0.
    """
    gray = videos.mean(axis=-1, dtype=np.float32) / 255
    n, t, h, w = gray.shape
    pixels = np.sort(gray.reshape(n, t, -1), axis=-1)
    background = np.median(pixels, axis=-1)[..., None, None]
    peak = pixels[..., -max(1, h * w // 100) :].mean(axis=-1)[..., None, None] - background
    return np.where(peak > _CONTRAST, (gray - background).clip(0) / peak.clip(_CONTRAST), 0)


def _centres(light: Float[np.ndarray, 'n t h w']) -> Float[np.ndarray, 'n t 2']:
    """Centroid (y, x) of what is not faint, in pixels; NaN where a frame shows nothing."""
    weight = (light - _FAINT).clip(0)
    total = weight.sum(axis=(2, 3))
    y = np.einsum('nthw,h->nt', weight, np.arange(light.shape[2]))
    x = np.einsum('nthw,w->nt', weight, np.arange(light.shape[3]))
    return np.stack([y, x], axis=-1) / np.where(total > 0, total, np.nan)[..., None]


def _crops(light: Float[np.ndarray, 'n t h w'], side: float) -> Float[np.ndarray, 'n t g g']:
    """A window of `side` pixels about the digit, as _GRID x _GRID values."""
    n, t, h, w = light.shape
    middle = np.array([h - 1, w - 1]) / 2
    centres = _centres(light)
    centres = np.where(np.isnan(centres), middle, centres)
    # Averaging over about one grid cell first keeps thin strokes from falling between samples.
    soft = ndimage.gaussian_filter(light, (0, 0, *[0.4 * side / _GRID] * 2))
    offsets = ((np.arange(_GRID) + 0.5) / _GRID - 0.5) * side
    y, x = (centres[..., i, None] + offsets for i in (0, 1))
    frame = np.arange(n * t).reshape(n, t)[..., None, None]
    points = np.broadcast_arrays(frame, y[..., :, None], x[..., None, :])
    return ndimage.map_coordinates(soft.reshape(n * t, h, w), points, order=1, mode='constant')


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
    data = generator.config['autoencoder'].data
    if data.source != 'moving_digits':
        raise UserError(
            f'data.source={data.source!r} of this run: protocol=moving_digits judges digits only'
        )
    sizes = {name: getattr(data, name) for name in ('frames', 'height', 'width')}
    real, real_labels = real_clips('test', num_real, seed=seed, **sizes)
    judge = DigitClassifier.train(seed=seed, **sizes)
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

    real_digits, real_consistency = judge(real)
    digits, consistency = judge(generated)
    real_motion, generated_motion = motion(real).mean(), motion(generated).mean()
    cost = generator.cost | {
        'evaluation': {'seconds': time.perf_counter() - start, 'memory_gb': peak_memory_gb()}
    }
    # A run without the cost of every stage has no total: a partial sum would flatter it.
    complete = all(cost.values()) and set(generator.steps) <= set(cost)
    used = {'seed': seed}
    for stage in ('content', 'motion'):
        default = getattr(generator.config[stage], stage).sampling
        used[f'steps_{stage}'] = steps or default.steps
        used[f'guidance_{stage}'] = default.guidance if guidance is None else guidance
    numbers = {
        'psnr': psnr(real, reconstructed),
        'class_accuracy': (digits == labels).mean(),
        'classifier_real_accuracy': (real_digits == real_labels).mean(),
        'motion_ratio': generated_motion / real_motion,
        'seconds': sum(c['seconds'] for c in cost.values()) if complete else None,
        'memory_gb': max(c['memory_gb'] for c in cost.values()) if complete else None,
        'frame_consistency': consistency.mean(),
        'frame_consistency_real': real_consistency.mean(),
        'motion_pixels': generated_motion,
        'motion_pixels_real': real_motion,
        'seconds_sampling': sampling,
        **{f'seconds_{name}': c['seconds'] for name, c in cost.items() if c},
        'num_videos': num_videos,
        'num_real': num_real,
        **used,
        **{f'checkpoint_{stage}': step for stage, step in generator.steps.items()},
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
    table = report.check(numbers, TARGETS)
    real, generated = pictures['real'], pictures['generated']
    labels, digits = pictures['labels'], pictures['digits']
    frames = real.shape[1]
    by_class = [generated[labels == digit] for digit in range(10)]
    found = [(digits[labels == digit] == digit) for digit in range(10)]
    missed = np.flatnonzero(digits != labels)
    read = [f'read as {digit}' if digit >= 0 else 'no digit seen' for digit in digits]
    rows = [(f'{name}\n{_MEANING[name]}', *row) for name, *row in table.rows]
    return [
        report.Section(
            heading=report.verdict(table),
            text='A video generator was trained from nothing on short clips of handwritten digits '
            'that move and bounce, and then asked for '
            f'{numbers["num_videos"]} new ones. Measured against {numbers["num_real"]} real clips '
            'of digits it has never seen:',
            table=report.Table(columns=table.columns, rows=rows),
        ),
        report.Section(
            heading='Real clips and their reconstructions',
            text='Clips the autoencoder has never seen, of handwritten digits kept out of '
            'training; and the same clips after being compressed to one content frame and a small '
            'motion latent, and decoded again. The two should look alike.',
            figures=[
                _clips(real, 6, 'Real, held out'),
                _clips(pictures['reconstructed'], 6, 'Reconstructed'),
            ],
            width=320,
        ),
        report.Section(
            heading='Content frames',
            text='The encoder sums a clip up in one image: a weighted mean of its frames, with '
            'weights it has learned. What moved is smeared or chosen from one frame; the motion '
            'latent holds the rest.',
            figures=[
                _stills(
                    np.concatenate([pictures['content'][i : i + 4, None], real[i : i + 4]], axis=1),
                    'First column: the content frame. Then the frames it stands for.',
                )
                for i in (0, 4)
            ],
            width=320,
        ),
        report.Section(
            heading='New videos, asked for by class',
            text='Nothing here is a recording. For each digit a content frame was generated from '
            'noise, then a motion for it, then the two were decoded.',
            figures=[
                _clips(
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
                _stills(
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
                _clips(
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
                _clips(generated[i : i + 1], 1, f'asked for {labels[i]}, {read[i]}')
                for i in missed[:_MISSES]
            ],
            width=130,
        ),
    ]


def _clips(videos: UInt8[np.ndarray, 'n t h w 3'], columns: int, caption: str) -> report.Figure:
    """Clips side by side, all playing."""
    uri = video_lib.data_uri(video_lib.grid(videos, columns=columns), fps=_FPS, scale=2)
    return report.Figure(uri=uri, caption=caption, alt=f'{caption} ({len(videos)} playing)')


def _stills(videos: UInt8[np.ndarray, 'n t h w 3'], caption: str) -> report.Figure:
    """A row of stills for each clip."""
    n, t = videos.shape[:2]
    uri = video_lib.data_uri(video_lib.filmstrip(videos), scale=2)
    return report.Figure(uri=uri, caption=caption, alt=f'{caption} ({n} rows of {t} stills)')
