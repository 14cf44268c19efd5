import dataclasses
import logging as py_logging
import struct

import av
import numpy as np
import pytest

from cmd_jax import video as video_lib
from cmd_jax.data import clips, pipeline, sources
from cmd_jax.errors import UserError


def numbered(frames=40, height=32, width=48):
    """Frame t is grey 5 t + 20: what was decoded says where it comes from."""
    grey = (5 * np.arange(frames) + 20).astype(np.uint8)
    return np.broadcast_to(grey[:, None, None, None], (frames, height, width, 3)).copy()


def numbers(video):
    return np.rint((video.mean(axis=(1, 2, 3)) - 20) / 5).astype(int).tolist()


@pytest.fixture
def log(caplog, monkeypatch):
    """Messages of absl, which keeps them from the root logger."""
    monkeypatch.setattr(py_logging.getLogger('absl'), 'propagate', True)
    sources._log_once.cache_clear()
    caplog.set_level('INFO', 'absl')
    return caplog


# Clips


@pytest.mark.parametrize('fps, suffix', [(8, '.mp4'), (29.97, '.mp4'), (25, '.gif')])
def test_probe_and_decode_agree_with_the_whole_file(tmp_path, fps, suffix):
    path = tmp_path / f'clip{suffix}'
    video_lib.write(path, numbered(), fps=fps)
    info = clips.probe(path)
    assert dataclasses.astuple(info) == (40, pytest.approx(fps, rel=1e-3), 32, 48)
    whole = video_lib.read(path)
    assert numbers(whole) == list(range(40))
    for start, frames, stride in [(0, 40, 1), (1, 5, 1), (17, 4, 3), (39, 1, 1), (13, 2, 26)]:
        clip = clips.decode(path, start, frames, stride)
        np.testing.assert_array_equal(clip, whole[start : start + frames * stride : stride])
    with pytest.raises(clips.BadVideo, match='ends too early.*frame 40'):
        clips.decode(path, 30, 11)


def encode(path, video, codec, keyframes):
    with av.open(str(path), 'w') as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = video.shape[1:3]
        stream.pix_fmt = 'bgra' if codec == 'ffv1' else 'yuv420p'
        if keyframes:
            stream.codec_context.gop_size = keyframes
        for image in video:
            frame = av.VideoFrame.from_ndarray(image, format='rgb24')
            container.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
        container.mux(stream.encode())


@pytest.mark.parametrize(
    'name, codec, keyframes',
    [
        ('keyframes.mp4', 'libx264', 7),  # B-frames: decoding order is not showing order
        ('keyframes.mkv', 'libx264', 7),  # no frame count in the header
        ('old.avi', 'mpeg4', 5),
        ('raw.m1v', 'mpeg1video', 5),  # time stamps are guessed by ffmpeg
        ('raw.h264', 'libx264', 7),  # no time stamps, no index
        ('alpha.mkv', 'ffv1', None),  # an alpha channel
    ],
)
def test_decode_of_containers(tmp_path, name, codec, keyframes):
    path = tmp_path / name
    encode(path, numbered(), codec, keyframes)
    assert clips.probe(path).frames == 40
    whole = video_lib.read(path)
    got = numbers(clips.decode(path, 23, 6, 2))
    if name == 'raw.m1v':  # lands near the place, in frames that follow each other
        assert np.diff(got).tolist() == [2] * 5 and abs(got[0] - 23) <= 10
    else:
        assert got == numbers(whole)[23:35:2]


def test_rotation_metadata_is_applied(tmp_path):
    path = tmp_path / 'x.mp4'
    video = numbered(3, 16, 32)
    video[:, :8, :8] = 255  # a mark at the top left
    video_lib.write(path, video)
    data = bytearray(path.read_bytes())
    # A clockwise quarter turn as 3x3 fixed-point matrix, 40 bytes into the track header.
    matrix = struct.pack('>9i', 0, 1 << 16, 0, -(1 << 16), 0, 0, 16 << 16, 0, 1 << 30)
    place = data.index(b'tkhd') + 4 + 40
    data[place : place + 36] = matrix
    path.write_bytes(data)
    info, clip = clips.probe(path), clips.decode(path, 1, 2)
    assert (info.height, info.width) == (32, 16) == clip.shape[1:3]
    assert clip[0, 2, 13].min() > 240 and clip[0, 2, 2].max() < 100


