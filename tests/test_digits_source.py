import numpy as np
import pytest

from cmd_jax.data import moving_digits, sources
from cmd_jax.data.clip_options import ClipOptions
from cmd_jax.errors import UserError


def test_digit_splits_are_disjoint_and_stratified():
    (train, train_labels), (test, test_labels) = map(moving_digits.digit, ('train', 'test'))
    assert len(train) + len(test) == 1797
    assert train.min() == 0 and train.max() == 1 and train.shape[1:] == (8, 8)
    share = np.bincount(test_labels) / (np.bincount(test_labels) + np.bincount(train_labels))
    assert len(share) == 10 and (abs(share - 1 / 6) < 0.01).all()
    assert not {d.tobytes() for d in train} & {d.tobytes() for d in test}


def test_digit_enlarged_is_clean_and_in_place():
    image = np.zeros((8, 8), np.float32)
    image[2:6, 3] = 1
    for size in (8, 9, 18, 36):
        patch = moving_digits.enlarge(image, size)
        assert patch.min() == 0 and patch.max() <= 1
        full = moving_digits.enlarge(np.ones((8, 8), np.float32), size)
        assert full.sum() == pytest.approx(size**2, rel=0.02)
        y, x = (np.indices(patch.shape) * patch).sum(axis=(1, 2)) / patch.sum()
        scale, margin = size / 8, (len(patch) - size) / 2
        assert y == pytest.approx(4 * scale + margin - 0.5, abs=0.05 * scale)
        assert x == pytest.approx(3.5 * scale + margin - 0.5, abs=0.05 * scale)


def test_tent_places_exactly_between_pixels():
    rows = moving_digits.tent(np.array([1.0, 1.25, -0.5]), size=5, patch=2)
    line = rows @ np.array([1.0, 10.0])
    np.testing.assert_allclose(line[0], [0, 1, 10, 0, 0])
    np.testing.assert_allclose(line[1], [0, 0.75, 0.25 + 7.5, 2.5, 0])
    np.testing.assert_allclose(line[2], [0.5 + 5, 5, 0, 0, 0])


def test_bounce_reflects_at_both_walls():
    path = moving_digits.bounce(
        np.array([1.0, 3.0]), np.array([-2.0, 1.5]), 5, np.array([4.0, 4.0])
    )
    np.testing.assert_allclose(path[:, 0], [1, 1, 3, 3, 1])
    np.testing.assert_allclose(path[:, 1], [3, 3.5, 2, 0.5, 1])


def test_moving_digits_samples():
    source = sources.make_source(
        'moving_digits:50', 'train', ClipOptions(frames=6, height=24, width=40)
    )
    sample = source[7]
    assert len(source) == 50 and source.name == 'moving_digits' and len(source.class_names) == 10
    assert sample['video'].shape == (6, 24, 40, 3) and sample['video'].dtype == np.uint8
    assert sample['label'].dtype == np.int32 and sample['index'].dtype == np.int64
    assert sample['index'] == 7
    assert (sample['video'] == sample['video'][..., :1]).all()
    words = [source[i]['caption'].split()[1] for i in range(50)]
    assert words == [source.class_names[source[i]['label']] for i in range(50)]
    assert len(set(words)) >= 8


def test_moving_digits_depend_on_seed_split_and_index():
    make = moving_digits.MovingDigits
    first = make()[3]
    again = make(size=4).__getitem__(3, np.random.default_rng(1))
    np.testing.assert_array_equal(first['video'], again['video'])
    for other in (make()[4], make(seed=1)[3], make(split='test')[3]):
        assert (first['video'] != other['video']).any()


@pytest.mark.parametrize('frames, height, width', [(8, 32, 32), (16, 32, 32), (12, 48, 64)])
def test_moving_digits_move_as_their_caption_says(frames, height, width):
    source = moving_digits.MovingDigits(frames=frames, height=height, width=width)
    speeds, directions = [], set()
    for i in range(150):
        sample = source[i]
        light = sample['video'][..., 0].astype(float)
        y, x = np.einsum('thw,chw->ct', light, np.indices((height, width)))
        y, x = np.stack([y, x]) / light.sum(axis=(1, 2))
        # No light is lost and none appears: placement is exact, the walls are not crossed.
        assert np.ptp(light.sum(axis=(1, 2))) < 0.02 * light[0].sum()
        half = (frames - 1) // 2
        steps = np.stack([np.diff(y), np.diff(x)])[:, :half]
        np.testing.assert_allclose(steps, steps.mean(1, keepdims=True) + 0 * steps, atol=0.08)
        dy, dx = steps.mean(axis=1)
        direction = moving_digits.DIRECTIONS[round(np.arctan2(-dy, dx) / (np.pi / 4)) % 8]
        angle = np.degrees(np.arctan2(-dy, dx))
        if abs(angle % 45 - 22.5) > 1.5:  # not on the line between two names
            assert sample['caption'].endswith(f' moving {direction}')
        directions.add(direction)
        speeds.append(np.hypot(dy, dx) * 32 / min(height, width))
    assert directions == set(moving_digits.DIRECTIONS)
    assert 0.66 < min(speeds) < 0.72 and 0.78 < max(speeds) < 0.84


def test_long_clips_bounce_and_stay_inside():
    video = moving_digits.MovingDigits(frames=100)[0]['video'].astype(float)
    light = video.sum(axis=(1, 2, 3))
    assert np.ptp(light) < 0.02 * light[0]
    row = np.einsum('thw,h->t', video[..., 0], np.arange(32)) / video[..., 0].sum(axis=(1, 2))
    assert len(set(np.sign(np.diff(row)).tolist())) > 1


@pytest.mark.parametrize('options', [{'digit_size': 30}, {'digit_size': 7}, {'speed': (2, 1)}])
def test_moving_digits_reject_bad_options(options):
    with pytest.raises(UserError, match=next(iter(options))):
        moving_digits.MovingDigits(**options)
