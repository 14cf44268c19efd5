import functools
import json
import math
import types

import numpy as np
import pytest
from scipy import ndimage

from cmd_jax.errors import UserError
from cmd_jax.evaluation import moving_digits, report
from cmd_jax.evaluation.distances import psnr

SIZES = {'frames': 8, 'height': 32, 'width': 32}


@functools.cache
def judge():
    return moving_digits.DigitClassifier.train(**SIZES)


@functools.cache
def held_out():
    return moving_digits.real_clips('test', 500, seed=7, **SIZES)


def blob(path, size=32, sigma=2.5, peak=230):
    """A clip of one bright spot whose centre follows `path`, (y, x) pixels per frame."""
    rows, columns = np.mgrid[:size, :size]
    frames = [
        peak * np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * sigma**2)) for y, x in path
    ]
    return np.repeat(np.stack(frames)[..., None], 3, axis=-1).round().astype(np.uint8)


def line(speed, angle, steps=8, start=(14, 13)):
    step = speed * np.array([np.sin(angle), np.cos(angle)])
    return np.array(start) + np.arange(steps)[:, None] * step


def test_judge_knows_handwriting_it_has_not_seen():
    videos, labels = held_out()
    digits, consistency = judge()(videos)
    assert (digits == labels).mean() >= 0.98
    assert consistency.mean() >= 0.98
    # Every class: an accuracy from nine digits alone would reach 0.9.
    assert min((digits[labels == digit] == digit).mean() for digit in range(10)) >= 0.9


def test_judge_bears_the_softness_and_grain_of_generated_video():
    videos, labels = held_out()
    soft = ndimage.gaussian_filter(videos.astype(np.float32), (0, 0, 1, 1, 0))
    soft += np.random.default_rng(0).normal(0, 12, soft.shape)
    digits, _ = judge()(soft.round().clip(0, 255).astype(np.uint8))
    assert (digits == labels).mean() >= 0.95


def test_judge_gives_nothing_away():
    videos, labels = held_out()
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, videos.shape).astype(np.uint8)
    assert (judge()(noise)[0] == labels).mean() < 0.25
    assert (judge()(videos)[0] == rng.permutation(labels)).mean() < 0.25
    # Pixels of a digit in random order keep its brightness and lose its shape.
    order = rng.permutation(32 * 32)
    scrambled = videos.reshape(500, 8, -1, 3)[:, :, order].reshape(videos.shape)
    assert (judge()(scrambled)[0] == labels).mean() < 0.25


def test_blank_clips_show_no_digit():
    for level in (0, 128, 255):
        digits, consistency = judge()(np.full((2, 8, 32, 32, 3), level, np.uint8))
        assert digits.tolist() == [-1, -1] and consistency.tolist() == [0, 0]


def test_a_clip_of_two_digits_is_judged_by_its_average():
    videos, labels = held_out()
    three = videos[np.flatnonzero(labels == 3)[:20]]
    seven = videos[np.flatnonzero(labels == 7)[:20]]
    digits, consistency = judge()(np.concatenate([three[:, :6], seven[:, :2]], axis=1))
    assert (digits == 3).mean() >= 0.9
    assert np.median(consistency) == 6 / 8
    digits, _ = judge()(np.concatenate([three[:, :2], seven[:, :6]], axis=1))
    assert (digits == 7).mean() >= 0.9


def test_frames_without_a_digit_lower_consistency_only():
    videos, labels = held_out()
    half = videos[:50].copy()
    half[:, 4:] = 0
    digits, consistency = judge()(half)
    assert (digits == labels[:50]).mean() >= 0.95
    assert consistency.max() <= 0.5


def test_motion_of_still_and_empty_clips_is_zero():
    videos, _ = held_out()
    still = np.repeat(videos[:, :1], 8, axis=1)
    assert moving_digits.motion(still).max() == 0
    assert moving_digits.motion(np.zeros_like(videos[:3])).max() == 0
    flashing = still[:10].copy()
    flashing[:, ::2] = 0
    assert moving_digits.motion(flashing).max() == 0


@pytest.mark.parametrize('speed', [0.25, 1.0, 1.5])
@pytest.mark.parametrize('angle', [0.0, 0.9, 2.5])
def test_motion_is_speed_times_time(speed, angle):
    path = line(speed, angle)
    assert moving_digits.motion(blob(path)[None])[0] == pytest.approx(7 * speed, rel=0.02)


@pytest.mark.parametrize(('height', 'width'), [(32, 32), (32, 64), (64, 64)])
def test_motion_of_real_clips_is_their_speed(height, width):
    videos, _ = moving_digits.real_clips(
        'test', 50, frames=9, height=height, width=width, speed=(1.25, 1.25)
    )
    # Digits do not touch a wall in the first half of a clip.
    travel = moving_digits.motion(videos[:, :5])
    np.testing.assert_allclose(travel, 4 * 1.25, rtol=0.03)


def test_motion_counts_the_way_there_and_back():
    path = np.concatenate([line(1.0, 0.0, 5), line(1.0, 0.0, 4)[::-1]])
    assert moving_digits.motion(blob(path)[None])[0] == pytest.approx(8, rel=0.02)


def test_motion_is_not_fooled_by_background():
    clean = blob(line(1.0, 0.4)).astype(np.float32)
    noise = np.random.default_rng(0).normal(60, 10, clean.shape)
    noisy = (0.7 * clean + noise).clip(0, 255).astype(np.uint8)
    assert moving_digits.motion(noisy[None])[0] == pytest.approx(7, rel=0.05)
    still = np.repeat(0.7 * clean[:1], 8, axis=0) + noise
    assert moving_digits.motion(still.clip(0, 255).astype(np.uint8)[None])[0] < 1


