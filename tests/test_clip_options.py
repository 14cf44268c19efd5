import fractions

import av
import numpy as np
import pytest

from cmd_jax.data import clips
from cmd_jax.data.clip_options import ClipOptions, VideoInfo
from tests.tiny_videos import numbers


def make(**options):
    return ClipOptions(**{'frames': 4, 'height': 8, 'width': 8} | options)


def rng(seed=0):
    return np.random.default_rng(seed)


def test_stride_counts_frames():
    info = VideoInfo(frames=20, fps=10.0)
    options = make(stride=3)
    assert options.least(10.0) == 10 and options.count(info) == 1
    assert options.count(VideoInfo(frames=9, fps=10.0)) == 0
    starts = set()
    for seed in range(200):
        places = options.choose(info, 0, rng(seed)).places
        assert np.diff(places).tolist() == [3, 3, 3]
        starts.add(int(places[0]))
    assert starts == set(range(11))
    assert options.choose(info, 0, None).places.tolist() == [5, 8, 11, 14]
    assert make(clips='center').choose(info, 0, rng()).places.tolist() == [8, 9, 10, 11]


@pytest.mark.parametrize('fps', [24.0, 25.0, 29.97, 60.0])
def test_a_frame_rate_is_kept_by_time(fps):
    info = VideoInfo(frames=100, fps=fps)
    options = make(fps=8.0)
    least = options.least(fps)
    assert options.count(VideoInfo(frames=least, fps=fps)) == 1
    assert options.count(VideoInfo(frames=least - 1, fps=fps)) == 0
    for seed in range(50):
        choice = options.choose(info, 0, rng(seed))
        np.testing.assert_allclose(np.diff(choice.places), 1 / 8)
        assert 0 <= choice.places[0] and choice.places[-1] <= 99 / fps + 1e-9
        # The frame that is shown at a time began at it or before, and no frame is between.
        ahead = choice.places - choice.numbers(fps) / fps
        assert (-2e-3 / fps <= ahead).all() and (ahead < 1 / fps).all()


@pytest.mark.parametrize('step', [{'stride': 2}, {'fps': 5.0}])
def test_all_clips_follow_without_overlap(step):
    options = make(clips='all', **step)
    for frames in range(2, 60):
        info = VideoInfo(frames=frames, fps=10.0)
        found = [options.choose(info, k, None).numbers(10.0) for k in range(options.count(info))]
        assert len(found) == (frames + 1) // 8
        assert [f.tolist() for f in found] == [
            [8 * k, 8 * k + 2, 8 * k + 4, 8 * k + 6] for k in range(len(found))
        ]


@pytest.mark.parametrize(
    'short, expected', [('loop', [0, 2, 1, 0]), ('hold', [0, 2, 2, 2]), ('skip', None)]
)
@pytest.mark.parametrize('step', [{'stride': 2}, {'fps': 5.0}])
def test_short_videos(short, expected, step):
    info, options = VideoInfo(frames=3, fps=10.0), make(short=short, **step)
    assert options.count(info) == (expected is not None)
    assert options.count(VideoInfo(frames=1, fps=10.0)) == 0
    if expected:
        assert options.choose(info, 0, rng()).numbers(10.0).tolist() == expected


def test_parts_of_a_video():
    whole = VideoInfo(frames=100, fps=10.0)
    part = whole.segment(2.0, 5.0)
    assert (part.first, part.frames) == (20, 30)
    assert whole.segment(9.0, np.inf).frames == 10 and whole.segment(9.5, 20.0).frames == 5
    for options in (make(), make(fps=10.0)):
        seen = [options.choose(part, 0, rng(s)).numbers(10.0) for s in range(300)]
        assert min(s[0] for s in seen) == 20 and max(s[-1] for s in seen) in (48, 49)


def test_crop_and_flip_are_drawn_in_training_alone():
    info = VideoInfo(frames=10, fps=10.0)
    drawn = [make(flip=True).choose(info, 0, rng(s)) for s in range(50)]
    assert {c.flip for c in drawn} == {True, False} and len({c.crop for c in drawn}) == 50
    for options in (make(flip=True).fixed(), make(crop='center', clips='center')):
        choice = options.choose(info, 0, rng())
        assert choice.crop == (0.5, 0.5) and not choice.flip
    assert make(clips='all').fixed().clips == 'all'


def varying(path, times, base=1000):
    """A video whose frame k is shown from times[k] on, in seconds."""
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('libx264', rate=base)
        stream.width = stream.height = 32
        stream.pix_fmt, stream.options = 'yuv420p', {'crf': '10', 'bf': '0'}
        stream.codec_context.gop_size = 5
        for k, time in enumerate(times):
            image = np.full((32, 32, 3), 5 * k + 20, np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format='rgb24')
            frame.pts, frame.time_base = round(time * base), fractions.Fraction(1, base)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize('suffix', ['mp4', 'mkv'])
def test_variable_frame_rate_goes_by_time_stamps(tmp_path, suffix):
    times = np.cumsum([0.0, *np.random.default_rng(0).uniform(0.02, 0.3, 39)])
    varying(tmp_path / f'x.{suffix}', times)
    for start in (0.0, 0.31, 1.7, 3.3):
        asked = start + np.arange(8) / 8 + 1e-4
        got = numbers(clips.decode(tmp_path / f'x.{suffix}', asked))
        shown = np.searchsorted(np.round(times, 3), asked, side='right') - 1
        assert got == shown.tolist(), start
    with pytest.raises(clips.BadVideo, match='ends too early'):
        clips.decode(tmp_path / f'x.{suffix}', times[-1] + np.arange(4.0))


@pytest.mark.parametrize('rate', [24, 25, fractions.Fraction(30000, 1001)])
@pytest.mark.parametrize('suffix', ['mp4', 'mkv', 'webm', 'avi'])
def test_times_and_numbers_agree_at_a_constant_rate(tmp_path, suffix, rate):
    path = tmp_path / f'x.{suffix}'
    codec = {'webm': 'libvpx-vp9', 'avi': 'mpeg4'}.get(suffix, 'libx264')
    with av.open(str(path), 'w') as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width = stream.height = 32
        stream.pix_fmt = 'yuv420p'
        stream.codec_context.gop_size = 7
        for k in range(40):
            image = np.full((32, 32, 3), 5 * k + 20, np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format='rgb24')
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    places = np.arange(12) * 2 + 9
    expected = clips.decode(path, places)
    assert numbers(expected) == places.tolist()
    np.testing.assert_array_equal(clips.decode(path, places / float(rate)), expected)
