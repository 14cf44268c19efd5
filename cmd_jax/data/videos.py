"""Clips of video files: the source over a list of files, whoever made the list."""

import collections
import dataclasses
import functools
import hashlib
import os
import tempfile
from collections.abc import Sequence
from concurrent import futures

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from absl import logging

from cmd_jax.data import clips, files
from cmd_jax.data.clip_options import ClipOptions, VideoInfo
from cmd_jax.errors import UserError

# More captions than these are not listed: they would be encoded one by one before training.
LISTED_CAPTIONS = 100_000
MAPPED_BYTES = 2**24  # a longer list goes to the workers in a file
FIRST = 10  # reasons in an error message
ROWS = 2**16  # at a time, where rows become Python's objects


@dataclasses.dataclass(frozen=True)
class Listing:
    """Video files and what is known of them.

    Attributes:
      name: of the source, for messages.
      root: folder or URL that the files are in.
      table: columns `file` (path in root, or absolute), and where they are known `label` (int32),
        `caption` (string), `start` and `end` (float64, seconds; NaN: none), `split` ('train' or
        'test').
      class_names: empty where there are no classes.
      skipped: {file: reason} of files left out already.
      notes: for the log.
    """

    name: str
    root: str
    table: pa.Table
    class_names: list[str]
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: Sequence[str] = ()


