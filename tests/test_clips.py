import dataclasses
import struct

import numpy as np
import pytest

from cmd_jax import video as video_lib
from cmd_jax.data import clips
from tests.tiny_videos import encode, hostile, numbered, numbers


def cut(path, start, frames, stride=1):
    return clips.decode(path, start + stride * np.arange(frames))


@pytest.mark.parametrize('fps, suffix', [(8, '.mp4'), (29.97, '.mp4'), (25, '.gif')])
def test_probe_and_decode_agree_with_the_whole_file(tmp_path, fps, suffix):
    path = tmp_path / f'clip{suffix}'
    video_lib.write(path, numbered(), fps=fps)
    info = clips.probe(path)
    assert dataclasses.astuple(info) == (40, pytest.approx(fps, rel=1e-3), 32, 48, 0)
    whole = video_lib.read(path)
    assert numbers(whole) == list(range(40))
    for start, frames, stride in [(0, 40, 1), (1, 5, 1), (17, 4, 3), (39, 1, 1), (13, 2, 26)]:
        clip = cut(path, start, frames, stride)
        np.testing.assert_array_equal(clip, whole[start : start + frames * stride : stride])
    with pytest.raises(clips.BadVideo, match='ends too early .10 of 11 frames'):
        cut(path, 30, 11)


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
    got = numbers(cut(path, 23, 6, 2))
    if name == 'raw.m1v':  # lands near the place, in frames that follow each other
        assert np.diff(got).tolist() == [2] * 5 and abs(got[0] - 23) <= 10
    else:
        assert got == numbers(whole)[23:35:2]


@pytest.mark.parametrize('pix_fmt', ['gray', 'gray10le', 'yuv420p', 'yuv420p10le', 'yuv444p12le'])
def test_decode_of_pixel_formats(tmp_path, pix_fmt):
    """And of odd sizes: 8 bits of red, green and blue come out, of the same brightness."""
    path, video = tmp_path / 'x.mkv', numbered(10, 33, 47)
    video[:, :16] //= 2
    encode(path, video, 'ffv1', None, pix_fmt)
    info, clip = clips.probe(path), cut(path, 2, 4, 2)
    assert (info.frames, info.height, info.width) == (10, 33, 47)
    assert clip.dtype == np.uint8 and clip.shape == (4, 33, 47, 3)
    assert np.abs(clip.astype(int) - video[2:10:2]).max() <= 2


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
    info, clip = clips.probe(path), cut(path, 1, 2)
    assert (info.height, info.width) == (32, 16) == clip.shape[1:3]
    assert clip[0, 2, 13].min() > 240 and clip[0, 2, 2].max() < 100


def test_probe_rejects_broken_files(tmp_path):
    for name, reason in hostile(tmp_path / 'x').items():
        with pytest.raises(clips.BadVideo) as error:
            clips.probe(tmp_path / 'x' / name)
        assert error.value.reason == reason, name
        with pytest.raises(clips.BadVideo):
            cut(tmp_path / 'x' / name, 3, 2)


def circle(height, width, radius, y, x):
    rows, columns = np.mgrid[:height, :width]
    inside = (rows - y) ** 2 + (columns - x) ** 2 < radius**2
    return np.repeat((255 * inside).astype(np.uint8)[None, :, :, None], 3, axis=-1)


@pytest.mark.parametrize('size', [(20, 20), (20, 50), (60, 30), (100, 300)])
def test_fit_is_true_to_aspect(size):
    out = clips.fit(circle(100, 160, 20, 49.5, 79.5), *size)
    assert out.shape == (1, *size, 3)
    light = out[0, ..., 0] / 255
    shown = 20 * max(size[0] / 100, size[1] / 160)
    if shown < min(size) / 2:
        assert light.sum() == pytest.approx(np.pi * shown**2, rel=0.03)
    np.testing.assert_allclose(light, light[::-1, ::-1], atol=0.02)  # in the middle


def test_fit_places_the_window():
    video = np.arange(30, dtype=np.uint8)[None, None, :, None].repeat(10, 1).repeat(3, 3)
    left, right = (clips.fit(video, 10, 10, (0.5, x)) for x in (0, 1))
    np.testing.assert_array_equal(left[0, 0, :, 0], np.arange(10))
    np.testing.assert_array_equal(right[0, 0, :, 0], np.arange(20, 30))
    centre = clips.fit(video, 10, 10, flip=True)
    np.testing.assert_array_equal(centre[0, 0, :, 0], np.arange(10, 20)[::-1])
    np.testing.assert_array_equal(clips.fit(video, 10, 30), video)
    for y, x in np.random.default_rng(0).random((50, 2)):  # no rounding leaves the frame
        assert clips.fit(video, 7, 3, (y, x)).shape == (1, 7, 3, 3)


def test_fit_has_antialias():
    checkers = np.indices((64, 64)).sum(0) % 2 * 255
    video = checkers.astype(np.uint8)[None, :, :, None].repeat(3, -1)
    small = clips.fit(video, 8, 8)
    assert abs(small[:, 1:-1, 1:-1].astype(int) - 127).max() <= 3
