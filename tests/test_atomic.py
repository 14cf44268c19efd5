"""Files that are there whole or not at all."""

import os

import pytest

from cmd_jax import atomic
from cmd_jax.errors import UserError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / 'new' / 'x.txt'
    atomic.write(path, 'one\u00e9')
    with atomic.replacing(path) as temporary:
        temporary.write_bytes(b'two')
        assert path.read_text(encoding='utf-8') == 'one\u00e9'
        assert atomic.TEMPORARY.fullmatch(temporary.name)
    assert path.read_bytes() == b'two' and names(path.parent) == ['x.txt']


def test_what_fails_leaves_nothing(tmp_path):
    atomic.write(tmp_path / 'x', b'one')
    with pytest.raises(ZeroDivisionError), atomic.replacing(tmp_path / 'x') as temporary:
        temporary.write_bytes(b'two')
        raise ZeroDivisionError
    assert (tmp_path / 'x').read_bytes() == b'one' and names(tmp_path) == ['x']
    with pytest.raises(UserError, match='x/y cannot be written .*: choose another folder'):
        atomic.write(tmp_path / 'x' / 'y', b'two')
    with pytest.raises(UserError, match='No space left'), atomic.replacing(tmp_path / 'z'):
        raise OSError(28, os.strerror(28))
    # What the body reads is not what it writes.
    with pytest.raises(ConnectionResetError), atomic.replacing(tmp_path / 'z'):
        raise ConnectionResetError(104, os.strerror(104))
    assert names(tmp_path) == ['x']


def test_what_is_no_file_is_written_to(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    end = os.open(tmp_path / 'pipe', os.O_RDONLY | os.O_NONBLOCK)
    atomic.write(tmp_path / 'pipe', 'one')
    assert os.read(end, 9) == b'one' and names(tmp_path) == ['pipe']
    os.close(end)


def test_only_what_is_unfinished_is_cleared(tmp_path):
    for name in ('x.mp4', 'x.mp4.0123cdef.tmp', 'mine.tmp', 'x.0123cdef.tmp.mp4'):
        (tmp_path / name).touch()
    atomic.clear(tmp_path)
    assert names(tmp_path) == ['mine.tmp', 'x.0123cdef.tmp.mp4', 'x.mp4']
    atomic.clear(tmp_path / 'missing')
