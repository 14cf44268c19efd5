"""Sources of TFDS, over tiny data sets that its own writers make."""

import concurrent.futures
import io
import multiprocessing
import os
import pathlib
import sys

import numpy as np
import pytest
from PIL import Image

from cmd_jax.data import clips
from cmd_jax.data.clip_options import ClipOptions
from cmd_jax.data.tfds_videos import TfdsVideos, choose_part
from cmd_jax.errors import UserError
from tests.tfds_sets import LENGTHS, digit, noise, prepare, write_stand_ins
from tests.tiny_videos import numbers

# TFDS is imported in functions: spawned workers import this module, and tell what they import.


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp('tfds')
    write_stand_ins(path)
    return path


@pytest.fixture
def ucf101(data_dir):
    return os.fspath(data_dir / 'ucf101' / 'ucf101_1' / '2.0.0')


@pytest.fixture
def moving_mnist(data_dir):
    return os.fspath(data_dir / 'moving_mnist' / '1.0.0')


@pytest.fixture
def named(data_dir, monkeypatch):
    """As if TFDS_DATA_DIR had been set when TFDS was imported."""
    monkeypatch.setattr('tensorflow_datasets.core.constants.DATA_DIR', os.fspath(data_dir))


def opened(where, split='train', frames=4, height=24, width=40, **options):
    return TfdsVideos(
        where, split, ClipOptions(frames=frames, height=height, width=width, **options)
    )


# Clips


@pytest.mark.parametrize('split', ['train', 'test'])
def test_clips_of_classes(ucf101, split):
    source = opened(ucf101, split, short='loop')
    assert len(source) == len(LENGTHS[split]) and source.name == 'tfds'
    assert source.class_names == ['FlyingBird', 'cat']
    assert source.captions == ['cat', 'flying bird']
    for i, length in enumerate(LENGTHS[split]):
        sample = source[i]
        start = (length - 4) // 2
        assert numbers(sample['video']) == list(range(start, start + 4))
        assert sample['video'].dtype == np.uint8 and sample['video'].shape == (4, 24, 40, 3)
        assert (sample['label'], sample['index']) == (i % 2, i)
        assert sample['label'].dtype == np.int32 and sample['index'].dtype == np.int64
        assert sample['caption'] == ['flying bird', 'cat'][i % 2]


def test_clips_are_random_in_training_only(ucf101):
    train, test = (opened(ucf101, split, stride=3) for split in ('train', 'test'))
    starts = set()
    for seed in range(40):
        got = numbers(train.__getitem__(1, np.random.default_rng(seed))['video'])
        again = numbers(train.__getitem__(1, np.random.default_rng(seed))['video'])
        assert got == again == list(range(got[0], got[0] + 12, 3))
        starts.add(got[0])
    assert starts == set(range(21 - 9))
    for seed in range(5):
        fixed = test.__getitem__(1, np.random.default_rng(seed))['video']
        assert numbers(fixed) == list(range(6, 18, 3))


def test_crop_and_flip_are_drawn_in_training_only(moving_mnist):
    """Through a window of half the width of a video, where its right half is seen or not."""

    def lights(split, **options):
        source = opened(moving_mnist, split, frames=2, height=64, width=32, **options)
        rngs = (np.random.default_rng(seed) for seed in range(30))
        clips_ = [source.__getitem__(len(source) - 1, rng)['video'] for rng in rngs]
        right = digit({'train': 8, 'test': 9}[split])[0, 0, -1, 0]
        return [(c[0] == right).all(-1).mean(0) for c in clips_]  # of each column

    shares = [columns.mean() for columns in lights('train')]
    assert min(shares) < 0.2 and max(shares) > 0.8
    rising = {columns[-1] > columns[0] for columns in lights('train', crop='center', flip=True)}
    assert rising == {True, False}
    for columns in lights('test', flip=True):
        np.testing.assert_array_equal(columns, np.arange(32) >= 16)


def test_short_videos(ucf101):
    options = {'frames': 8, 'stride': 2, 'height': 24, 'width': 40}
    skipped = opened(ucf101, **options)[3]
    assert skipped == clips.Skipped(f'{ucf101}[3]', clips.TOO_SHORT, 'frames=5, clips need 15')
    for short, expected in {
        'loop': [0, 2, 4, 1, 3, 0, 2, 4],
        'hold': [0, 2, 4, 4, 4, 4, 4, 4],
    }.items():
        assert numbers(opened(ucf101, short=short, **options)[3]['video']) == expected