class VideoFiles:
    """Clips of the files of a listing.

    Where the listing says nothing of splits, a hash of the file's path decides, so that a file
    stays where it is when others are added (but for a set so small that a split would be empty: it
    gets the nearest file; a single file serves both splits).

    Unless `probe` is off, all files are looked into at the start, those that are broken or shorter
    than a clip are left out, and one line in the log counts them by reason. What cannot be read
    later, or without probing, comes as `clips.Skipped`.

    Attributes:
      name: of the kind of source.
      class_names: empty where there are no classes.
      captions: of the split, sorted, each once; None where they are too many to list.
      skipped: {file: reason} of the files left out at the start.
      listed: rows that were looked at: of the split where the listing tells one, else of both.
    """

    def __init__(
        self,
        listing: Listing,
        split: str,
        options: ClipOptions,
        *,
        test_fraction: float = 0.1,
        probe: bool = True,
        max_bad: float = 0.5,
        timeout: float = clips.TIMEOUT,
    ):
        """Chooses the files.

        Args:
          listing: of all splits, or of one.
          split: 'train', or 'test', where nothing is drawn by chance.
          options: of the clips.
          test_fraction: share of the files kept for testing, inside (0, 1), where the listing does
            not say.
          probe: look into every file at the start.
          max_bad: share of the files that may be unreadable.
          timeout: seconds for a clip of one file.

        Raises:
          UserError: no file gives a clip, or too many are unreadable.
        """
        if options.clips == 'all' and not probe:
            raise UserError("data.clips='all' counts the clips of each file: set data.probe=True")
        self.name, self.class_names = listing.name, listing.class_names
        self._options = options if split == 'train' else options.fixed()
        self._root, self._timeout, self._max_bad = listing.root, timeout, max_bad
        self.skipped = dict(listing.skipped)
        table = listing.table
        if 'split' in table.column_names:
            table = table.filter(pc.equal(table['split'], split))
            if not len(table):
                raise UserError(
                    f'{listing.name}: no file of the split {split!r}: name some, or leave the '
                    'column out and a part of the files is taken'
                )
        self.listed = len(table)
        if probe:
            table = self._probed(table, len(listing.table) + len(self.skipped))
        lone = False
        if 'split' not in table.column_names:
            if not 0 < test_fraction < 1:
                raise UserError(f'data.test_fraction={test_fraction}: must lie between 0 and 1')
            lone = len(pc.unique(table['file'])) == 1
            table = table.take(split_rows(table['file'], test_fraction)[split])
        self._keep(table)
        self._ends = None
        if probe:
            counts = [self._options.count(self.info(v)) for v in range(self.videos)]
            if max(counts) > 1:
                self._ends = np.cumsum(counts)
        self.captions = listed(table['caption']) if 'caption' in table.column_names else ['']
        log_once(self._summary(split, lone, listing.notes))

    def __len__(self) -> int:
        return self.videos if self._ends is None else int(self._ends[-1])

    def __getitem__(self, i: int, rng: np.random.Generator | None = None) -> dict | clips.Skipped:
        """Clip i; `rng` for what is drawn by chance."""
        video, which = int(i), 0
        if self._ends is not None:
            video = int(np.searchsorted(self._ends, i, side='right'))
            which = int(i) - int(self._ends[video - 1] if video else 0)
        try:
            info = self.info(video)
            if not self._options.count(info):
                raise self._short(info)
            choice = self._options.choose(info, which, rng)
            size = self._options.height, self._options.width
            clip = clips.read(self.path(video), choice, *size, self._timeout)
        except clips.BadVideo as e:
            return clips.Skipped(self._name(video), e.reason, e.detail)
        return {
            'video': clip,
            'label': np.int32(self.label(video)),
            'caption': self.caption(video),
            'index': np.int64(i),
        }

    @property
    def videos(self) -> int:
        """Number of videos."""
        return len(self._text)

    def file(self, video: int) -> str:
        return self._text.get('file', video)

    def _name(self, video):
        """The file, and which part of it."""
        start, end = self.times(video)
        if np.isnan(start) and np.isnan(end):
            return self.file(video)
        return f'{self.file(video)} [{np.nan_to_num(start):g} s, {end:g} s)'

    def times(self, video: int) -> tuple[float, float]:
        """(start, end) in seconds of the part that is used; NaN: none."""
        return tuple(
            self._numbers[name][video] if name in self._numbers else np.nan
            for name in ('start', 'end')
        )

    def path(self, video: int) -> str:
        return files.join(self._root, self.file(video))

    def label(self, video: int) -> int:
        return int(self._numbers['label'][video]) if 'label' in self._numbers else 0

    def caption(self, video: int) -> str:
        return self._text.get('caption', video) if 'caption' in self._text else ''

    def info(self, video: int) -> VideoInfo:
        """What the video offers to clips.

        Raises:
          clips.BadVideo: it was not probed, and is unreadable.
        """
        numbers = self._numbers
        if 'frames' in numbers:
            frames, fps = int(numbers['frames'][video]), float(numbers['fps'][video])
            return self._part(video, VideoInfo(frames=frames, fps=fps))
        return self._part(video, clips.probe(self.path(video), self._timeout))

    def _keep(self, table):
        """Text stays in Arrow's columns, numbers in NumPy's."""
        text = [name for name in ('file', 'caption') if name in table.column_names]
        self._text = Text(table.select(text))
        self._numbers = {
            name: table[name].to_numpy()
            for name in ('label', 'start', 'end', 'frames', 'fps')
            if name in table.column_names
        }

    def _part(self, video, info):
        """Of a video what the listing has of it."""
        start, end = self.times(video)
        if np.isnan(start) and np.isnan(end):
            return info
        return info.segment(np.nan_to_num(start), np.inf if np.isnan(end) else end)

    def _probed(self, table, found):
        """The rows that give a clip, with the columns frames and fps; `found` files in all."""
        self._keep(table)
        paths = [self.path(v) for v in range(self.videos)]
        if len(paths) > 1000:
            logging.info('%s: looking into %d files', self.name, len(paths))
        good, frames, fps, bad = [], [], [], 0
        for v, info in enumerate(probe_all(paths, self._timeout)):
            if isinstance(info, VideoInfo):
                part = self._part(v, info)
                if self._options.count(part):
                    good.append(v), frames.append(info.frames), fps.append(info.fps)
                    continue
                info = self._short(part)
            bad += info.reason != clips.TOO_SHORT
            self.skipped[self._name(v)] = str(info)
        if not good:
            raise UserError(
                f'{self._root}: none of its {found} video files gives a clip of '
                f'{self._options.frames} frames, {self._step()}: {self._tally()}; give other '
                "files, or lower data.frames or data.stride, or loop short ones (data.short='loop')"
            )
        if bad > self._max_bad * len(paths):
            raise UserError(
                f'{self._root}: {bad} of {len(paths)} videos are unreadable, more than '
                f'data.max_bad={self._max_bad}: {"; ".join(self._reasons())}'
            )
        table = table.take(good).append_column('frames', pa.array(frames, pa.int64()))
        return table.append_column('fps', pa.array(fps, pa.float64()))

    def _step(self) -> str:
        return (
            f'{self._options.fps:g} fps' if self._options.fps else f'stride {self._options.stride}'
        )

    def _short(self, info):
        detail = f'frames={info.frames}, clips need {self._options.least(info.fps)}'
        return clips.BadVideo(clips.TOO_SHORT, detail)

    def _reasons(self):
        return [f'{file}: {reason}' for file, reason in list(self.skipped.items())[:FIRST]]

    def _tally(self):
        return tally(self.skipped.values()) + f' (first: {self._reasons()[0]})'

    def _summary(self, split, lone, notes):
        line = f'{self.name}: {len(self)} clips of {self.videos} videos to {split}'
        if self.class_names:
            line += f' in {len(self.class_names)} classes'
        if lone:
            line += '; the only file serves for training and testing'
        for note in notes:
            line += f'; {note}'
        if self.skipped:
            line += f'; skipped {len(self.skipped)}: {self._tally()}'
        return line


