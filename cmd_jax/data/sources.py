"""Random-access sources of clips, and the one function that makes a source by name.

A source has `len`, `source[i]` and `source.__getitem__(i, rng)`, which give a dict of `video` uint8
[t h w 3], `label` int32, `caption` str and `index` int64, or None for a clip that cannot be read;
and the attributes `name`, `class_names` and `captions` (what the clips of this source can have,
sorted, each once). It is picklable: workers get a copy.
"""

import collections
import difflib
import functools
import hashlib
import inspect
import os
import re
from concurrent import futures

import numpy as np
from absl import logging

from cmd_jax.data import captions, clips
from cmd_jax.data.moving_digits import MovingDigits
from cmd_jax.errors import UserError

EXTENSIONS = frozenset(
    '.3g2 .3gp .asf .avi .f4v .flv .gif .m1v .m2ts .m2v .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv '
    '.rm .ts .vob .webm .wmv'.split()
)
SPLITS = ('train', 'test')
SOURCES = ('moving_digits', 'folder')
SHORT = ('skip', 'loop')


class VideoFolder:
    """Clips of the video files in a folder and its sub-folders.

    Where files lie in sub-folders, the sub-folder of the first level is the class; files beside
    the class folders are then skipped. Otherwise there are no classes: `class_names` is empty and
    every label is 0. Whether a file is for training or testing is decided by a hash of its path in
    the folder, so it stays what it is when files are added (but for a folder so small that a split
    would be empty: it gets the nearest file; a single file serves both splits).

    Captions come from captions.csv or a text file beside the video, see `captions.read`; a file
    with neither has its class name in words, or '' without classes.

    All files are probed at the start. Broken, empty and (unless they are looped) short ones are
    left out, and one line in the log counts them by reason; it also tells how many files have a
    caption of their own, and of captions for files that are not there.

    Attributes:
      name: 'folder'.
      class_names: sorted names of the class folders.
      captions: of the split's files, sorted, each once.
      skipped: {path in the folder: reason} of the files left out, of both splits.
    """

    name = 'folder'

    def __init__(
        self,
        path: str | os.PathLike,
        split: str = 'train',
        frames: int = 16,
        height: int = 64,
        width: int = 64,
        stride: int = 1,
        flip: bool = False,
        short: str = 'skip',
        test_fraction: float = 0.1,
    ):
        """Finds and probes the files.

        Args:
          path: the folder.
          split: 'train': clips at random places of the file, random crops; 'test': the middle.
          frames: frames in a clip.
          height: of a frame, pixels.
          width: of a frame, pixels.
          stride: frames of the file per frame of the clip.
          flip: mirror half of the training clips.
          short: files with fewer frames than a clip: 'skip', or 'loop' to begin again at their end.
          test_fraction: share of the files kept for testing, inside (0, 1).

        Raises:
          UserError: no such folder, no video file in it, or none that gives a clip; captions that
            cannot be read.
        """
        _check('data.split', split, SPLITS)
        _check('short', short, SHORT)
        if not 0 < test_fraction < 1:
            raise UserError(f'test_fraction={test_fraction}: must lie between 0 and 1')
        self._path, self._split = os.fspath(path), split
        self._frames, self._stride, self._flip = frames, stride, flip
        self._height, self._width = height, width
        self._span = (frames - 1) * stride + 1

        found = find_videos(self._path)
        self.class_names = sorted({f.split('/')[0] for f in found if '/' in f})
        good, self.skipped = {}, {}
        least = self._span if short == 'skip' else 2
        for file, info in zip(found, self._probe(found)):
            if self.class_names and '/' not in file:
                self.skipped[file] = 'beside the class folders'
            elif isinstance(info, clips.BadVideo):
                self.skipped[file] = str(info)
            elif info.frames < least:
                self.skipped[file] = f'too short (frames={info.frames}, clips need {least})'
            else:
                good[file] = info
        if not good:
            raise UserError(
                f'data.path={self._path}: none of its {len(found)} video files gives a clip of '
                f'{frames} frames, stride {stride}: {self._tally()}; give other files, or lower '
                "data.frames or data.stride, or loop short ones (short='loop')"
            )
        own, absent = captions.read(self._path, found)
        files = split_files(sorted(good), test_fraction)[split]
        self._files = [(file, good[file], self._label(file)) for file in files]
        self._captions = [own.get(file) or self._class_in_words(file) for file in files]
        self.captions = sorted(set(self._captions))
        self._failed = set()
        _log_once(self._summary(len(good), len(own.keys() & good.keys()), absent))

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, i: int, rng: np.random.Generator | None = None) -> dict | None:
        """A clip of file i; of its middle without `rng`. None if it fails to decode."""
        file, info, label = self._files[i]
        start, crop, flip = max(info.frames - self._span, 0) // 2, 'center', False
        if rng is not None and self._split == 'train':
            start = int(rng.integers(max(info.frames - self._span, 0) + 1))
            crop = tuple(rng.random(2))
            flip = self._flip and bool(rng.random() < 0.5)
        try:
            video = self._decode(file, info, start)
        except clips.BadVideo as e:
            self._fail(file, e)
            return None
        return {
            'video': clips.resize_crop(video, self._height, self._width, crop, flip),
            'label': np.int32(label),
            'caption': self._captions[i],
            'index': np.int64(i),
        }

    def _decode(self, file, info, start):
        path = os.path.join(self._path, file)
        if info.frames >= self._span:
            return clips.decode(path, start, self._frames, self._stride)
        whole = clips.decode(path, 0, info.frames)
        return whole[np.arange(self._frames) * self._stride % len(whole)]

    def _probe(self, found):
        def one(file):
            path = os.path.join(self._path, file)
            try:
                stat = os.stat(path)
            except OSError as e:
                return clips.BadVideo('unreadable', e.strerror)
            return _probe(path, stat.st_size, stat.st_mtime_ns)

        with futures.ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
            return list(pool.map(one, found))

    def _label(self, file):
        return self.class_names.index(file.split('/')[0]) if self.class_names else 0

    def _class_in_words(self, file):
        name = file.split('/')[0] if self.class_names else ''
        return re.sub('(?<=[a-z])(?=[A-Z])', ' ', name).replace('_', ' ').lower()

    def _fail(self, file, error):
        if file not in self._failed:
            logging.warning('folder: %s cannot be decoded: %s', file, error)
        self._failed.add(file)
        # Without this, a pipeline that repeats would look for a good clip for ever.
        if len(self._failed) == len(self._files):
            raise UserError(
                f'data.path={self._path}: each of its {len(self._files)} {self._split} files has '
                f'failed to decode (last: {file}: {error}); give other files'
            ) from error

    def _tally(self):
        reasons = collections.Counter(reason.split(' (')[0] for reason in self.skipped.values())
        counts = ', '.join(f'{n} {reason}' for reason, n in reasons.most_common())
        file, reason = next(iter(self.skipped.items()))
        return f'{counts} (first: {file}: {reason})'

    def _summary(self, good, captioned, absent):
        line = f'folder: {good} clips ({len(self)} to {self._split})'
        if self.class_names:
            line += f' in {len(self.class_names)} classes'
        if good == 1:
            line += '; the only file serves for training and testing'
        if captioned or absent:
            line += f'; {captioned} with a caption of their own, {good - captioned} without'
        if absent:
            line += (
                f'; rows of {captions.CSV} that name no video: {len(absent)} (first: {absent[0]!r})'
            )
        if self.skipped:
            line += f'; skipped {len(self.skipped)}: {self._tally()}'
        return line


