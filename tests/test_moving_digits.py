import functools
import json
import math

import numpy as np
import pytest

from cmd_jax.errors import UserError
from cmd_jax.evaluation import digit_judge, moving_digits, report
from tests import digit_player

train_judge = functools.cache(digit_judge.DigitClassifier.train)


class Player(digit_player.Player):
    def __call__(self, *, labels, seed, **settings):
        rng = np.random.default_rng(seed)
        return np.stack(
            [self.videos[rng.choice(np.flatnonzero(self.labels == label))] for label in labels]
        )

    def animate(self, *, content, label, n, **settings):
        return self(labels=[label] * n, **settings)


class Liar(Player):
    """Plays another digit than the one asked for, standing still."""

    cost = Player.cost | {'motion': {}}

    def __call__(self, *, labels, **settings):
        videos = super().__call__(labels=[(label + 1) % 10 for label in labels], **settings)
        return np.repeat(videos[:, :1], videos.shape[1], axis=1)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """I3D sees fewer pixels; a classifier is trained once."""
    monkeypatch.setattr(moving_digits, '_SIZE', 32)
    monkeypatch.setattr(digit_judge.DigitClassifier, 'train', train_judge)


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
    # A little brighter, brighter, other clips.
    parts = 'reconstruction', 'motion_prediction', 'generation'
    distances = [numbers[f'{part}_frechet'] for part in parts]
    assert 0 < distances[0] < distances[1] < distances[2]
    assert numbers['generation_ratio'] == distances[2] / distances[1]
    assert numbers['compared'] == 50

    sections = moving_digits.sections(numbers, pictures)
    assert sections[0].heading == '7 of 8 targets met. Missed: memory_gb.'
    page = report.write(tmp_path, 'moving_digits', sections, numbers)
    assert page.stat().st_size < 5e6
    read = json.loads((tmp_path / 'evaluation/moving_digits.json').read_text())
    assert set(moving_digits.TARGETS) <= set(read)
    costs = next(section for section in sections if section.heading == 'What each part costs')
    assert [row[0] for row in costs.table.rows][0] == 'Reconstructed'
    assert ' to ' in costs.table.rows[2][1]
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
    with pytest.raises(UserError, match="data.source='folder'"):
        moving_digits.evaluate(Player(source='folder'))
