import functools
import json
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from cmd_jax.data.moving_digits import CLASS_NAMES, DIRECTIONS, caption
from cmd_jax.errors import UserError
from cmd_jax.evaluation import digit_judge, prompted_digits, report
from tests import digit_player

MEANT = {caption(d, w): (d, w) for d in range(len(CLASS_NAMES)) for w in range(len(DIRECTIONS))}
train_judge = functools.cache(digit_judge.DigitClassifier.train)


@pytest.fixture(autouse=True)
def judge(monkeypatch):
    """Trained once for all tests."""
    monkeypatch.setattr(digit_judge.DigitClassifier, 'train', train_judge)


class Player(digit_player.Player):
    """Plays a real clip of what the prompt says; a negative prompt makes dark pixels 3 brighter."""

    condition = 'text'

    def __init__(self, **kwargs):
        super().__init__(clips=1500, **kwargs)
        self.calls = []

    def __call__(self, *, prompt, negative_prompt='', **settings):
        self.calls.append((len(prompt), negative_prompt, settings))
        videos = np.stack(
            [
                self.play(*MEANT[words], np.random.default_rng((settings['seed'], i)))
                for i, words in enumerate(prompt)
            ]
        )
        return np.where(videos < 128, videos + 3 * bool(negative_prompt), videos).astype(np.uint8)

    def play(self, label, direction, rng):
        fits = (self.labels == label) & (self.directions == direction)
        return self.videos[rng.choice(np.flatnonzero(fits))]


class Wanderer(Player):
    """Ignores directions, negative prompts, and what one stage cost."""

    cost = Player.cost | {'motion': {}}

    def play(self, label, direction, rng):
        return super().play(label, rng.integers(8), rng)

    def __call__(self, *, negative_prompt='', **settings):
        return super().__call__(**settings)


class Scribbler(Player):
    """Ignores digits."""

    def play(self, label, direction, rng):
        return super().play(rng.integers(10), direction, rng)


class Backwards(Player):
    """Plays everything from its end."""

    def play(self, label, direction, rng):
        return super().play(label, direction, rng)[::-1]


class Neighbour(Player):
    """Turns each direction by 45 degrees."""

    def play(self, label, direction, rng):
        return super().play(label, (direction + 1) % 8, rng)


class Statue(Player):
    """Shows the right digit and does not move it."""

    def play(self, label, direction, rng):
        video = super().play(label, direction, rng)
        return np.repeat(video[:1], len(video), axis=0)


def measured(player, num_videos=80, **settings):
    return prompted_digits.evaluate(player, num_videos=num_videos, num_real=100, **settings)


