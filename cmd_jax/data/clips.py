"""Clips of video files: what a file holds, the frames asked for, fitted to a size.

Decoding is PyAV's (ffmpeg). Frames are uint8 RGB, upright: grey, alpha, deep and other pixel
formats are converted, rotation metadata is applied.
"""

import contextlib
import dataclasses
import fractions
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from jaxtyping import Shaped, UInt8
from PIL import Image

from cmd_jax import video as video_lib
from cmd_jax.data import files
from cmd_jax.data.clip_options import Choice, VideoInfo

TIMEOUT = 30.0  # seconds for one clip of a file
# Reasons: shorter than a clip; ends, or is damaged, before the last frame asked for.
TOO_SHORT, TOO_EARLY, UNREADABLE = 'too short', 'ends too early', 'unreadable'
Frame = UInt8[np.ndarray, 'h w 3']


class BadVideo(Exception):
    """A file without the frames asked for. `reason` is short and free of names, to be counted."""

    def __init__(self, reason: str, detail: str = ''):
        super().__init__(f'{reason} ({detail})' if detail else reason)
        self.reason, self.detail = reason, detail


@dataclasses.dataclass(frozen=True)
class Skipped:
    """What a source gives in the place of a clip that cannot be had.

    Attributes:
      file: which.
      reason: short and free of names, to be counted.
      detail: more of it.
    """

    file: str
    reason: str
    detail: str = ''

    def __str__(self) -> str:
        return f'{self.file}: {self.reason}' + (f' ({self.detail})' if self.detail else '')


def probe(path: str | os.PathLike, timeout: float = TIMEOUT) -> VideoInfo:
    """What the file holds. Decodes one frame; reads the whole file only if it has no index.

    Raises:
      BadVideo: empty, unreadable, without video stream, the first frame does not decode, or all of
        it takes longer than `timeout` seconds.
    """
    limit = Deadline(timeout)
    with _open(path, limit) as (container, stream):
        first = next(video_lib.frames(container, stream, limit.check), None)
        if first is None:
            raise BadVideo('no frames')
        height, width = first.height, first.width
        if round(first.rotation / 90) % 2:
            height, width = width, height
        fps = stream.average_rate or stream.guessed_rate
        frames = stream.frames or _count(path, limit)
        if not fps:
            raise BadVideo('no frame rate')
        return VideoInfo(frames=frames, fps=float(fps), height=height, width=width)


def decode(
    path: str | os.PathLike,
    places: Shaped[np.ndarray, 't'],
    fit: Callable[[Frame], Frame] = np.asarray,
    timeout: float = TIMEOUT,
) -> UInt8[np.ndarray, 't h2 w2 3']:
    """Frames of a file at places that ascend.

    Decodes from the keyframe before the first place, found by time stamps. Where these are missing
    or do not lead there it decodes from the first frame and counts.

    Args:
      path: file or URL.
      places: numbers of frames (int), or times in seconds (float): the frame shown then. In files
        of variable frame rate the number of the first frame means a time: that of the frame at the
        average rate; the others are counted from there.
      fit: what is kept of a frame; whole frames of a large video are never held together.
      timeout: seconds for all of it.

    Raises:
      BadVideo: unreadable, ends before the last frame asked for, or takes too long.
    """
    limit = Deadline(timeout)
    clip = []
    if places.dtype.kind == 'f':
        with _open(path, limit) as (container, stream):
            clip = _at_times(container, stream, places, fit, limit)
            rate = stream.average_rate or stream.guessed_rate
        if clip is None:  # no time stamps
            places = Choice(places, (0, 0), False).numbers(float(rate or 1))
            return decode(path, places, fit, limit.left())
    else:
        if places[0] > 0:
            with _open(path, limit) as (container, stream):
                frames = _from_time(container, stream, int(places[0]), limit)
                clip = _take(frames, places - places[0], fit)
        if len(clip) < len(places):
            with _open(path, limit) as (container, stream):
                frames = video_lib.frames(container, stream, limit.check)
                clip = _take(frames, places, fit)
    if len(clip) < len(places):
        raise BadVideo(TOO_EARLY, f'{len(clip)} of {len(places)} frames of the clip')
    if len({frame.shape for frame in clip}) > 1:
        raise BadVideo('frame size changes')
    return np.stack(clip)


