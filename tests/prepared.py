"""Videos that say where their frames come from, and prepared folders, for tests."""

import functools
import json

from cmd_jax import video as video_lib
from cmd_jax.data import records, shards
from tests import tiny_videos

numbered = functools.partial(tiny_videos.numbered, height=24, width=40)


def write_folder(path):
    """Six videos of 20 to 22 frames, 8 per second, in two classes."""
    for name in ('cat', 'FlyingBird'):
        for i in range(3):
            video_lib.write(path / name / f'{i}.mp4', numbered(20 + i), fps=8)
    return path


def settings(folder, **fields) -> shards.Settings:
    # Half of the files of `write_folder`, by their names, are for testing.
    fields = {'height': 16, 'width': 16, 'test_fraction': 0.4, 'videos_per_shard': 2} | fields
    return shards.Settings(data=f'folder:{folder}', **fields)


def header(out):
    return json.loads((out / 'header.json').read_text())


def stored(out, split):
    """{file: its records} of a split."""
    source, found = records.Shards(str(out), split), {}
    for i in range(len(source)):
        record = records.unpack(source[i])
        found.setdefault(records.text(record['file']), []).append(record)
    return found


def content(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}
