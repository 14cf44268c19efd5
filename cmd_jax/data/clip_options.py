"""Which frames of a video make a clip: number and rate, place, what to do with short ones, crop."""

import dataclasses
import math

import numpy as np

from cmd_jax.errors import UserError, choose

PLACES = ('random', 'center', 'all')
CROPS = ('random', 'center')
SHORT = ('skip', 'loop', 'hold')


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What a video offers, or the part of it that is to be used.

    Attributes:
      frames: their number.
      fps: frames per second; the average where the rate varies.
      height: of an upright frame, pixels; 0 where that is not known.
      width: of an upright frame.
      first: number of the first frame to be used.
    """

    frames: int
    fps: float
    height: int = 0
    width: int = 0
    first: int = 0

    def segment(self, start: float, end: float) -> 'VideoInfo':
        """The frames that begin at `start` seconds or later, and before `end` (inf: all)."""
        # A time that is a frame's own must not fall to the next one by rounding.
        first = min(math.ceil(start * self.fps - 1e-3), self.frames)
        last = self.frames
        if end != float('inf'):
            last = min(math.ceil(end * self.fps - 1e-3), self.frames)
        return dataclasses.replace(self, first=self.first + first, frames=max(last - first, 0))


@dataclasses.dataclass(frozen=True)
class Choice:
    """One clip of a video.

    Attributes:
      places: of its frames [t], counted from the beginning of the video: numbers of frames (int),
        or times in seconds (float).
      crop: (y, x) in [0, 1]: where in the room left the window lies.
      flip: mirror left and right.
    """

    places: np.ndarray
    crop: tuple[float, float]
    flip: bool

    @property
    def timed(self) -> bool:
        return self.places.dtype.kind == 'f'

    def numbers(self, fps: float) -> np.ndarray:
        """The places as numbers of frames, of a video of constant rate: at each time the frame that
        is shown then."""
        if not self.timed:
            return self.places
        # A time that is a frame's own must not fall to the one before by rounding.
        return np.floor(self.places * fps + 1e-3).astype(np.int64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipOptions:
    """How clips are taken from videos.

    Attributes:
      frames: in a clip.
      height: of a clip, pixels.
      width: of a clip, pixels.
      stride: frames of the video per frame of the clip.
      fps: frames per second of the clip, instead of the stride: each frame is the one that is shown
        at its time, so that videos of any and of varying rate move alike. 0: the stride counts.
      clips: of a video, in an epoch: one at a 'random' place, the one in its 'center', or 'all',
        which follow one another without overlap.
      crop: where the window lies whose sides are as height to width: 'random' or 'center'. It is as
        large as fits.
      flip: mirror half of the clips.
      short: videos that end before a clip does: 'skip' them, 'loop' (begin again) or 'hold' (their
        last frame). One frame alone is always skipped.
    """

    frames: int
    height: int
    width: int
    stride: int = 1
    fps: float = 0.0
    clips: str = 'random'
    crop: str = 'random'
    flip: bool = False
    short: str = 'skip'

    def __post_init__(self):
        choose('clips', self.clips, PLACES)
        choose('crop', self.crop, CROPS)
        choose('short', self.short, SHORT)
        if self.fps and self.stride != 1:
            raise UserError(
                f'fps={self.fps} and stride={self.stride}: both say which frames; leave stride=1'
            )

    def fixed(self) -> 'ClipOptions':
        """The same without chance, for testing: a place and crop in the middle, no flip."""
        clips = 'center' if self.clips == 'random' else self.clips
        return dataclasses.replace(self, clips=clips, crop='center', flip=False)

    def least(self, fps: float) -> int:
        """Frames that a video of this rate must have."""
        if self.short != 'skip':
            return min(2, self.frames)
        if self.fps:
            # The first frame at or behind the last time.
            return int(np.ceil((self.frames - 1) * fps / self.fps - 1e-3)) + 1
        return (self.frames - 1) * self.stride + 1

    def count(self, info: VideoInfo) -> int:
        """How many clips the video gives: none if it is too short."""
        if info.frames < self.least(info.fps):
            return 0
        if self.clips != 'all':
            return 1
        step, last = self._scale(info)
        # One unit of the last place: times are sums of fractions.
        room = last - (self.frames - 1) * step
        return max(int(np.floor(room / (self.frames * step) + 1e-6)), 0) + 1

    def choose(self, info: VideoInfo, which: int, rng: np.random.Generator | None) -> Choice:
        """Clip `which` of those that `count` counts; `rng` for what is random, or the middle."""
        step, last = self._scale(info)
        room = max(last - (self.frames - 1) * step, 0)
        if self.clips == 'all':
            start = which * self.frames * step
        elif self.clips == 'center' or rng is None:
            start = room / 2 if self.fps else room // 2
        else:
            start = rng.uniform(0, room) if self.fps else int(rng.integers(room + 1))
        places = start + np.arange(self.frames) * step
        if self.short == 'loop':
            # Seconds: the last frame lasts as long as the others.
            places = places % (last + 1 / info.fps if self.fps else last + 1)
        elif self.short == 'hold':
            places = np.minimum(places, last)
        places = places + (info.first / info.fps if self.fps else info.first)
        crop, flip = (0.5, 0.5), False
        if rng is not None and self.crop == 'random':
            crop = tuple(rng.random(2).tolist())
        if rng is not None and self.flip:
            flip = bool(rng.random() < 0.5)
        return Choice(places, crop, flip)

    def _scale(self, info: VideoInfo):
        """Distance of the clip's frames, and the place of the video's last frame, both in frames or
        both in seconds."""
        if self.fps:
            return 1 / self.fps, (info.frames - 1) / info.fps
        return self.stride, info.frames - 1
