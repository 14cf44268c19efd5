"""Clips of video files: what a file holds, the frames asked for, fitted to a size.

Decoding is PyAV's (ffmpeg). Frames are uint8 RGB, upright: grey, alpha and other pixel formats
are converted, rotation metadata is applied.
"""

import contextlib
import dataclasses
import fractions
import os

import av
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from cmd_jax import video as video_lib


class BadVideo(Exception):
    """A file without the frames asked for. `reason` is short and free of names, to be counted."""

    def __init__(self, reason: str, detail: str = ''):
        super().__init__(f'{reason} ({detail})' if detail else reason)
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class ClipInfo:
    """Size of a video: number of frames (as its index says), frames per second, upright pixels."""

    frames: int
    fps: float
    height: int
    width: int


def probe(path: str | os.PathLike) -> ClipInfo:
    """What the file holds. Decodes one frame; reads the whole file only if it has no index.

    Raises:
      BadVideo: empty, unreadable, without video stream, or the first frame does not decode.
    """
    with _open(path) as (container, stream):
        first = next(video_lib.frames(container, stream), None)
        if first is None:
            raise BadVideo('no frames')
        height, width = video_lib.upright(first).shape[:2]
        fps = stream.average_rate or stream.guessed_rate
        frames = stream.frames or _count(path)
        if not fps:
            raise BadVideo('no frame rate')
        return ClipInfo(frames, float(fps), height, width)


def decode(
    path: str | os.PathLike, start: int, frames: int, stride: int = 1
) -> UInt8[np.ndarray, 't h w 3']:
    """Frames start, start + stride, ... of a file.

    Decodes from the keyframe before `start`, found by time stamps. Where these are missing or do
    not lead there it decodes from the first frame and counts. In files of variable frame rate,
    `start` is a time: that of the frame at the average rate.

    Raises:
      BadVideo: unreadable, or ends before the last frame asked for.
    """
    clip = []
    if start > 0:
        with _open(path) as (container, stream):
            clip = _take(_from_time(container, stream, start), frames, stride)
    if len(clip) < frames:
        with _open(path) as (container, stream):
            decoded = video_lib.frames(container, stream)
            skipped = sum(1 for _ in zip(range(start), decoded, strict=False))
            clip = _take(decoded, frames, stride)
    if len(clip) < frames:
        end = skipped + (len(clip) - 1) * stride + 1 if clip else skipped
        raise BadVideo('ends too early', f'near frame {end}, asked for {start + frames * stride}')
    if len({frame.shape for frame in clip}) > 1:
        raise BadVideo('frame size changes')
    return np.stack(clip)


def resize_crop(
    video: UInt8[np.ndarray, 't h w 3'],
    height: int,
    width: int,
    crop: str | tuple[float, float] = 'center',
    flip: bool = False,
) -> UInt8[np.ndarray, 't height width 3']:
    """Resizes with antialias until a frame just covers height x width, and crops the rest.

    Args:
      video: uint8 [t h w 3].
      height: of the result, pixels.
      width: of the result, pixels.
      crop: 'center', or (y, x) in [0, 1]: where in the room left the window lies.
      flip: mirror left and right.
    """
    old_height, old_width = video.shape[1:3]
    y, x = (0.5, 0.5) if crop == 'center' else crop
    # The window in source pixels: cropping first, resizing after, is the same and cheaper.
    shrink = min(old_height / height, old_width / width)
    top, left = y * (old_height - height * shrink), x * (old_width - width * shrink)
    box = (left, top, left + width * shrink, top + height * shrink)
    # Rounding may push the window over the border by 1e-13.
    box = tuple(np.clip(box, 0, (old_width, old_height) * 2).tolist())
    if box != (0, 0, width, height) or (old_height, old_width) != (height, width):
        size, how = (width, height), Image.Resampling.BICUBIC
        resized = [Image.fromarray(frame).resize(size, how, box) for frame in video]
        video = np.stack([np.asarray(image) for image in resized])
    return np.ascontiguousarray(video[:, :, ::-1]) if flip else video


@contextlib.contextmanager
def _open(path):
    """The container and its video stream; whatever ffmpeg objects to becomes a BadVideo."""
    try:
        if os.path.getsize(path) == 0:
            raise BadVideo('empty file')
        with video_lib.open_file(path) as container:
            if not container.streams.video:
                raise BadVideo('no video stream')
            stream = container.streams.video[0]
            # Many clips are decoded side by side: threads within one would only compete.
            stream.codec_context.thread_count = 1
            yield container, stream
    except (av.FFmpegError, OSError, ValueError) as e:
        raise BadVideo('unreadable', getattr(e, 'strerror', None) or str(e)) from e


def _count(path):
    """Frames by their packets: reads the file, decodes nothing."""
    with _open(path) as (container, stream):
        return sum(1 for packet in container.demux(stream) if packet.size)


def _from_time(container, stream, start):
    """Decoded frames from number `start` on; none if time stamps do not lead to it."""
    rate = stream.average_rate or stream.guessed_rate
    if not rate or not stream.time_base:
        return
    offset = fractions.Fraction(start) / rate / stream.time_base
    target = round(offset) + (stream.start_time or 0)
    half = fractions.Fraction(1, 2) / rate / stream.time_base
    try:
        container.seek(target, stream=stream, backward=True)
    except av.FFmpegError:
        return  # the container cannot seek
    reached = False
    for i, frame in enumerate(video_lib.frames(container, stream)):
        if frame.pts is None or (i == 0 and frame.pts > target + half):
            return
        reached = reached or frame.pts > target - half
        if reached:
            yield frame


def _take(decoded, frames, stride):
    """Every stride-th of an iterator of frames, as arrays, at most `frames` of them."""
    clip = []
    for i, frame in enumerate(decoded):
        if i % stride == 0:
            clip.append(video_lib.upright(frame))
            if len(clip) == frames:
                break
    return clip
