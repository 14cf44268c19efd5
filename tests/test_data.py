import json
import re

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from cmd_jax.data import moving_digits, pipeline, sources
from cmd_jax.errors import UserError

# Moving digits


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
    source = sources.make_source('moving_digits', frames=6, height=24, width=40, size=50)
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


# Sources by name


@pytest.mark.parametrize(
    'name, options, message',
    [
        ('moving_digit', {}, "data.source='moving_digit'.*did you mean 'moving_digits'"),
        ('tfds', {}, 'known: moving_digits, folder'),
        ('folder', {}, "data.path=''"),
        ('folder', {'path': '.', 'shorts': 'loop'}, "'shorts'.*did you mean 'short'"),
        ('folder', {'path': '.', 'short': 'loops'}, "short='loops'.*'loop'"),
        ('folder', {'path': '.', 'test_fraction': 1}, 'test_fraction=1'),
        ('moving_digits', {'split': 'val'}, "data.split='val'"),
        ('moving_digits', {'stride': 2}, 'data.stride=2'),
        ('moving_digits', {'path': '/x'}, 'data.path='),
    ],
)
def test_make_source_names_the_mistake(name, options, message):
    with pytest.raises(UserError, match=re.compile(message)):
        sources.make_source(name, **{'frames': 8, 'height': 16, 'width': 16, **options})


# Pipeline


class Counting:
    """Samples that show their number and what they drew; every `holes`-th cannot be read."""

    name = 'counting'
    class_names = []

    def __init__(self, size, holes=None):
        self._size, self._holes = size, holes

    def __len__(self):
        return self._size

    def __getitem__(self, i, rng=None):
        if self._holes and i % self._holes == self._holes - 1:
            return None
        drawn = rng.integers(256, size=(2, 3, 3, 3), dtype=np.uint8)
        return {
            'video': drawn,
            'label': np.int32(i % 3),
            'caption': 'x' * (i % 4),
            'index': np.int64(i),
        }


def take(iterator, n):
    return [next(iterator) for _ in range(n)]


def indices(batches):
    return [b['index'].tolist() for b in batches]


def same(a, b):
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(np.array_equal(x[k], y[k]) for k in x) for x, y in zip(a, b)
    )


def test_batches_have_the_promised_types():
    batch = next(iter(pipeline.make_dataset(Counting(9), 4, seed=0, shuffle=False, repeat=True)))
    assert batch['video'].shape == (4, 2, 3, 3, 3) and batch['video'].dtype == np.uint8
    assert batch['label'].dtype == np.int32 and batch['label'].tolist() == [0, 1, 2, 0]
    assert (
        batch['caption'].tolist() == ['', 'x', 'xx', 'xxx'] and batch['caption'].dtype.kind == 'U'
    )
    assert batch['index'].dtype == np.int64 and batch['index'].tolist() == [0, 1, 2, 3]


def test_each_epoch_is_a_new_exact_shuffle():
    def make(seed):
        return iter(pipeline.make_dataset(Counting(24), 6, seed=seed, shuffle=True, repeat=True))

    batches = take(make(1), 12)
    epochs = np.reshape(indices(batches), (3, 24))
    assert (np.sort(epochs) == np.arange(24)).all()
    assert len({tuple(e) for e in epochs}) == 3 and tuple(epochs[0]) != tuple(range(24))
    assert same(batches, take(make(1), 12))
    assert indices(batches) != indices(take(make(2), 12))
    # A sample that comes again draws anew.
    drawn = {b['video'][k].tobytes() for b in batches for k in range(6) if b['index'][k] == 5}
    assert len(drawn) == 3


def test_evaluation_keeps_order_and_remainder():
    dataset = pipeline.make_dataset(Counting(10), 4, seed=0, shuffle=False, repeat=False)
    assert indices(dataset) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_small_sources_fill_large_batches():
    dataset = pipeline.make_dataset(Counting(5), 8, seed=0, shuffle=True, repeat=True)
    seen = np.ravel(indices(take(iter(dataset), 5)))
    assert np.bincount(seen).tolist() == [8] * 5


def test_processes_share_the_samples():
    def one(process_index, process_count, batch_size, repeat):
        dataset = pipeline.make_dataset(
            Counting(11, holes=4),
            batch_size,
            seed=5,
            shuffle=True,
            repeat=repeat,
            process_index=process_index,
            process_count=process_count,
        )
        return [b for b, _ in zip(dataset, range(20))]

    epoch = [i for p in range(2) for b in indices(one(p, 2, 3, False)) for i in b]
    assert sorted(epoch) == [0, 1, 2, 4, 5, 6, 8, 9, 10]
    # Together they draw what one process draws.
    videos = [
        {v.tobytes() for p in range(n) for b in one(p, n, 6 // n, False) for v in b['video']}
        for n in (1, 2, 3)
    ]
    assert len(videos[0]) == 9 and videos[0] == videos[1] == videos[2]


def test_position_is_saved_in_the_middle_of_an_epoch(tmp_path):
    def make():
        source = Counting(13, holes=5)
        return iter(pipeline.make_dataset(source, 4, seed=2, shuffle=True, repeat=True))

    iterator = make()
    take(iterator, 2)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(2, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
        manager.wait_until_finished()
        going_on = take(iterator, 7)
        other = make()
        args = ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(other))
        manager.restore(2, args=args)
    assert same(going_on, take(other, 7))


def test_workers_give_the_same_sequence_and_resume():
    def make(workers):
        source = Counting(13, holes=5)
        return iter(
            pipeline.make_dataset(source, 4, seed=2, shuffle=True, repeat=True, workers=workers)
        )

    expected = take(make(0), 8)
    iterator = make(2)
    try:
        assert same(take(iterator, 3), expected[:3])
        state = json.loads(json.dumps(iterator.get_state()))
        assert same(take(iterator, 3), expected[3:6])
        iterator.set_state(state)
        assert same(take(iterator, 5), expected[3:])
    finally:
        iterator.close()
