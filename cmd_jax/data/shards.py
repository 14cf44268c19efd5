"""One shard of prepared videos: a range of the videos of a split, read, made small, and written.

This is what processes of Beam's run for `prepare`, so it is a module that they can import.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
from jaxtyping import UInt8

from cmd_jax.data import files, records, sources
from cmd_jax.data.clip_options import PLACES, SHORT, ClipOptions, VideoInfo
from cmd_jax.data.clips import (
    TIMEOUT,
    TOO_EARLY,
    TOO_SHORT,
    UNREADABLE,
    BadVideo,
    Frame,
    decode,
    fit_frame,
)
from cmd_jax.data.videos import Listing, VideoFiles
from cmd_jax.errors import UserError, choose

CLIPS = (*PLACES, 'whole')
CROPS = ('none', 'center')
ENCODINGS = ('raw', 'jpeg')
FRAMES = 16  # of a clip, where nothing is said
# Clips that follow one another are decoded together: alone, each would begin at a keyframe that
# lies before it.
TOGETHER, TOGETHER_BYTES = 64, 2**27
MAX_BYTES = 2**31  # of a record, about; it lies in memory more than once
MAX_FRAMES = 10**7  # of a file whose header is not believed
Clip = UInt8[np.ndarray, 't h w 3']


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the content of the shards.

    Attributes:
      data: 'KIND:WHERE', KIND one of sources.FILES.
      height: of stored frames, pixels.
      width: of stored frames, pixels.
      clips: of a video: 'all' that follow one another, 'random' ones, the one in the 'center', or
        the 'whole' video.
      frames: in a clip, 16 where nothing is said; None for whole videos.
      stride: frames of the video per stored frame.
      fps: stored frames per second, instead of the stride; 0: the stride counts.
      crop: 'center': to height x width. 'none': frames just cover height x width, and what hangs
        over is stored. Where nothing is said, whole videos are not cropped and clips are.
      encoding: 'raw', or 'jpeg' frame by frame.
      short: clips of videos that are too short, see `ClipOptions`.
      per_video: random clips of a video.
      fold: of ucf101.
      test_fraction: see `VideoFiles`.
      timeout: seconds for a clip, or for a whole video.
      videos_per_shard: of the list, those included that are skipped.
      seed: of random clips.
    """

    data: str
    height: int
    width: int
    clips: str = 'all'
    frames: int | None = None
    stride: int = 1
    fps: float = 0.0
    crop: str | None = None
    encoding: str = 'raw'
    short: str = 'skip'
    per_video: int = 1
    fold: int = 1
    test_fraction: float = 0.1
    timeout: float = TIMEOUT
    videos_per_shard: int = 256
    seed: int = 0

    def __post_init__(self):
        kind, _, where = self.data.partition(':')
        choose('--data', kind, sources.FILES)
        if not where:
            raise UserError(f'--data={self.data!r}: write behind {kind}: where it is')
        choose('--clips', self.clips, CLIPS)
        whole = self.clips == 'whole'
        if self.crop is None:
            object.__setattr__(self, 'crop', 'none' if whole else 'center')
        choose('--crop', self.crop, CROPS)
        choose('--encoding', self.encoding, ENCODINGS)
        choose('--short', self.short, SHORT)
        if whole and (self.frames or self.short != 'skip'):
            raise UserError(
                f'--clips=whole takes all frames: leave --frames (here {self.frames}) and --short '
                f'(here {self.short}), or choose other clips'
            )
        if not whole and not self.frames:
            object.__setattr__(self, 'frames', FRAMES)
        if self.per_video != 1 and self.clips != 'random':
            raise UserError(
                f'--per_video={self.per_video}: --clips={self.clips} are not drawn; leave it, or '
                'set --clips=random'
            )
        self.options()  # refuses a stride beside fps

    def options(self) -> ClipOptions:
        """How clips are taken; of whole videos, the least that is stored."""
        return ClipOptions(
            frames=self.frames or 2,
            height=self.height,
            width=self.width,
            stride=self.stride,
            fps=self.fps,
            clips='center' if self.clips == 'whole' else self.clips,
            crop='center',
            short=self.short,
        )


# From a video to clips