def tally(reasons) -> str:
    """Reasons counted, without their details: '3 unreadable, 1 empty file'."""
    counts = collections.Counter(reason.split(' (')[0] for reason in reasons)
    return ', '.join(f'{n} {reason}' for reason, n in counts.most_common())


def listed(column) -> list[str] | None:
    """The captions of a column, sorted, each once; None if they are too many."""
    unique = pc.unique(column)
    if len(unique) > LISTED_CAPTIONS:
        return None
    return sorted(caption or '' for caption in unique.to_pylist())


def split_rows(column: pa.ChunkedArray, test_fraction: float) -> dict[str, np.ndarray]:
    """Rows of each split, by a hash of the file; see `VideoFiles`."""

    def place(file):  # uniform in [0, 1)
        return int.from_bytes(hashlib.sha256(file.encode()).digest()[:8], 'big') / 2**64

    slices = (column.slice(i, ROWS).to_pylist() for i in range(0, len(column), ROWS))
    places = np.fromiter((place(f) for part in slices for f in part), float, len(column))
    ordered = np.argsort(places, kind='stable')
    # Parts of one file have one place: they stay together.
    values = places[ordered]
    if values[0] == values[-1]:
        return {'train': np.arange(len(values)), 'test': np.arange(len(values))}
    count = int(np.searchsorted(values, test_fraction, side='left'))
    if count == 0:
        count = int(np.searchsorted(values, values[0], side='right'))
    if count == len(values):
        count = int(np.searchsorted(values, values[-1], side='left'))
    return {'train': np.sort(ordered[count:]), 'test': np.sort(ordered[:count])}


class Text:
    """Columns of strings. Workers that get a pickled copy of long ones map one temporary file."""

    def __init__(self, table: pa.Table):
        self._table, self._file = table.combine_chunks(), None

    def __len__(self) -> int:
        return len(self._table)

    def __contains__(self, column: str) -> bool:
        return column in self._table.column_names

    def get(self, column: str, row: int) -> str:
        return self._table[column][row].as_py() or ''

    def __getstate__(self):
        if self._table.nbytes <= MAPPED_BYTES:
            return self._table
        if self._file is None:
            self._file = tempfile.NamedTemporaryFile(suffix='.arrow')
            with pa.ipc.new_file(self._file.name, self._table.schema) as writer:
                writer.write_table(self._table)
        return self._file.name

    def __setstate__(self, state):
        if isinstance(state, str):
            state = pa.ipc.open_file(pa.memory_map(state)).read_all()
        self._table, self._file = state, None


def probe_all(paths: Sequence[str], timeout: float) -> list[VideoInfo | clips.BadVideo]:
    """`clips.probe` of each path, or why it failed."""

    def one(path):
        if files.is_url(path):
            return _probe(path, timeout, 0, 0)
        try:
            about = os.stat(path)
        except OSError as e:
            return clips.BadVideo(clips.UNREADABLE, e.strerror)
        return _probe(path, timeout, about.st_size, about.st_mtime_ns)

    unique = list(dict.fromkeys(paths))  # parts of one file
    with futures.ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
        found = dict(zip(unique, pool.map(one, unique)))
    return [found[path] for path in paths]


@functools.cache
def _probe(path, timeout, size, changed):
    """Once per process and version of the file: both splits ask for every file."""
    del size, changed
    try:
        return clips.probe(path, timeout)
    except clips.BadVideo as e:
        return e


@functools.cache
def log_once(line):
    logging.info('%s', line)
