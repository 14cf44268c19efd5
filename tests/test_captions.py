import pickle
import re

import numpy as np
import pytest

from cmd_jax import video as video_lib
from cmd_jax.data import captions, moving_digits, sources
from cmd_jax.data.clip_options import ClipOptions
from cmd_jax.errors import UserError

OPTIONS = ClipOptions(frames=4, height=16, width=16)


def videos(folder, *names):
    for name in names:
        video_lib.write(folder / name, np.full((5, 16, 16, 3), 90, np.uint8))


def by_file(folder):
    """{file: caption} as the clips of both splits tell it."""
    found = {}
    for split in sources.SPLITS:
        source = sources.make_source(f'folder:{folder}', split, OPTIONS)
        mine = [source[i]['caption'] for i in range(len(source))]
        assert source.captions == sorted(set(mine))
        assert pickle.loads(pickle.dumps(source)).captions == source.captions
        found |= dict(zip(map(source.file, range(len(source))), mine))
    return found


def test_the_table_wins_then_the_text_file_then_the_class(tmp_path, log):
    videos(tmp_path, *(f'{c}/{n}.mp4' for c in ('BigCat', 'dog') for n in ('a', 'b', 'c')))
    (tmp_path / 'captions.csv').write_text(
        '\ufeffsource,caption, path ,x\r\n'
        'web,"a cat, asleep",BigCat/a.mp4,\r\n'
        '\r\n'
        'web,"a ""big""\r\n  dog",dog/a.mp4,1\r\n'
        'web, ,BigCat/b.mp4,1\r\n'
        'web,nobody,BigCat/z.mp4,1\r\n'
        'web,a dog,dog/b.mp4,1\r\n'
        'web,a dog,dog/b.mp4,1\r\n',
        'utf-8',
    )
    (tmp_path / 'BigCat' / 'a.txt').write_text('not this')
    (tmp_path / 'BigCat' / 'b.txt').write_text('\n un  chat \n qui dort: caf\u00e9\n', 'utf-8')
    (tmp_path / 'BigCat' / 'c.txt').write_text(' \n')
    assert by_file(tmp_path) == {
        'BigCat/a.mp4': 'a cat, asleep',
        'BigCat/b.mp4': 'un chat qui dort: caf\u00e9',
        'BigCat/c.mp4': 'big cat',
        'dog/a.mp4': 'a "big" dog',
        'dog/b.mp4': 'a dog',
        'dog/c.mp4': 'dog',
    }
    lines = [m for m in log.messages if m.startswith('folder: ')]
    assert len(lines) == 2  # one a split
    for line in lines:
        assert '; 4 with a caption of their own, 2 without; rows of captions.csv that' in line
        assert "name no video: 1 (first: 'BigCat/z.mp4')" in line and '\n' not in line


def test_without_classes_and_captions_nothing_is_told(tmp_path, log):
    videos(tmp_path, 'a.mp4', 'b.mp4')
    assert by_file(tmp_path) == {'a.mp4': '', 'b.mp4': ''}
    assert not [m for m in log.messages if 'caption' in m]
    (tmp_path / 'b.txt').write_text('a ball')
    assert by_file(tmp_path) == {'a.mp4': '', 'b.mp4': 'a ball'}
    assert any('; 1 with a caption of their own, 1 without' in m for m in log.messages)


@pytest.mark.parametrize(
    'table, message',
    [
        (b'', "its header is '': name one column 'path'"),
        (b'path;caption\n', "its header is 'path;caption'"),
        (b'path,text\n', "its header is 'path,text': name one column 'caption'"),
        (b'path,caption,path\n', "name one column 'path'"),
        (b'path,caption\na.mp4,x\nb.mp4,caf\xe9\n', ', line 3: not UTF-8'),
        ('path,caption\n'.encode('utf-16'), 'line 1: not UTF-8'),
        (b'path,caption\na.mp4,a cat, asleep\n', 'line 2: 3 fields instead of 2.*double quotes'),
        (b'path,caption\na.mp4\n', 'line 2: 1 fields instead of 2'),
        (b'path,caption\na.mp4,"x"y\n', 'line 2: not readable as CSV'),
        (b'path,caption\na.mp4,"x\ny\n', 'line 3: not readable as CSV'),
        (b'path,caption\na.mp4,x\nb.mp4,x\na.mp4,y\n', "line 4: a second caption.*'y' after 'x'"),
    ],
)
def test_a_table_that_cannot_be_read_is_a_user_error(tmp_path, table, message):
    videos(tmp_path, 'a.mp4', 'b.mp4')
    (tmp_path / 'captions.csv').write_bytes(table)
    with pytest.raises(UserError, match=re.compile(f'captions.csv.*{message}')) as error:
        sources.make_source(f'folder:{tmp_path}', 'train', OPTIONS)
    assert '\n' not in str(error.value)


def test_text_files_that_cannot_be_read_are_user_errors(tmp_path):
    (tmp_path / 'a.txt').write_bytes(b'x\ncaf\xe9')
    with pytest.raises(UserError, match='a.txt, line 2: not UTF-8'):
        captions.read(str(tmp_path), ['a.mp4'], ['a.txt'])
    (tmp_path / 'b.txt').mkdir()
    with pytest.raises(UserError, match='b.txt cannot be read'):
        captions.read(str(tmp_path), ['b.mp4'], ['b.txt'])


def test_moving_digits_know_all_their_captions():
    found = moving_digits.MovingDigits.captions
    assert len(found) == 80 and found == sorted(set(found))
    assert 'an eight moving up and left' in found and 'a zero moving right' in found
    source = moving_digits.MovingDigits(frames=2, height=24, width=24)
    assert {source[i]['caption'] for i in range(200)} < set(found)