def places(settings: Settings, info: VideoInfo, key: Sequence[int]) -> Iterator[np.ndarray]:
    """Yields the places [t] of each clip of a video, see `Choice`; none if it is too short.

    Args:
      settings: which clips.
      info: of the video.
      key: of its random numbers; that of the clip comes behind.
    """
    options = settings.options()
    count = options.count(info)
    if settings.clips != 'whole':
        for k in range(count * settings.per_video):
            yield options.choose(info, k, np.random.default_rng((*key, k))).places
    elif count:
        step = info.fps / settings.fps if settings.fps else settings.stride
        frames = math.floor((info.frames - 1) / step + 1e-6) + 1
        if 3 * frames * settings.height * settings.width > MAX_BYTES:
            raise BadVideo('too long', f'{frames} frames in a record')
        if settings.fps:
            yield info.first / info.fps + np.arange(frames) / settings.fps
        else:
            yield info.first + np.arange(frames) * settings.stride


def read_clips(
    path: str, info: VideoInfo, settings: Settings, key: Sequence[int]
) -> Iterator[tuple[Clip, float]]:
    """Yields the clips of a file, uint8 [t h w 3], each with its frames per second.

    Where a file ends or is damaged before the last frame that its header tells of, clips are chosen
    among the frames before.

    Args:
      path: file or URL.
      info: of the video, or the part of it.
      settings: which clips.
      key: see `places`.

    Raises:
      BadVideo: too short, too long or unreadable; of a damaged file, after the clips that it gives.
    """
    done, failure = 0, None
    while True:
        wanted = itertools.islice(places(settings, info, key), done, None)
        try:
            for clip in read_together(path, wanted, settings):
                yield clip, settings.fps or info.fps / settings.stride
                done += 1
            break
        except BadVideo as e:
            if failure or e.reason not in (TOO_EARLY, UNREADABLE):
                raise
            failure = e
        frames = count_frames(path, info.first + info.frames, settings.timeout)
        info = dataclasses.replace(info, frames=max(frames - info.first, 0))
    if failure and (not done or failure.reason == UNREADABLE):
        raise failure
    if done:
        return
    least = settings.options().least(info.fps)
    raise BadVideo(TOO_SHORT, f'frames={info.frames}, clips need {least}')