def hostile(folder):
    """Broken files of every kind; {name: the reason expected}."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'zero.mp4').touch()
    (folder / 'text.mp4').write_text('this is no video\n' * 50)
    (folder / 'link.mp4').symlink_to(folder / 'absent.mp4')
    encode(folder / 'cut.mp4', numbered(), 'libx264', 7)  # its index is at the end
    data = (folder / 'cut.mp4').read_bytes()
    (folder / 'cut.mp4').write_bytes(data[: len(data) // 2])
    with av.open(str(folder / 'sound.mp4'), 'w') as container:
        stream = container.add_stream('aac', rate=44100)
        silence = np.zeros((1, 1024), np.float32)
        frame = av.AudioFrame.from_ndarray(silence, format='fltp', layout='mono')
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return {
        'zero.mp4': 'empty file',
        'text.mp4': 'unreadable',
        'link.mp4': 'unreadable',
        'cut.mp4': 'unreadable',
        'sound.mp4': 'no video stream',
    }


def test_probe_rejects_broken_files(tmp_path):
    for name, reason in hostile(tmp_path / 'x').items():
        with pytest.raises(clips.BadVideo) as error:
            clips.probe(tmp_path / 'x' / name)
        assert error.value.reason == reason, name
        with pytest.raises(clips.BadVideo):
            clips.decode(tmp_path / 'x' / name, 3, 2)


def circle(height, width, radius, y, x):
    rows, columns = np.mgrid[:height, :width]
    inside = (rows - y) ** 2 + (columns - x) ** 2 < radius**2
    return np.repeat((255 * inside).astype(np.uint8)[None, :, :, None], 3, axis=-1)


@pytest.mark.parametrize('size', [(20, 20), (20, 50), (60, 30), (100, 300)])
def test_resize_crop_is_true_to_aspect(size):
    out = clips.resize_crop(circle(100, 160, 20, 49.5, 79.5), *size)
    assert out.shape == (1, *size, 3)
    light = out[0, ..., 0] / 255
    shown = 20 * max(size[0] / 100, size[1] / 160)
    if shown < min(size) / 2:
        assert light.sum() == pytest.approx(np.pi * shown**2, rel=0.03)
    np.testing.assert_allclose(light, light[::-1, ::-1], atol=0.02)  # in the middle


def test_resize_crop_places_the_window():
    video = np.arange(30, dtype=np.uint8)[None, None, :, None].repeat(10, 1).repeat(3, 3)
    left, right = (clips.resize_crop(video, 10, 10, (0.5, x)) for x in (0, 1))
    np.testing.assert_array_equal(left[0, 0, :, 0], np.arange(10))
    np.testing.assert_array_equal(right[0, 0, :, 0], np.arange(20, 30))
    centre = clips.resize_crop(video, 10, 10, flip=True)
    np.testing.assert_array_equal(centre[0, 0, :, 0], np.arange(10, 20)[::-1])
    np.testing.assert_array_equal(clips.resize_crop(video, 10, 30), video)
    for y, x in np.random.default_rng(0).random((50, 2)):  # no rounding leaves the frame
        assert clips.resize_crop(video, 7, 3, (y, x)).shape == (1, 7, 3, 3)


def test_resize_has_antialias():
    checkers = np.indices((64, 64)).sum(0) % 2 * 255
    video = checkers.astype(np.uint8)[None, :, :, None].repeat(3, -1)
    small = clips.resize_crop(video, 8, 8)
    assert abs(small[:, 1:-1, 1:-1].astype(int) - 127).max() <= 3


# Folder


@pytest.fixture
def folder(tmp_path):
    for name in ('cat', 'FlyingBird'):
        for i in range(4):
            video_lib.write(tmp_path / name / f'{i}.mp4', numbered(20 + i, 24, 40))
    return tmp_path


SIZES = {'frames': 8, 'height': 16, 'width': 16}


def test_folder_gives_clips_with_classes(folder, log):
    (folder / 'notes.txt').write_text('x')
    (folder / '.hidden.mp4').write_text('x')
    splits = {s: sources.make_source('folder', folder, split=s, **SIZES) for s in sources.SPLITS}
    assert splits['train'].class_names == splits['test'].class_names == ['FlyingBird', 'cat']
    assert len(splits['train']) + len(splits['test']) == 8 and len(splits['test']) >= 1
    assert not splits['train'].skipped
    line = f'folder: 8 clips ({len(splits["train"])} to train) in 2 classes'
    assert log.messages.count(line) == 1
    for source in splits.values():
        for i in range(len(source)):
            sample = source[i]
            assert sample['video'].shape == (8, 16, 16, 3) and sample['index'] == i
            assert sample['caption'] == ['flying bird', 'cat'][sample['label']]


def test_folder_clips_are_random_in_training_only(folder):
    train = sources.VideoFolder(folder, frames=4, stride=3, height=24, width=40)
    test = sources.VideoFolder(folder, 'test', frames=4, stride=3, height=24, width=40)
    starts = set()
    for seed in range(30):
        got = numbers(train.__getitem__(0, np.random.default_rng(seed))['video'])
        assert np.diff(got).tolist() == [3, 3, 3]
        starts.add(got[0])
    longest = train._files[0][1].frames - 10
    assert len(starts) > 5 and min(starts) <= 1 and longest - 1 <= max(starts) <= longest
    fixed = numbers(test[0]['video'])
    assert fixed == numbers(test.__getitem__(0, np.random.default_rng(0))['video'])
    assert fixed[0] == (test._files[0][1].frames - 10) // 2


def test_folder_crops_and_flips_in_training(tmp_path):
    video = np.zeros((4, 16, 64, 3), np.uint8)
    video[:] = 3 * np.arange(64, dtype=np.uint8)[:, None]
    video_lib.write(tmp_path / 'x.mp4', video)
    places = {True: [], False: []}
    for flip in (True, False):
        source = sources.VideoFolder(tmp_path, frames=4, height=16, width=16, flip=flip)
        for seed in range(20):
            row = source.__getitem__(0, np.random.default_rng(seed))['video'][0, 8, :, 0].astype(
                int
            )
            places[flip].append((row.min() / 3, row[-1] > row[0]))
    assert {up for _, up in places[True]} == {True, False}
    assert {up for _, up in places[False]} == {True}
    assert min(places[False])[0] < 8 and max(places[False])[0] > 40


def test_folder_skips_and_counts_broken_files(folder, log):
    expected = hostile(folder / 'cat')
    video_lib.write(folder / 'cat' / 'short.mp4', numbered(5))
    video_lib.write(folder / 'cat' / 'still.mp4', numbered(1))
    video_lib.write(folder / 'stray.mp4', numbered())
    source = sources.VideoFolder(folder, **SIZES)
    reasons = {f.removeprefix('cat/'): r.split(' (')[0] for f, r in source.skipped.items()}
    expected |= {'short.mp4': 'too short', 'still.mp4': 'too short'}
    assert reasons == expected | {'stray.mp4': 'beside the class folders'}
    line = next(m for m in log.messages if m.startswith('folder: 8 clips'))
    assert 'skipped 8: 3 unreadable, 2 too short, ' in line
    assert '1 empty file' in line and '(first: cat/' in line and '\n' not in line

    looped = sources.VideoFolder(folder, short='loop', **SIZES)
    assert 'cat/short.mp4' not in looped.skipped and 'cat/still.mp4' in looped.skipped


def test_short_videos_loop(tmp_path):
    video_lib.write(tmp_path / 'x.mp4', numbered(5))
    source = sources.VideoFolder(tmp_path, frames=8, stride=2, height=16, width=16, short='loop')
    got = source.__getitem__(0, np.random.default_rng(0))
    assert numbers(got['video']) == [0, 2, 4, 1, 3, 0, 2, 4]
    assert source.class_names == [] and got['label'] == 0 and got['caption'] == ''


def test_split_is_stable_and_never_empty():
    files = [f'{i}.mp4' for i in range(1000)]
    split = sources.split_files(files, 0.1)
    assert set(split['train']) | set(split['test']) == set(files)
    assert len(split['train']) + len(split['test']) == 1000 and 70 < len(split['test']) < 130
    fewer = sources.split_files(files[::2], 0.1)
    assert set(fewer['test']) <= set(split['test'])
    for n in (2, 3, 5):
        small = sources.split_files(files[:n], 0.001)
        assert len(small['test']) == 1 and len(small['train']) == n - 1
        assert len(sources.split_files(files[:n], 0.999)['train']) == 1
    assert sources.split_files(['x'], 0.1) == {'train': ['x'], 'test': ['x']}


def test_single_file_serves_both_splits(tmp_path, log):
    video_lib.write(tmp_path / 'x.mp4', numbered())
    lengths = [len(sources.VideoFolder(tmp_path, split, **SIZES)) for split in sources.SPLITS]
    assert lengths == [1, 1]
    assert any('the only file serves for training and testing' in m for m in log.messages)


def test_links_to_folders_are_followed_once(tmp_path, folder):
    (folder / 'cat' / 'up').symlink_to(folder)
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'link').symlink_to(folder / 'FlyingBird')
    assert len(sources.find_videos(str(folder / 'cat'))) == 8
    assert len(sources.find_videos(str(tmp_path / 'other'))) == 4


def test_unusable_folders_are_user_errors(tmp_path):
    with pytest.raises(UserError, match='absent.*does not exist'):
        sources.VideoFolder(tmp_path / 'absent')
    (tmp_path / 'notes.txt').write_text('x')
    with pytest.raises(UserError, match='is a file'):
        sources.VideoFolder(tmp_path / 'notes.txt')
    with pytest.raises(UserError, match='no video file in it .1 other'):
        sources.VideoFolder(tmp_path)
    hostile(tmp_path)
    with pytest.raises(UserError, match='none of its 5 video files.*3 unreadable') as error:
        sources.VideoFolder(tmp_path)
    assert '\n' not in str(error.value)
    video_lib.write(tmp_path / 'short.mp4', numbered(7))
    with pytest.raises(UserError, match="1 too short.*short='loop'"):
        sources.VideoFolder(tmp_path, **SIZES)


def cut_in_half(path):
    """Damages a file whose header stays whole (the index comes first in our mp4)."""
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b'mdat') + 60])


def test_files_that_fail_later_are_passed_over(folder, log):
    source = sources.VideoFolder(folder, frames=20, height=16, width=16)
    bad = source._files[2][0]
    cut_in_half(folder / bad)
    assert source[2] is None and source[2] is None
    assert sum(bad in m for m in log.messages) == 1
    assert source[0]['video'].shape == (20, 16, 16, 3)
    options = {'seed': 0, 'shuffle': True}
    batches = list(pipeline.make_dataset(source, 3, repeat=False, **options))
    assert sorted(np.concatenate([b['index'] for b in batches])) == [0, 1, *range(3, len(source))]
    assert [len(b['index']) for b in batches[:-1]] == [3] * (len(batches) - 1)
    endless = iter(pipeline.make_dataset(source, 3, repeat=True, **options))
    assert [next(endless)['video'].shape[0] for _ in range(6)] == [3] * 6

    for file, _, _ in source._files:
        cut_in_half(folder / file)
    with pytest.raises(UserError, match='failed to decode'):
        next(iter(pipeline.make_dataset(source, 3, repeat=True, **options)))