def find_videos(path: str) -> list[str]:
    """Video files under a folder, by extension: sorted paths in the folder, '/' between parts."""
    if not os.path.isdir(path):
        what = 'is a file, not a folder' if os.path.exists(path) else 'does not exist'
        raise UserError(f'data.path={path!r} {what}: give a folder of videos')
    found, others, seen = [], 0, set()
    for root, folders, files in os.walk(path, followlinks=True):
        folders[:] = [f for f in folders if not f.startswith('.')]
        if os.path.realpath(root) in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(os.path.realpath(root))
        for file in files:
            if os.path.splitext(file)[1].lower() in EXTENSIONS and not file.startswith('.'):
                found.append(os.path.relpath(os.path.join(root, file), path).replace(os.sep, '/'))
            else:
                others += 1
    if not found:
        raise UserError(
            f'data.path={path}: no video file in it ({others} other files); known extensions: '
            f'{" ".join(sorted(EXTENSIONS))}'
        )
    return sorted(found)


def split_files(files: list[str], test_fraction: float) -> dict[str, list[str]]:
    """Distributes files by a hash of their name; see `VideoFolder`."""

    def place(file):  # uniform in [0, 1)
        return int.from_bytes(hashlib.sha256(file.encode()).digest()[:8], 'big') / 2**64

    if len(files) == 1:
        return {'train': files, 'test': files}
    ordered = sorted(files, key=place)
    count = sum(place(file) < test_fraction for file in files)
    count = min(max(count, 1), len(files) - 1)
    return {'train': sorted(ordered[count:]), 'test': sorted(ordered[:count])}


def make_source(
    name: str,
    path: str | os.PathLike = '',
    *,
    split: str = 'train',
    frames: int,
    height: int,
    width: int,
    stride: int = 1,
    flip: bool = False,
    seed: int = 0,
    **options,
) -> MovingDigits | VideoFolder:
    """The source called `name`, 'moving_digits' or 'folder'.

    Args:
      name: of the source.
      path: of the folder.
      split: 'train' or 'test'.
      frames: frames in a clip.
      height: of a frame, pixels.
      width: of a frame, pixels.
      stride: folder only, frames of the file per frame of the clip.
      flip: folder only, mirror half of the training clips.
      seed: of the clips of moving_digits. A folder draws from the generator of the pipeline.
      **options: further arguments of `MovingDigits` or `VideoFolder`.

    Raises:
      UserError: unknown name or option, or what the source does not take.
    """
    _check('data.source', name, SOURCES)
    _check('data.split', split, SPLITS)
    sizes = {'split': split, 'frames': frames, 'height': height, 'width': width}
    source = MovingDigits if name == 'moving_digits' else VideoFolder
    for option in options:
        _check(f'option of data.source={name}', option, list(inspect.signature(source).parameters))
    if name == 'folder':
        if not path:
            raise UserError("data.path='': data.source='folder' needs the folder of the videos")
        return VideoFolder(path, stride=stride, flip=flip, **sizes, **options)
    if path or stride != 1 or flip:
        raise UserError(
            f'data.source={name!r} takes no path, stride or flip (data.path={path!r}, '
            f"data.stride={stride}, data.flip={flip}): leave them, or set data.source='folder'"
        )
    return MovingDigits(seed=seed, **sizes, **options)


@functools.cache
def _probe(path, size, changed):
    """`clips.probe`, once per process and version of the file: both splits ask for every file."""
    del size, changed
    try:
        return clips.probe(path)
    except clips.BadVideo as e:
        return e


@functools.cache
def _log_once(line):
    logging.info('%s', line)


def _check(field, value, known):
    if value not in known:
        near = difflib.get_close_matches(str(value), known, 1)
        hint = f'did you mean {near[0]!r}?' if near else 'known: ' + ', '.join(known)
        raise UserError(f'{field}={value!r} is unknown; {hint}')