def read(
    path: str | os.PathLike,
    choice: Choice,
    height: int,
    width: int,
    timeout: float = TIMEOUT,
) -> UInt8[np.ndarray, 't height width 3']:
    """A clip of a file, fitted to height x width; errors as in `decode`."""
    places, order = np.unique(choice.places, return_inverse=True)

    def shrink(frame):
        return fit_frame(frame, height, width, choice.crop, choice.flip)

    return decode(path, places, shrink, timeout)[order]


def fit(
    frames: Iterable[Frame],
    height: int,
    width: int,
    crop: tuple[float, float] = (0.5, 0.5),
    flip: bool = False,
) -> UInt8[np.ndarray, 't height width 3']:
    """`fit_frame` of each frame."""
    return np.stack([fit_frame(frame, height, width, crop, flip) for frame in frames])


def fit_frame(
    frame: Frame,
    height: int,
    width: int,
    crop: tuple[float, float] = (0.5, 0.5),
    flip: bool = False,
) -> UInt8[np.ndarray, 'height width 3']:
    """Resizes with antialias (bicubic) until the frame just covers height x width, and crops the
    rest.

    Args:
      frame: uint8 [h w 3].
      height: of the result, pixels.
      width: of the result, pixels.
      crop: (y, x) in [0, 1]: where in the room left the window lies; (0.5, 0.5): in the middle.
      flip: mirror left and right.
    """
    old_height, old_width = frame.shape[:2]
    y, x = crop
    # The window in source pixels: cropping first, resizing after, is the same and cheaper.
    shrink = min(old_height / height, old_width / width)
    if shrink == 1:  # whole pixels: nothing is interpolated
        top, left = round(y * (old_height - height)), round(x * (old_width - width))
        frame = frame[top : top + height, left : left + width]
        return np.ascontiguousarray(frame[:, ::-1] if flip else frame)
    top, left = y * (old_height - height * shrink), x * (old_width - width * shrink)
    box = (left, top, left + width * shrink, top + height * shrink)
    # Rounding may push the window over the border by 1e-13.
    box = tuple(min(max(v, 0.0), size) for v, size in zip(box, (old_width, old_height) * 2))
    image = Image.fromarray(frame)
    frame = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box))
    return np.ascontiguousarray(frame[:, ::-1]) if flip else frame


class Deadline:
    """A time limit that is looked at between packets.

    Raises:
      BadVideo: in `check`, when the time is up.
    """

    def __init__(self, seconds: float):
        self.seconds, self._end = seconds, time.monotonic() + seconds

    def left(self) -> float:
        return max(self._end - time.monotonic(), 0.0)

    def check(self, packet: av.Packet | None = None):
        if time.monotonic() > self._end:
            raise BadVideo('takes too long', f'more than {self.seconds:g} s')


@contextlib.contextmanager
def _open(path, limit):
    """The container and its video stream; whatever ffmpeg objects to becomes a BadVideo."""
    path = os.fspath(path)
    try:
        with contextlib.ExitStack() as stack:
            if files.is_url(path):
                fs = files.system(path)
                if not fs.size(path):
                    raise BadVideo('empty file')
                source = stack.enter_context(fs.open(path, 'rb'))
            else:
                about, source = os.stat(path), path
                # Reading from a pipe or a device would wait for ever.
                if not stat.S_ISREG(about.st_mode):
                    raise BadVideo('not a file')
                if about.st_size == 0:
                    raise BadVideo('empty file')
            container = video_lib.open_file(source, timeout=max(limit.left(), 1e-3))
            stack.enter_context(container)
            if not container.streams.video:
                raise BadVideo('no video stream')
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise BadVideo('no decoder')
            # Many clips are decoded side by side: threads within one would only compete.
            stream.codec_context.thread_count = 1
            yield container, stream
    except video_lib.BROKEN as e:
        limit.check()
        raise BadVideo(UNREADABLE, getattr(e, 'strerror', None) or str(e)) from e


