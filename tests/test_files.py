"""Data at URLs: fsspec's memory:// stands for a store."""

import importlib.util
import re

import fsspec
import numpy as np
import pytest

from cmd_jax import video
from cmd_jax.data import files, records, sources
from cmd_jax.data.clip_options import ClipOptions
from cmd_jax.errors import UserError
from tests.tiny_videos import numbered

OPTIONS = ClipOptions(frames=4, height=16, width=16)


@pytest.fixture
def store():
    memory = fsspec.filesystem('memory')
    yield memory
    memory.store.clear()


def test_a_folder_in_a_store_gives_the_same_clips(tmp_path, store):
    for name in ('cat/1.mp4', 'cat/2.mp4', 'dog/1.mp4', 'dog/2.mp4'):
        video.write(tmp_path / name, numbered(20, 24, 40))
    (tmp_path / 'cat' / '1.txt').write_text('a grey cat')
    (tmp_path / 'captions.csv').write_text('path,caption\ndog/1.mp4,a dog\n')
    (tmp_path / 'dog' / 'empty.mp4').touch()
    store.put(str(tmp_path), '/bucket/videos', recursive=True)
    for split in sources.SPLITS:
        here, there = (
            sources.make_source(f'folder:{where}', split, OPTIONS)
            for where in (tmp_path, 'memory://bucket/videos')
        )
        assert here.class_names == there.class_names and here.captions == there.captions
        assert here.skipped == there.skipped and len(here) == len(there) > 0
        for i in range(len(here)):
            ours, theirs = (s.__getitem__(i, np.random.default_rng(i)) for s in (here, there))
            assert ours.keys() == theirs.keys()
            for name in ours:
                np.testing.assert_array_equal(ours[name], theirs[name])


def test_records_in_a_store_are_copied_once(tmp_path, store, monkeypatch, log):
    monkeypatch.setenv('CMD_JAX_CACHE', str(tmp_path / 'cache'))
    files.cache.cache_clear()
    (tmp_path / 'here').mkdir()
    clip = numbered(6, 16, 16)
    fields = {'label': np.int32(0), 'fps': np.float32(8), 'caption': 'x', 'file': 'a.mp4'}
    for split in sources.SPLITS:
        record = records.pack({'video': clip, **fields})
        records.write_shard(str(tmp_path / 'here' / records.shard_name(split, 0, 1)), [record])
    header = f'{{"format": "{records.VIDEOS}", "class_names": [], "captions": ["x"], "frames": 6'
    (tmp_path / 'here' / 'header.json').write_text(header + ', "fps": 8}')
    store.put(str(tmp_path / 'here'), '/bucket/records', recursive=True)
    for _ in range(2):
        source = sources.make_source('records:memory://bucket/records', 'test', OPTIONS)
        np.testing.assert_array_equal(source[0]['video'], clip[1:5])
    assert sum('copying memory://bucket/records/test-00000' in m for m in log.messages) == 1
    files.cache.cache_clear()


@pytest.mark.parametrize(
    'spec, words',
    [
        ('folder:memory://nothing/here', 'does not exist'),
        ('manifest:memory://nothing/a.csv', 'does not exist'),
        ('records:memory://nothing', 'does not exist'),
        ('folder:gopher://x/y', 'gopher'),
    ],
)
def test_addresses_that_lead_nowhere(store, spec, words):
    with pytest.raises(UserError, match=re.escape(words)) as error:
        sources.make_source(spec, 'train', OPTIONS)
    assert '\n' not in str(error.value)


@pytest.mark.skipif(importlib.util.find_spec('gcsfs') is not None, reason='gcsfs is installed')
def test_a_missing_package_is_named():
    with pytest.raises(UserError, match='gs://bucket/x: a package is missing.*gcsfs'):
        sources.make_source('folder:gs://bucket/x', 'train', OPTIONS)


def test_a_store_that_does_not_answer(store, monkeypatch):
    def refuse(self, path, *_, **__):
        raise ConnectionError('cannot connect to host')

    monkeypatch.setattr(type(store), '_open', refuse)
    with pytest.raises(UserError, match='memory://bucket/x.csv cannot be read .ConnectionError'):
        sources.make_source('manifest:memory://bucket/x.csv', 'train', OPTIONS)


def test_paths_are_joined():
    assert files.join('a/b', 'c/d.mp4') == 'a/b/c/d.mp4'
    assert files.join('a', '/x.mp4') == '/x.mp4' and files.join('a', 'gs://b/x') == 'gs://b/x'
    assert files.join('gs://b/a', 'c', 'd') == 'gs://b/a/c/d'


def test_a_file_is_written_whole_or_not(tmp_path):
    path = tmp_path / 'new' / 'x.json'
    files.write(str(path), b'1')
    files.write(str(path), b'2')
    assert path.read_bytes() == b'2' and [p.name for p in path.parent.iterdir()] == ['x.json']
    with pytest.raises(UserError, match='cannot be written'):
        files.write(str(path / 'y'), b'3')
