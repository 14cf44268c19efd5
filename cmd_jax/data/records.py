"""Prepared data: folders of ArrayRecord shards with a header, and the source that reads clips.

A folder holds header.json and the shards SPLIT-00000-of-00012.array_record. A record is in the
safetensors format; its text is UTF-8 in a uint8 array. Records of videos (`RecordVideos`) have

    video            uint8 [n h w 3], or jpeg and offsets: n JPEG files, one after the other
    fps              float32, frames per second
    label            int32
    caption, file    text
"""

import contextlib
import dataclasses
import io
import re
import typing
from collections.abc import Iterable

import numpy as np
import safetensors.numpy
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from cmd_jax import atomic
from cmd_jax.data import clips, files
from cmd_jax.data.clip_options import ClipOptions, VideoInfo
from cmd_jax.data.videos import log_once
from cmd_jax.errors import UserError, parse_json

# Of a folder that is being made: what decides its content, what became of each shard, and at last
# what it holds.
SETTINGS, PARTS, HEADER = 'settings.json', 'parts', 'header.json'
VIDEOS = 'cmd_jax videos 1'
SHARD = re.compile(r'(train|test)-(\d{5})-of-(\d{5})\.array_record')
# Records are read one by one, in random order: a group would be read for one of them. Raw frames
# are for those who want speed, and JPEG has been compressed already.
WRITER_OPTIONS = 'group_size:1,uncompressed'
JPEG_QUALITY = 95


def pack(fields: dict[str, typing.Any]) -> bytes:
    """A record of arrays, numbers and strings."""
    arrays = {}
    for name, value in fields.items():
        if isinstance(value, str):
            value = np.frombuffer(value.encode(), np.uint8)
        arrays[name] = np.asarray(value, order='C')
    return safetensors.numpy.save(arrays)


def unpack(record: bytes) -> dict[str, np.ndarray]:
    """The arrays of a record."""
    return safetensors.numpy.load(record)


def text(array: np.ndarray) -> str:
    """A string of a record."""
    return array.tobytes().decode()


def jpeg(video: np.ndarray) -> dict[str, np.ndarray]:
    """Frames uint8 [n h w 3] as the fields `jpeg` and `offsets`."""
    parts = []
    for frame in video:
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, 'JPEG', quality=JPEG_QUALITY, subsampling=0)
        parts.append(buffer.getvalue())
    offsets = np.cumsum([0, *map(len, parts)])
    return {'jpeg': np.frombuffer(b''.join(parts), np.uint8), 'offsets': offsets}


def shard_name(split: str, shard: int, shards: int) -> str:
    return f'{split}-{shard:05d}-of-{shards:05d}.array_record'


def part(folder: str, split: str, shard: int) -> str:
    """The file that tells what became of a shard, written after it: with both, it is complete."""
    return files.join(folder, PARTS, f'{split}-{shard:05d}.json')


def write_shard(path: str, records: Iterable[bytes]) -> int:
    """Writes a shard, on this machine, that appears under its name only when it is complete.

    Returns the number of its records.
    """
    count = 0
    with atomic.replacing(path) as temporary:
        with contextlib.closing(ArrayRecordWriter(str(temporary), WRITER_OPTIONS)) as writer:
            for record in records:
                writer.write(record)
                count += 1
    return count


def read_header(folder: str, expected: str) -> dict:
    """The header of a folder, whose `format` must be as expected.

    Raises:
      UserError: no such folder, no header in it, or another format.
    """
    path = files.join(folder, HEADER)
    if not files.exists(path):
        what = f'has no {HEADER}' if files.exists(folder) else 'does not exist'
        raise UserError(f'{folder} {what}: give a folder that was made for this, and completely')
    header = parse_json(path, files.read(path))
    if header.get('format') != expected:
        raise UserError(f'{path}: its format is {header.get("format")!r}, not {expected!r}')
    return header