def _count(path, limit):
    """Frames by their packets: reads the file, decodes nothing."""
    count = 0
    with _open(path, limit) as (container, stream):
        for packet in container.demux(stream):
            limit.check()
            count += packet.size > 0
    return count


def _seek(container, stream, start, limit):
    """Decoded frames from the keyframe before the time stamp `start` on; none if it cannot be
    sought."""
    try:
        container.seek(start, stream=stream, backward=True)
    except av.FFmpegError:
        return iter(())
    context = stream.codec_context

    def before(packet):
        limit.check()
        # Of what is over before the clip, only frames that others refer to are decoded.
        early = packet.pts is not None and 0 < (packet.duration or 0) <= start - packet.pts
        context.skip_frame = 'NONREF' if early else 'DEFAULT'

    return video_lib.frames(container, stream, before)


def _from_time(container, stream, start, limit):
    """Decoded frames from number `start` on; none if time stamps do not lead to it."""
    rate = stream.average_rate or stream.guessed_rate
    if not rate or not stream.time_base:
        return
    offset = fractions.Fraction(start) / rate / stream.time_base
    target = round(offset) + (stream.start_time or 0)
    half = fractions.Fraction(1, 2) / rate / stream.time_base
    reached = False
    for i, frame in enumerate(_seek(container, stream, int(target - half), limit)):
        if frame.pts is None or (i == 0 and frame.pts > target + half):
            return
        reached = reached or frame.pts > target - half
        if reached:
            yield frame


def _at_times(container, stream, times, fit, limit) -> list | None:
    """The frames shown at the times; fewer where the video ends; None without time stamps."""
    base, start = stream.time_base, stream.start_time or 0
    if not base:
        return None
    # Stamps are rounded to their unit.
    targets = [float(fractions.Fraction(t) / base) + start + 0.501 for t in times]
    clip, shown, convert = [], None, _converter()
    if times[0] > 0:
        frames = _seek(container, stream, int(targets[0]), limit)
    else:
        frames = video_lib.frames(container, stream, limit.check)
    for i, frame in enumerate(frames):
        if frame.pts is None:
            return None
        if i == 0 and frame.pts > targets[0] and times[0] > 0:
            return None
        while shown is not None and len(clip) < len(times) and targets[len(clip)] < frame.pts:
            clip.append(fit(convert(shown)))
        if len(clip) == len(times):
            return clip
        # The first frame of a file counts as shown from its beginning.
        shown = frame
    if shown is None:
        return None if times[0] > 0 else clip
    rate = stream.average_rate or stream.guessed_rate or 25
    lasts = shown.pts + max(shown.duration or 0, 2 / rate / base)
    while len(clip) < len(times) and targets[len(clip)] <= lasts:
        clip.append(fit(convert(shown)))
    return clip


def _take(decoded: Iterator[av.VideoFrame], places, fit) -> list:
    """Of an iterator of frames those with the numbers `places`, as long as there are any."""
    clip, convert = [], _converter()
    for i, frame in enumerate(decoded):
        if i == places[len(clip)]:
            clip.append(fit(convert(frame)))
            if len(clip) == len(places):
                break
    return clip


def _converter() -> Callable[[av.VideoFrame], Frame]:
    """`video.upright` whose setting up is shared by the frames of a clip."""
    reformatter = VideoReformatter()
    return lambda frame: video_lib.upright(frame, reformatter)