@pytest.mark.usefixtures('unchecked_types')
def test_psnr():
    video = np.full((3, 2, 4, 4, 3), 100, np.uint8)
    assert psnr(video, video) == math.inf
    assert psnr(video, video + 10) == pytest.approx(10 * math.log10(255**2 / 100))
    # Differences below zero count as much as above: uint8 must not wrap around.
    assert psnr(video, video - 10) == pytest.approx(psnr(video, video + 10))
    one, two = np.zeros_like(video), np.zeros_like(video)
    two[0], two[1], two[2] = 255, 51, 5
    expected = np.mean([0, 20 * math.log10(5), 20 * math.log10(51)])
    assert psnr(one, two) == pytest.approx(expected)
    with pytest.raises(ValueError, match='equal shapes'):
        psnr(video, video[:1])
    with pytest.raises(ValueError, match='uint8'):
        psnr(video, video / 255)


def sampling(**values):
    return types.SimpleNamespace(sampling=types.SimpleNamespace(**values))


class Player:
    """A generator that plays real training clips: what `evaluate` must find faultless."""

    config = {
        'autoencoder': types.SimpleNamespace(
            data=types.SimpleNamespace(source='moving_digits', **SIZES)
        ),
        'content': types.SimpleNamespace(content=sampling(steps=25, guidance=3.0)),
        'motion': types.SimpleNamespace(motion=sampling(steps=35, guidance=2.0)),
    }
    steps = {'autoencoder': 30, 'content': 20, 'motion': 10}
    cost = {
        'autoencoder': {'seconds': 100.0, 'memory_gb': 0.5},
        'content': {'seconds': 20.0, 'memory_gb': 900.0},
        'motion': {'seconds': 3.0, 'memory_gb': 0.1},
    }

    def __init__(self):
        self.videos, self.labels = moving_digits.real_clips('train', 400, seed=3, **SIZES)

    def __call__(self, *, labels, seed, steps, guidance):
        rng = np.random.default_rng(seed)
        return np.stack(
            [self.videos[rng.choice(np.flatnonzero(self.labels == label))] for label in labels]
        )

    def reconstruct(self, video):
        return np.where(video < 250, video + 5, video - 5).astype(np.uint8)

    def content_frames(self, video):
        return video[:, 0]

    def animate(self, *, content, label, n, seed, steps, guidance):
        return self(labels=[label] * n, seed=seed, steps=steps, guidance=guidance)


class Liar(Player):
    """Plays another digit than the one asked for, standing still."""

    cost = Player.cost | {'motion': {}}

    def __call__(self, *, labels, **settings):
        videos = super().__call__(labels=[(label + 1) % 10 for label in labels], **settings)
        return np.repeat(videos[:, :1], videos.shape[1], axis=1)


def test_evaluate_praises_real_clips(tmp_path):
    numbers, pictures = moving_digits.evaluate(Player(), num_videos=50, num_real=100, seed=5)
    assert numbers['psnr'] == pytest.approx(20 * math.log10(255 / 5))
    assert numbers['class_accuracy'] >= 0.96
    assert numbers['classifier_real_accuracy'] >= 0.96
    assert 0.8 < numbers['motion_ratio'] < 1.2
    assert numbers['seconds'] == pytest.approx(123 + numbers['seconds_evaluation'])
    assert numbers['memory_gb'] == 900
    # What was not asked for is reported as the run's config has it.
    assert (numbers['steps_content'], numbers['guidance_content']) == (25, 3.0)
    assert (numbers['steps_motion'], numbers['guidance_motion']) == (35, 2.0)
    assert numbers['seed'] == 5
    assert numbers['checkpoint_content'] == 20

    sections = moving_digits.sections(numbers, pictures)
    assert sections[0].heading == '5 of 6 targets met. Missed: memory_gb.'
    page = report.write(tmp_path, 'quickstart', sections, numbers)
    assert page.stat().st_size < 5e6
    read = json.loads((tmp_path / 'report.json').read_text())
    assert set(moving_digits.TARGETS) <= set(read)
    captions = [figure.caption for figure in sections[3].figures]
    assert len(captions) == 10 and captions[4].startswith('Asked for 4')


def test_evaluate_is_not_taken_in():
    numbers, pictures = moving_digits.evaluate(
        Liar(), num_videos=50, num_real=100, steps=7, guidance=1.5
    )
    assert (numbers['steps_content'], numbers['guidance_motion']) == (7, 1.5)
    assert numbers['class_accuracy'] <= 0.1
    assert numbers['motion_ratio'] < 0.02
    assert numbers['seconds'] is None and numbers['memory_gb'] is None
    sections = moving_digits.sections(numbers, pictures)
    assert 'Missed: class_accuracy, motion_ratio, seconds' in sections[0].heading
    assert 'of 50 generated videos were not recognised' in sections[-1].text


@pytest.mark.parametrize('num_videos', [0, -10, 15])
def test_evaluate_wants_every_digit_equally_often(num_videos):
    with pytest.raises(UserError, match=f'num_videos={num_videos} must be'):
        moving_digits.evaluate(Player(), num_videos=num_videos)


def test_evaluate_wants_a_run_of_moving_digits():
    player = Player()
    other = types.SimpleNamespace(data=types.SimpleNamespace(source='folder', **SIZES))
    player.config = {'autoencoder': other}
    with pytest.raises(UserError, match="data.source='folder'"):
        moving_digits.evaluate(player)