def test_all_clips_of_videos_of_one_length(moving_mnist):
    """Grey ones, of a set that is not split."""
    whole = {'frames': 3, 'stride': 2, 'height': 64, 'width': 64, 'clips': 'all'}
    train, test = (opened(moving_mnist, split, **whole) for split in ('train', 'test'))
    assert (len(train), len(test)) == (9 * 3, 3)
    assert train.captions == [''] and train.class_names == []
    for source, first in ((train, 0), (test, 9)):
        for i in range(len(source)):
            video, clip = divmod(i, 3)
            expected = digit(first + video)[6 * clip : 6 * clip + 5 : 2].repeat(3, axis=-1)
            sample = source[i]
            np.testing.assert_array_equal(sample['video'], expected)
            assert (sample['index'], sample['label'], sample['caption']) == (i, 0, '')


def test_only_frames_of_the_clip_are_decoded(ucf101, monkeypatch):
    decoded, open_image = [], Image.open

    def counting(file):
        decoded.append(file)
        return open_image(file)

    monkeypatch.setattr(Image, 'open', counting)
    opened(ucf101, frames=3)[0]
    assert len(decoded) == 3
    opened(ucf101, frames=16, short='hold')[3]
    assert len(decoded) == 3 + 5  # a frame that is shown again is not decoded again


CHANNELS = {
    'images': 3,
    'alpha images': 4,
    'arrays': 3,
    'packed arrays': 3,
    'array': 3,
    'bytes': 3,
    'grey': 1,
    'alpha': 4,
}


def kinds_of_video():
    from tensorflow_datasets import features as kinds

    frame = {'shape': (8, 8, 3), 'dtype': np.uint8}
    return {
        'images': kinds.Sequence(kinds.Image(shape=(8, 8, 3))),
        'arrays': kinds.Sequence(kinds.Tensor(**frame)),
        'packed arrays': kinds.Sequence(kinds.Tensor(**frame, encoding='zlib')),
        'array': kinds.Tensor(shape=(None, 8, 8, 3), dtype=np.uint8),
        'bytes': kinds.Tensor(shape=(None, None, 8, 3), dtype=np.uint8, encoding='bytes'),
        'grey': kinds.Tensor(shape=(None, 8, 8, 1), dtype=np.uint8, encoding='zlib'),
        'alpha': kinds.Tensor(shape=(None, 8, 8, 4), dtype=np.uint8, encoding='zlib'),
        'alpha images': kinds.Sequence(kinds.Image(shape=(8, 8, 4))),
    }


@pytest.mark.parametrize('kind, channels', CHANNELS.items())
def test_other_features_that_are_videos(tmp_path, kind, channels):
    from tensorflow_datasets import features as kinds

    made = noise(channels=channels)
    features = {'frames': kinds_of_video()[kind], 'text': kinds.Text(), 'depth': np.float32}
    single = kind in ('array', 'bytes', 'grey', 'alpha')
    rows = [
        {'frames': v if single else list(v), 'text': f'{len(v)} frä\nmes', 'depth': 0.5}
        for v in made
    ]
    folder = prepare(tmp_path, 'other', features, {'train': rows, 'validation': rows[:1]})
    source = opened(folder, frames=5, height=8, width=8)
    assert len(source) == 5 and source.captions is None
    assert len(opened(folder, 'test', frames=5, height=8, width=8)) == 1
    for i, video in enumerate(made):
        sample, start = source[i], (len(video) - 5) // 2
        rgb = video.repeat(3, axis=-1) if channels == 1 else video[..., :3]
        np.testing.assert_array_equal(sample['video'], rgb[start : start + 5])
        assert sample['caption'] == f'{len(video)} frä\nmes'