class Shards:
    """The records of a split, by number; picklable.

    Raises:
      UserError: shards are missing.
    """

    def __init__(self, folder: str, split: str):
        found = [m for n in files.names(folder, '.array_record') if (m := SHARD.fullmatch(n))]
        found = [m for m in found if m[1] == split]
        shards = {int(m[3]) for m in found}
        if len(shards) != 1 or len(found) != shards.pop():
            raise UserError(
                f'{folder}: {len(found)} shards of the split {split!r}, named '
                f'{", ".join(m[0] for m in found[:3]) or "nothing"}: some are missing or too many; '
                'make it anew, or give another folder'
            )
        paths = [files.local(files.join(folder, m[0])) for m in found]
        self._source = ArrayRecordDataSource(paths)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, i: int) -> bytes:
        return self._source[i]


class RecordVideos:
    """Clips of prepared videos (`python -m cmd_jax.data.prepare`).

    Attributes:
      name: 'records'.
      class_names: of the data set that was prepared; empty where it has none.
      captions: of both splits, sorted, each once; None where they are too many to list.
      header: what the folder's header says of its making.
    """

    name = 'records'

    def __init__(self, path: str, split: str, options: ClipOptions):
        """Opens the split of a folder.

        Raises:
          UserError: no such folder, no such split, shards missing, or stored clips that are shorter
            than those asked for.
        """
        header = read_header(path, VIDEOS)
        self.class_names, self.captions = header['class_names'], header['captions']
        self.header = header
        self._options = options if split == 'train' else options.fixed()
        self._path, self._shards, self._clips = path, Shards(path, split), 1
        if not len(self._shards):
            raise UserError(f'{path}: its split {split!r} is empty')
        if header['frames']:  # all of one length
            stored = VideoInfo(frames=header['frames'], fps=header['fps'] or 1.0)
            if options.fps and not header['fps']:
                raise UserError(
                    f'{path}: its videos differ in frames per second, and all have '
                    f'{header["frames"]} frames: data.fps={options.fps} cannot be kept; prepare '
                    'with --fps'
                )
            self._clips = self._options.count(stored)
            if not self._clips:
                raise UserError(
                    f'{path}: its videos have {header["frames"]} frames, fewer than a clip '
                    f'(data.frames={options.frames}, data.stride={options.stride}, '
                    f'data.fps={options.fps}): lower these, or prepare longer ones'
                )
            if stored.frames < dataclasses.replace(self._options, short='skip').least(stored.fps):
                log_once(
                    f'records: videos of {stored.frames} frames are shorter than clips (stride '
                    f'{options.stride}, fps {options.fps:g}): data.short={options.short!r}'
                )
        elif self._options.clips == 'all':
            raise UserError(
                f"{path}: its videos differ in length, so data.clips='all' cannot number their "
                'clips: prepare with --clips=all'
            )
        log_once(f'records: {len(self)} clips of {len(self._shards)} records to {split}')

    def __len__(self) -> int:
        return len(self._shards) * self._clips

    def __getitem__(self, i: int, rng: np.random.Generator | None = None) -> dict | clips.Skipped:
        """Clip i; see `sources`."""
        record = unpack(self._shards[i // self._clips])
        frames = len(record['offsets']) - 1 if 'jpeg' in record else len(record['video'])
        info = VideoInfo(frames=frames, fps=float(record['fps']))
        if not self._options.count(info):
            detail = f'frames={frames}, clips need {self._options.least(info.fps)}'
            return clips.Skipped(text(record['file']), clips.TOO_SHORT, detail)
        choice = self._options.choose(info, i % self._clips, rng)
        numbers = np.minimum(choice.numbers(info.fps), frames - 1)
        try:
            chosen = (stored_frame(record, int(n)) for n in numbers)
            size = self._options.height, self._options.width
            video = clips.fit(chosen, *size, choice.crop, choice.flip)
        except (OSError, SyntaxError, ValueError) as e:  # Pillow's
            return clips.Skipped(text(record['file']), clips.UNREADABLE, str(e))
        return {
            'video': video,
            'label': np.int32(record['label']),
            'caption': text(record['caption']),
            'index': np.int64(i),
        }


def stored_frame(record: dict, number: int) -> np.ndarray:
    """A frame uint8 [h w 3] of a record."""
    if 'video' in record:
        return record['video'][number]
    start, end = record['offsets'][number : number + 2]
    return np.asarray(Image.open(io.BytesIO(record['jpeg'][start:end].tobytes())).convert('RGB'))
