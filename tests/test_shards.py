import csv
import dataclasses

import numpy as np
import pytest
from PIL import Image

from cmd_jax import video as video_lib
from cmd_jax.data import clips, listings, prepare, records, shards
from cmd_jax.data.clip_options import ClipOptions, VideoInfo
from cmd_jax.data.videos import VideoFiles
from cmd_jax.errors import UserError
from tests import tiny_videos
from tests.prepared import header, numbered, settings, stored, write_folder
from tests.tiny_videos import numbers


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp('videos'))


def direct(folder, split, **fields):
    fields = {'frames': 8, 'height': 16, 'width': 16, 'crop': 'center'} | fields
    listing = listings.folder(str(folder))
    return VideoFiles(listing, split, ClipOptions(**fields), test_fraction=0.4)


def test_whole_videos(folder, tmp_path):
    prepare.prepare(settings(folder, clips='whole'), str(tmp_path))
    about = header(tmp_path)
    assert about['format'] == records.VIDEOS and about['source'] == f'folder:{folder}'
    assert about['frames'] is None and about['fps'] == 8 and about['encoding'] == 'raw'
    assert about['class_names'] == ['FlyingBird', 'cat']
    assert about['captions'] == ['cat', 'flying bird']
    for split in ('train', 'test'):
        found, source = stored(tmp_path, split), direct(folder, split)
        assert list(found) == [source.file(v) for v in range(source.videos)]
        for v, (file, [record]) in enumerate(found.items()):
            whole = video_lib.read(folder / file)
            assert record['video'].shape == (len(whole), 16, 27, 3)
            assert numbers(record['video']) == list(range(len(whole)))
            assert record['fps'] == 8 and record['label'] == source.label(v)
            assert records.text(record['caption']) == source.caption(v)
        told = about['splits'][split]
        assert told['shards'] == -(-len(found) // 2) and told['skipped'] == {}
        assert told['videos'] == told['records'] == len(found)
        assert told['bytes'] == sum(p.stat().st_size for p in tmp_path.glob(f'{split}*'))


@pytest.mark.parametrize(
    'fields, step', [({'stride': 3}, 3), ({'fps': 4.0}, 2), ({'fps': 16.0}, 0.5)]
)
def test_whole_videos_at_another_rate(folder, tmp_path, fields, step):
    prepare.prepare(settings(folder, clips='whole', **fields), str(tmp_path))
    assert header(tmp_path)['fps'] == pytest.approx(8 / step)
    for split in ('train', 'test'):
        for file, [record] in stored(tmp_path, split).items():
            last = len(video_lib.read(folder / file)) - 1
            expected = [int(k * step) for k in range(100) if k * step <= last]
            assert numbers(record['video']) == expected
            assert record['fps'] == pytest.approx(8 / step)


@pytest.mark.parametrize('fields', [{}, {'stride': 2}, {'fps': 3.0}])
@pytest.mark.parametrize('clips', ['all', 'center'])
def test_clips_are_those_of_the_files(folder, tmp_path, clips, fields):
    fields |= {'clips': clips, 'frames': 6}
    prepare.prepare(settings(folder, **fields), str(tmp_path))
    assert header(tmp_path)['frames'] == 6
    for split in ('train', 'test'):
        source = direct(folder, split, **fields)
        made = records.RecordVideos(
            str(tmp_path), split, ClipOptions(frames=6, height=16, width=16, clips='center')
        )
        assert len(made) == len(source) > 0
        assert made.class_names == source.class_names
        for i in range(len(made)):
            a, b = made[i], source[i]
            np.testing.assert_array_equal(a.pop('video'), b.pop('video'))
            assert a == b


def test_random_clips(folder, tmp_path):
    starts = []
    fields = {'clips': 'random', 'frames': 4, 'stride': 2, 'per_video': 3}
    for i, (seed, videos) in enumerate([(0, 2), (1, 2), (0, 1)]):
        given = settings(folder, seed=seed, videos_per_shard=videos, **fields)
        prepare.prepare(given, str(tmp_path / str(i)))
        starts.append([])
        for split in ('train', 'test'):
            for file, found in stored(tmp_path / str(i), split).items():
                assert len(found) == 3
                for record in found:
                    got = numbers(record['video'])
                    assert np.diff(got).tolist() == [2, 2, 2]
                    assert got[-1] < len(video_lib.read(folder / file)) and record['fps'] == 4
                    starts[-1].append(got[0])
    assert starts[0] == starts[2] != starts[1]
    assert len(set(starts[0])) > 6 and min(starts[0] + starts[1]) < 3 < 11 < max(sum(starts, []))


def test_jpeg_is_near_raw(folder, tmp_path):
    for encoding in ('raw', 'jpeg'):
        prepare.prepare(
            settings(folder, clips='whole', encoding=encoding), str(tmp_path / encoding)
        )
    assert header(tmp_path / 'jpeg')['encoding'] == 'jpeg'
    options = ClipOptions(frames=20, height=16, width=16)
    for split in ('train', 'test'):
        raw, jpeg = (
            records.RecordVideos(str(tmp_path / e), split, options) for e in ('raw', 'jpeg')
        )
        for i in range(len(raw)):
            a, b = raw[i], jpeg[i]
            assert numbers(a['video'])[:2] == numbers(b['video'])[:2]
            np.testing.assert_allclose(a['video'].astype(int), b['video'], atol=3)


@pytest.mark.parametrize('size, expected', [((16, 16), (16, 32)), ((20, 64), (32, 64))])
def test_frames_without_crop_just_cover_the_size(tmp_path, size, expected):
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (5, 8, 3), np.uint8))
    video = np.asarray(picture.resize((80, 40), Image.Resampling.BICUBIC))[None].repeat(4, 0)
    video_lib.write(tmp_path / 'in' / 'x.mp4', video)
    given = settings(tmp_path / 'in', height=size[0], width=size[1], clips='whole')
    prepare.prepare(given, str(tmp_path / 'out'))
    [[record]] = stored(tmp_path / 'out', 'train').values()
    assert record['video'].shape == (4, *expected, 3)
    frame = Image.fromarray(video_lib.read(tmp_path / 'in' / 'x.mp4')[2])
    whole = np.asarray(frame.resize(expected[::-1], Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(record['video'][2], whole)

    prepare.prepare(dataclasses.replace(given, crop='center'), str(tmp_path / 'cropped'))
    [[record]] = stored(tmp_path / 'cropped', 'train').values()
    top, left = ((a - b) // 2 for a, b in zip(expected, size))
    window = whole[top : top + size[0], left : left + size[1]]
    np.testing.assert_allclose(record['video'][2].astype(int), window, atol=2)


def test_short_videos_loop_where_asked(tmp_path):
    video_lib.write(tmp_path / 'in' / 'x.mp4', numbered(5))
    given = settings(tmp_path / 'in', frames=8, short='loop')
    prepare.prepare(given, str(tmp_path / 'out'))
    [[record]] = stored(tmp_path / 'out', 'test').values()
    assert numbers(record['video']) == [0, 1, 2, 3, 4, 0, 1, 2]


def test_ucf101_keeps_its_own_split(folder, tmp_path):
    (tmp_path / 'UCF-101').symlink_to(folder)
    lists = tmp_path / 'ucfTrainTestlist'
    lists.mkdir()
    (lists / 'classInd.txt').write_text('1 cat\n2 FlyingBird\n')
    (lists / 'trainlist02.txt').write_text('cat/1.mp4 1\nFlyingBird/0.mp4 2\n')
    (lists / 'testlist02.txt').write_text('cat/2.mp4\n')
    given = shards.Settings(data=f'ucf101:{tmp_path}', height=8, width=8, fold=2)
    prepare.prepare(given, str(tmp_path / 'out'))
    assert list(stored(tmp_path / 'out', 'train')) == ['cat/1.mp4', 'FlyingBird/0.mp4']
    assert list(stored(tmp_path / 'out', 'test')) == ['cat/2.mp4']
    assert header(tmp_path / 'out')['class_names'] == ['cat', 'FlyingBird']


# Videos that are not as they should be


@pytest.fixture
def hostile(tmp_path):
    """Two good videos among bad ones, and what is expected of these."""
    path = tmp_path / 'hostile'
    expected = tiny_videos.hostile(path)
    (path / 'cut.mp4').unlink(), expected.pop('cut.mp4')
    for i in range(2):
        video_lib.write(path / f'good{i}.mp4', numbered(), fps=8)
    video_lib.write(path / 'short.mp4', numbered(5))
    video_lib.write(path / 'still.mp4', numbered(1))
    return path, expected | {'short.mp4': 'too short', 'still.mp4': 'too short'}


def test_bad_videos_are_counted_and_listed(hostile, tmp_path):
    folder, expected = hostile
    out = tmp_path / 'out'
    # One video a shard: those of bad ones are empty.
    prepare.prepare(settings(folder, videos_per_shard=1), str(out))
    with open(out / 'skipped.csv', newline='') as f:
        rows = list(csv.DictReader(f))
    assert {row['file']: row['reason'] for row in rows} == expected
    about = header(out)['splits']
    for split in ('train', 'test'):
        here = [row['reason'] for row in rows if row['split'] == split]
        assert about[split]['skipped'] == {reason: here.count(reason) for reason in here}
        assert about[split]['videos'] == about[split]['shards']
    assert about['train']['videos'] + about['test']['videos'] == 8
    short = next(row for row in rows if row['file'] == 'short.mp4')
    assert short['detail'] == 'frames=5, clips need 16'
    found = [stored(out, split) for split in about if about[split]['records']]
    found = {file: len(made) for split in found for file, made in split.items()}
    assert found == {'good0.mp4': 2, 'good1.mp4': 2}


def test_too_many_bad_videos_are_an_error(hostile, tmp_path):
    folder, out = hostile[0], tmp_path / 'out'
    given = settings(folder)
    with pytest.raises(UserError, match='4 of 8 videos.*--max_bad=0.49.*: empty file') as error:
        prepare.prepare(given, str(out), max_bad=0.49)
    assert '\n' not in str(error.value) and not (out / 'header.json').exists()
    assert len((out / 'skipped.csv').read_text().splitlines()) == 7
    made = {p: p.stat().st_mtime_ns for p in out.glob('*.array_record')}
    prepare.prepare(given, str(out), max_bad=0.5)
    assert made and made == {p: p.stat().st_mtime_ns for p in out.glob('*.array_record')}
    assert header(out)['splits']['train']['records'] >= 2


def test_no_record_at_all_is_an_error(tmp_path):
    for i in range(3):
        video_lib.write(tmp_path / 'in' / f'{i}.mp4', numbered(5))
    with pytest.raises(UserError, match='none of 3 videos gives a record.*too short.*short=loop'):
        prepare.prepare(settings(tmp_path / 'in'), str(tmp_path / 'out'))


def test_damaged_videos_give_what_is_before_the_damage(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 48, 48, 3), np.uint8)
    video_lib.write(tmp_path / 'in' / 'whole.mp4', noise)
    data = (tmp_path / 'in' / 'whole.mp4').read_bytes()
    (tmp_path / 'in' / 'cut.mp4').write_bytes(data[: len(data) // 2])
    prepare.prepare(settings(tmp_path / 'in', frames=4), str(tmp_path / 'out'))
    found = {f: r for s in ('train', 'test') for f, r in stored(tmp_path / 'out', s).items()}
    given = len(found['cut.mp4'])
    assert len(found['whole.mp4']) == 10 and 3 <= given <= 5
    for a, b in zip(found['cut.mp4'], found['whole.mp4']):
        np.testing.assert_array_equal(a['video'], b['video'])
    line = (tmp_path / 'out' / 'skipped.csv').read_text().splitlines()[1]
    assert f'cut.mp4,unreadable,after {given} clips: ' in line


@pytest.mark.parametrize(
    'fields, expected',
    [
        ({'clips': 'whole'}, [list(range(20))]),
        ({'clips': 'whole', 'fps': 4.0}, [list(range(0, 20, 2))]),
        ({'clips': 'all', 'frames': 8}, [list(range(8)), list(range(8, 16))]),
        ({'clips': 'center', 'frames': 2, 'stride': 19}, [[0, 19]]),
    ],
)
def test_frames_are_counted_where_a_header_is_wrong(folder, fields, expected):
    info = VideoInfo(frames=35, fps=8.0, height=24, width=40)  # it has 20
    given = shards.Settings(data='folder:x', height=16, width=16, **fields)
    got = list(shards.read_clips(str(folder / 'cat' / '0.mp4'), info, given, (0,)))
    assert [numbers(clip) for clip, _ in got] == expected


def test_parts_of_videos(folder):
    """What a manifest says with start and end."""
    info = VideoInfo(frames=20, fps=8.0, height=24, width=40).segment(0.5, 1.5)
    path = str(folder / 'cat' / '0.mp4')
    for fields, expected in [
        ({'clips': 'whole'}, [list(range(4, 12))]),
        ({'clips': 'whole', 'fps': 4.0}, [[4, 6, 8, 10]]),
        ({'clips': 'all', 'frames': 3}, [[4, 5, 6], [7, 8, 9]]),
    ]:
        given = shards.Settings(data='folder:x', height=16, width=16, **fields)
        got = [numbers(clip) for clip, _ in shards.read_clips(path, info, given, (0,))]
        assert got == expected


def test_a_record_has_an_end(folder):
    info = VideoInfo(frames=10**9, fps=8.0, height=24, width=40)
    given = shards.Settings(data='folder:x', height=16, width=16, clips='whole')
    with pytest.raises(clips.BadVideo, match='too long'):
        next(shards.read_clips(str(folder / 'cat' / '0.mp4'), info, given, (0,)))


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'data': 'tfds:x'}, "--data='tfds' is unknown"),
        ({'data': 'folder:'}, 'write behind folder:'),
        ({'clips': 'each'}, "--clips='each' is unknown"),
        ({'crop': 'random'}, "--crop='random' is unknown"),
        ({'encoding': 'png'}, "--encoding='png' is unknown"),
        ({'short': 'pad'}, "--short='pad' is unknown"),
        ({'clips': 'whole', 'frames': 8}, '--clips=whole takes all frames: leave --frames'),
        ({'clips': 'all', 'per_video': 2}, '--per_video=2: .*set --clips=random'),
        ({'fps': 4.0, 'stride': 2}, 'both say which frames'),
    ],
)
def test_wrong_settings(fields, message):
    with pytest.raises(UserError, match=message):
        shards.Settings(**({'data': 'folder:x', 'height': 8, 'width': 8} | fields))