def test_what_cannot_be_used_is_skipped(tmp_path):
    from tensorflow_datasets import features as kinds

    features = {
        'video': kinds.Video((None, 8, 8, 3)),
        'label': kinds.ClassLabel(names=['cat']),
        'kind': kinds.ClassLabel(num_classes=3),
    }
    png = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(png, 'PNG')
    cut = png.getvalue()[:40]
    rows = [
        {'video': [png.getvalue()] * 4, 'label': 0, 'kind': 2},
        {'video': [png.getvalue()] * 4, 'label': -1, 'kind': 2},
        {'video': [png.getvalue(), cut, cut, png.getvalue()], 'label': 0, 'kind': 2},
        {'video': [], 'label': 0, 'kind': 2},
    ]
    folder = prepare(tmp_path, 'flawed', features, {'train': rows, 'test': rows[:1]})
    source = opened(folder, frames=2, height=8, width=8)
    assert source.class_names == ['cat'] and source[0]['label'] == 0
    assert source[1] == clips.Skipped(f'{folder}[1]', 'no label')
    assert (source[2].file, source[2].reason) == (f'{folder}[2]', 'unreadable')
    assert source[3].reason == clips.TOO_SHORT


# Workers


def read(source):
    return [source.__getitem__(i, np.random.default_rng(i)) for i in range(3)]


def read_in_worker(*sources):
    """(modules of TensorFlow before and after reading, clips of each source)"""

    def present():
        return {'tensorflow', 'tensorflow_datasets'} & set(sys.modules)

    before = present()
    return before, [read(source) for source in sources], present()


def test_spawned_workers_read_without_tensorflow(ucf101):
    used, fresh = opened(ucf101), opened(ucf101)
    expected = read(used)
    spawn = multiprocessing.get_context('spawn')
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        before, found, after = pool.submit(read_in_worker, used, fresh).result(timeout=120)
    assert not before and after == {'tensorflow_datasets'}
    for samples in found:
        for sample, same in zip(samples, expected, strict=True):
            np.testing.assert_array_equal(sample['video'], same['video'])
            for key in ('label', 'caption', 'index'):
                assert sample[key] == same[key]


# Names, splits, errors


def test_names(named, log):
    assert len(opened('ucf101/ucf101_1:2.0.0')) == 4
    assert len(opened('ucf101/ucf101_1')) == 4
    digits = opened('moving_mnist', 'test', frames=20, height=64, width=64)
    np.testing.assert_array_equal(digits[0]['video'], digit(9).repeat(3, axis=-1))
    lines = [m for m in log.messages if m.startswith('tfds: ')]
    assert lines == [
        "tfds: 4 clips of 4 videos to train: ucf101/ucf101_1/2.0.0, split 'train', videos 'video', "
        "labels 'label', captions None",
        "tfds: 1 clips of 1 videos to test: moving_mnist/1.0.0, split 'test[90%:]', videos "
        "'image_sequence', labels None, captions None",
    ]


def test_parts():
    def parts(**counts):
        return [choose_part('x', counts, split) for split in ('train', 'test')]

    assert parts(train=9, test=2, validation=3) == ['train', 'test']
    assert parts(train=9, validation=3, extra=4) == ['train', 'validation']
    assert parts(train=9, test=0, validation=3) == ['train', 'validation']
    assert parts(train=9) == ['train[:90%]', 'train[90%:]']
    assert parts(test=9) == ['test[:90%]', 'test[90%:]']
    for counts, expected in [
        ({'test': 9, 'validation': 9}, 'its splits are test, validation, none of them train'),
        ({'train': 0}, 'its splits are empty'),
        ({'train': 4}, "of the 4 videos of its only split 'train' a tenth cannot be set aside"),
    ]:
        with pytest.raises(UserError, match=expected):
            parts(**counts)


def test_parts_are_the_whole(tmp_path):
    from tensorflow_datasets import features as kinds

    made = [np.full((2, 8, 8, 3), v, np.uint8) for v in range(23)]
    features = {'video': kinds.Tensor(shape=(2, 8, 8, 3), dtype=np.uint8)}
    for count in (5, 14, 23):
        rows = [{'video': v} for v in made[:count]]
        folder = prepare(tmp_path, f'of_{count}', features, {'train': rows})
        sources = [opened(folder, s, frames=2, height=8, width=8) for s in ('train', 'test')]
        found = [s[i]['video'][0, 0, 0, 0] for s in sources for i in range(len(s))]
        assert found == list(range(count)) and len(sources[1]) == max(1, round(0.1 * count))