def read_together(path: str, wanted: Iterator[np.ndarray], settings: Settings) -> Iterator[Clip]:
    """Yields the clips at the wanted places; neighbours come from one pass through the file."""
    fit = fit_frame if settings.crop == 'center' else cover

    def shrink(frame):
        return fit(frame, settings.height, settings.width)

    number = 1
    if settings.clips == 'all':
        size = 3 * settings.frames * settings.height * settings.width
        number = min(max(TOGETHER_BYTES // size, 1), TOGETHER)
    while group := list(itertools.islice(wanted, number)):
        frames = len(group[0])
        chosen, order = np.unique(np.concatenate(group), return_inverse=True)
        video = decode(path, chosen, shrink, settings.timeout * len(group))
        for i in range(len(group)):
            yield video[order[i * frames : (i + 1) * frames]]


def count_frames(path: str, told: int, timeout: float) -> int:
    """How many of the frames that the header tells of can be decoded until one cannot."""
    seen = 0

    def see(frame):
        nonlocal seen
        seen += 1
        return frame[:1, :1]

    try:
        decode(path, np.arange(min(told, MAX_FRAMES)), see, timeout)
    except BadVideo as e:
        if e.reason not in (TOO_EARLY, UNREADABLE):
            raise
    return seen


def cover(frame: Frame, height: int, width: int) -> UInt8[np.ndarray, 'h2 w2 3']:
    """Resizes a frame with antialias, true to aspect, until it just covers height x width."""
    scale = max(height / frame.shape[0], width / frame.shape[1])
    larger = (max(round(old * scale), new) for old, new in zip(frame.shape, (height, width)))
    return fit_frame(frame, *larger)


# From a data set to a shard


@dataclasses.dataclass(frozen=True)
class Videos:
    """The videos of a data set.

    Attributes:
      listing: of both splits.
      splits: {split: its files}.
      digest: of the listing.
    """

    listing: Listing
    splits: dict[str, VideoFiles]
    digest: str

    def shards(self, settings: Settings, split: str) -> int:
        """How many the split has."""
        return -(-self.splits[split].videos // settings.videos_per_shard)


def open_videos(settings: Settings) -> Videos:
    """Lists the files; opens none."""
    kind, _, where = settings.data.partition(':')
    listing = sources.list_files(kind, where, settings.fold)
    # Its own clips are not asked for: for 'all', it would look into every file.
    options = dataclasses.replace(settings.options(), clips='center')
    known = {'test_fraction': settings.test_fraction, 'timeout': settings.timeout}
    splits = {s: VideoFiles(listing, s, options, probe=False, **known) for s in sources.SPLITS}
    return Videos(listing, splits, digest(listing.table))


def digest(table: pa.Table) -> str:
    """A hash of the content, however it is cut into chunks."""
    total = hashlib.sha256(repr(table.column_names).encode())
    for batch in table.to_batches():
        for first in range(0, len(batch), 10_000):
            columns = [column.to_pylist() for column in batch.slice(first, 10_000).columns]
            total.update(''.join(map(repr, zip(*columns))).encode())
    return total.hexdigest()[:16]


_opening = threading.Lock()


def opened(settings: Settings, expected: str) -> Videos:
    """`open_videos`, once per process.

    Raises:
      UserError: the digest is not the one expected.
    """
    with _opening:
        return _opened(settings, expected)


@functools.lru_cache(maxsize=1)
def _opened(settings, expected):
    videos = open_videos(settings)
    if videos.digest != expected:
        raise UserError(
            f'--data={settings.data}: the list of its files, or what it says of them, has changed '
            'since the start: leave it as it was, or give another --out'
        )
    return videos


def make_shard(element: tuple[str, int], settings: Settings, out: str, expected: str):
    """Makes the shard (split, number) of a folder, unless it is there.

    Raises:
      UserError: see `opened`; or the folder cannot be written.
    """
    from apache_beam.metrics import Metrics

    split, shard = element
    videos = opened(settings, expected)
    source = videos.splits[split]
    path = files.join(out, records.shard_name(split, shard, videos.shards(settings, split)))
    if files.exists(path) and files.exists(records.part(out, split, shard)):
        return
    first = shard * settings.videos_per_shard
    numbers = range(first, min(first + settings.videos_per_shard, source.videos))
    frames, fps, captions, skipped = [], [], set(), []

    def made():
        for video in numbers:
            caption, given = source.caption(video), 0
            try:
                info = source.info(video)
                key = settings.seed, sources.SPLITS.index(split), video
                for clip, rate in read_clips(source.path(video), info, settings, key):
                    yield pack(source, video, clip, rate, settings.encoding)
                    frames.append(len(clip)), fps.append(rate), captions.add(caption)
                    given += 1
            except BadVideo as e:
                detail = f'after {given} clips: {e.detail}' if given else e.detail
                skipped.append([source.file(video), e.reason, detail])

    with as_local(path) as local:
        count = records.write_shard(local, made())
        size = os.path.getsize(local)
    reasons = dict(collections.Counter(reason for _, reason, _ in skipped))
    about = {
        'videos': len(numbers),
        'records': count,
        'bytes': size,
        'frames': [min(frames), max(frames)] if frames else None,
        'fps': [min(fps), max(fps)] if fps else None,
        'captions': sorted(captions),
        'reasons': reasons,
        'skipped': skipped,
    }
    files.write(records.part(out, split, shard), json.dumps(about).encode())
    for name, value in {'videos': len(numbers), 'records': count, **reasons}.items():
        Metrics.counter('prepare', name).inc(value)


def pack(source: VideoFiles, video: int, clip: Clip, fps: float, encoding: str) -> bytes:
    """A clip of a video as a record."""
    fields = records.jpeg(clip) if encoding == 'jpeg' else {'video': clip}
    fields |= {'fps': np.float32(fps), 'label': np.int32(source.label(video))}
    return records.pack(fields | {'caption': source.caption(video), 'file': source.file(video)})


@contextlib.contextmanager
def as_local(path: str):
    """Where on this machine to write what is to lie at a path; a URL's is then copied there."""
    if not files.is_url(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        local = os.path.join(folder, os.path.basename(path))
        yield local
        with files.told(path):
            files.system(path).put_file(local, path)