@pytest.mark.parametrize('num_videos', [80, 160])
def test_every_digit_is_asked_for_in_every_direction_equally_often(num_videos):
    pairs = list(zip(*prompted_digits.asked(num_videos)))
    assert len(pairs) == num_videos and len(set(pairs)) == 80
    assert {pairs.count(pair) for pair in pairs} == {num_videos // 80}
    assert {direction for _, direction in pairs[:8]} == set(range(8))
    assert len({digit for digit, _ in pairs[:10]}) == 10


def test_evaluate_praises_real_clips(tmp_path):
    player = Player()
    numbers, pictures = measured(player, num_videos=160, seed=5)
    # Measured: 1 and 0.99.
    assert numbers['digit_accuracy'] >= 0.98
    assert numbers['direction_agreement'] >= 0.96
    assert numbers['direction_within_45'] == 1
    assert numbers['both_right'] >= 0.95
    # Chance: 0.1 and 0.125, with deviations of 0.024 and 0.026.
    assert numbers['digit_accuracy_other'] < 0.18
    assert numbers['direction_agreement_other'] < 0.21
    assert numbers['classifier_real_accuracy'] >= 0.96
    assert numbers['direction_real_agreement'] >= 0.96
    assert numbers['digit_reconstructed_accuracy'] >= 0.96
    assert numbers['direction_reconstructed_agreement'] >= 0.96
    assert 0.9 < numbers['motion_ratio'] < 1.1
    assert numbers['psnr'] == pytest.approx(20 * math.log10(255 / 5))
    assert numbers['seconds'] == 123 and numbers['memory_gb'] == 900
    dark = (pictures['generated'][:8] < 128).mean()
    assert numbers['negative_prompt_changes'] == pytest.approx(3 * dark)
    assert (numbers['steps_content'], numbers['guidance_motion']) == (25, 2.0)
    assert (numbers['seed'], numbers['checkpoint_content']) == (5, 20)
    negative = numbers['negative_prompt']
    assert MEANT[negative][0] not in [MEANT[words][0] for words in pictures['prompts'][:8]]
    settings, alone = {'seed': 5}, {'guidance': 1.0, 'motion_guidance': None}
    assert sorted(player.calls, key=str) == sorted(
        [(160, '', settings), (8, negative, settings), (8, '', settings | alone)],
        key=str,
    )

    sections = prompted_digits.sections(numbers, pictures)
    assert sections[0].heading == '6 of 6 targets met.'
    page = report.write(tmp_path, 'prompted_digits', sections, numbers)
    assert page.stat().st_size < 5e6
    read = json.loads((tmp_path / 'evaluation/prompted_digits.json').read_text())
    assert set(prompted_digits.TARGETS) <= set(read)
    by_heading = {section.heading: section for section in sections}
    captions = [figure.caption for figure in by_heading['New videos, asked for in words'].figures]
    assert len(captions) == 10
    said = '"a one moving up and right" read as: one, up and right; one, up and right'
    assert captions[1] == said and '&quot;a one moving up and right&quot;' in page.read_text()
    by_way = by_heading['Every digit in every direction'].figures
    assert by_way[2].caption.startswith('"... moving up": 20 digits and ')
    assert by_way[2].caption.endswith(' of 20 as asked')


def test_evaluate_notices_that_directions_are_ignored():
    numbers, pictures = measured(Wanderer(), num_videos=240, steps=7, guidance=1.5)
    assert (numbers['steps_motion'], numbers['guidance_content']) == (7, 1.5)
    assert numbers['digit_accuracy'] >= 0.98
    assert numbers['direction_agreement'] < 0.22  # 1/8, and over four deviations
    assert 0.25 < numbers['direction_within_45'] < 0.5  # 3/8
    assert numbers['both_right'] <= numbers['direction_agreement']
    assert numbers['negative_prompt_changes'] == 0
    assert numbers['seconds'] is None and numbers['memory_gb'] is None
    sections = prompted_digits.sections(numbers, pictures)
    missed = 'Missed: direction_agreement, negative_prompt_changes, seconds.'
    assert sections[0].heading == f'3 of 6 targets met. {missed}'
    wrong = 240 - round(240 * numbers['direction_agreement'])
    assert f'{wrong} did not set out in its direction' in sections[-1].text
    assert len(sections[-1].figures) == 12


def test_evaluate_notices_that_digits_are_ignored():
    numbers, _ = measured(Scribbler(), num_videos=240)
    assert numbers['digit_accuracy'] < 0.2  # 1/10, and five deviations
    assert numbers['direction_agreement'] >= 0.96
    assert numbers['both_right'] <= numbers['digit_accuracy']


def test_evaluate_notices_other_ways_to_go():
    numbers, _ = measured(Neighbour())
    assert numbers['direction_agreement'] < 0.05 and numbers['direction_within_45'] > 0.95
    # Not all clips end in the opposite of their direction: some have bounced off a wall.
    numbers, _ = measured(Backwards())
    assert numbers['digit_accuracy'] >= 0.98 and numbers['direction_within_45'] < 0.3
    numbers, pictures = measured(Statue())
    assert numbers['digit_accuracy'] >= 0.95
    assert numbers['direction_agreement'] == numbers['direction_within_45'] == 0
    assert numbers['motion_ratio'] < 0.02
    failures = prompted_digits.sections(numbers, pictures)[-1].figures
    assert failures[0].caption == '"a zero moving right" read as: zero, not moving'


@pytest.mark.parametrize('num_videos', [0, -80, 100, 200])
def test_evaluate_wants_every_prompt_equally_often(num_videos):
    with pytest.raises(UserError, match=f'num_videos={num_videos} must be a .*multiple of 80'):
        prompted_digits.evaluate(Player(), num_videos=num_videos)


def test_evaluate_wants_a_run_of_moving_digits_with_text():
    with pytest.raises(UserError, match="data.source='folder'.*protocol=prompted_digits"):
        prompted_digits.evaluate(Player(source='folder'))
    player = Player()
    player.config['content'].condition = 'label'
    with pytest.raises(UserError, match="condition='label'.*use protocol=moving_digits"):
        prompted_digits.evaluate(player)


def test_script_measures_as_many_videos_as_the_protocol_does(tmp_path):
    root = pathlib.Path(__file__).parents[1]
    program = (
        'import runpy, cmd_jax; from tests.test_prompted_digits import Player;'
        'cmd_jax.load = lambda *_, **__: Player();'
        'runpy.run_path("evaluate.py", None, "__main__")'
    )
    flags = ['--protocol=prompted_digits', '--seed=2', f'--workdir={tmp_path}']
    command = [sys.executable, '-c', program, *flags]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    numbers = json.loads((tmp_path / 'evaluation/prompted_digits.json').read_text())
    assert (numbers['num_videos'], numbers['seed']) == (160, 2)
    assert numbers['protocol'] == 'prompted_digits'
    assert 'direction_agreement' in done.stdout and 'MISSED' not in done.stdout