def test_unusable_names_are_user_errors(named, data_dir):
    for where, expected in [
        ('moving_mnits', 'TFDS has no data set of that name.*did you mean moving_mnist'),
        ('kaggle:cats', 'is of a community collection'),
        ('ucf101/ucf101_9', 'is not a name of TFDS: .*ucf101_9 not found'),
        ('moving_mnist:7.0.0', 'is not a name of TFDS: .*version 7.0.0, only: 1.0.0'),
        ('two words', 'is not a name of TFDS'),
        ('gs://bucket/ucf101', 'is not on this machine'),
        (
            'robonet',
            'is not prepared on this machine, .*robonet.* is missing; run `tfds build robonet '
            '--file_format=array_record`.*TFDS_DATA_DIR',
        ),
        (
            'ucf101',
            'is not prepared on this machine, .*ucf101_1_256.*did you mean .*ucf101_1/2.0.0',
        ),
        (os.fspath(data_dir / 'absent'), 'absent does not exist'),
        (
            os.fspath(data_dir / 'ucf101'),
            'has no dataset_info.json: give the folder of a version .*ucf101/ucf101_1/2.0.0',
        ),
    ]:
        with pytest.raises(UserError, match=expected) as error:
            opened(where)
        assert '\n' not in str(error.value) and f'tfds:{where}' in str(error.value)


def test_unusable_options_are_user_errors(ucf101, moving_mnist):
    with pytest.raises(UserError, match='data.fps=8.0: .*no time stamps: use data.stride'):
        opened(ucf101, fps=8.0)
    with pytest.raises(UserError, match="differ in length, so data.clips='all'"):
        opened(ucf101, clips='all')
    with pytest.raises(UserError, match='have 20 frames, fewer than a clip .*data.frames=21'):
        opened(moving_mnist, frames=21)


def test_unusable_data_sets_are_user_errors(tmp_path):
    from tensorflow_datasets import features as kinds

    frames = kinds.Video((None, 8, 8, 3))
    image = {'image': kinds.Image(shape=(8, 8, 3)), 'label': kinds.ClassLabel(num_classes=2)}
    row = {'image': noise()[0][0], 'label': 0}
    folder = prepare(tmp_path, 'still', image, {'train': [row] * 5})
    with pytest.raises(UserError, match=r'no feature is a video.*has image \(Image\), label'):
        opened(folder)

    two = prepare(
        tmp_path, 'two', {'left': frames, 'right': frames}, {'train': [{'left': [], 'right': []}]}
    )
    with pytest.raises(UserError, match='2 features are videos: left, right'):
        opened(two)

    rows = [{'video': video} for video in noise()]
    old = prepare(tmp_path, 'old', {'video': frames}, {'train': rows}, file_format='tfrecord')
    with pytest.raises(UserError, match='stored as tfrecord.*`tfds convert_format.*=array_record'):
        opened(old)

    torn = pathlib.Path(prepare(tmp_path, 'torn', {'video': frames}, {'train': rows}))
    (shard,) = torn.glob('*.array_record*')
    shard.unlink()
    with pytest.raises(UserError, match='1 of the 1 files .* are missing'):
        opened(os.fspath(torn))
    (torn / 'features.json').unlink()
    with pytest.raises(UserError, match='cannot be opened'):
        opened(os.fspath(torn))


def test_converted_data_sets(tmp_path):
    """As the message about another file format says."""
    pytest.importorskip('apache_beam')
    from tensorflow_datasets import features as kinds
    from tensorflow_datasets.scripts.cli import convert_format_utils

    rows, features = [{'video': video} for video in noise()], {'video': kinds.Video()}
    folder = prepare(tmp_path, 'old', features, {'train': rows}, file_format='tfrecord')
    convert_format_utils.convert_dataset(
        out_dir=None,
        dataset_version_dir=[pathlib.Path(folder)],
        out_file_format='array_record',
        overwrite=False,
        use_beam=False,
        num_workers=1,
    )
    clip = opened(folder, frames=6, height=8, width=8)[0]['video']
    np.testing.assert_array_equal(clip, noise()[0])
