import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cmd_jax.data import manifest
from cmd_jax.errors import UserError
from tests.manifests import SUFFIXES, file, write


def error(path):
    """The message of the UserError: one line, with the path as 'm'."""
    with pytest.raises(UserError) as e:
        manifest.read(path)
    message = str(e.value)
    assert '\n' not in message and path in message
    return message.replace(path, 'm')


def test_files_that_are_not_there(tmp_path):
    assert 'm does not exist' in error(str(tmp_path / 'm.csv'))
    assert 'm does not exist' in error('memory://manifests/absent/m.parquet')
    (tmp_path / 'm.jsonl').mkdir()
    assert 'm cannot be read (Is a directory)' in error(str(tmp_path / 'm.jsonl'))
    assert 'm cannot be read' in error('nosuchkind://a/m.csv')
    for name in ('m.tsv', 'm', 'csv'):
        message = error(file(tmp_path, 'path\na\n', name))
        assert re.search('the extension .* is unknown.*csv, .jsonl, .ndjson, .parquet', message)


def test_an_address_may_be_signed():
    with pytest.raises(UserError) as e:  # the address of no machine, or no client for it
        manifest.read('http://127.0.0.1:9/m.csv?sign=a/b.c')
    assert 'extension' not in str(e.value)


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_columns_and_rows_that_are_missing(tmp_path, suffix):
    path = write(tmp_path / f'm{suffix}', {'file': ['a'], 'caption': ['x']})
    assert 'm has no column path, but file, caption: name one so' in error(path)
    path = write(tmp_path / f'm{suffix}', {'path': [], 'caption': []})
    assert 'm has no rows' in error(path)
    path = write(tmp_path / f'm{suffix}', {'path': ['a', None, 'c', ' '], 'label': [1, 2, 3, 4]})
    assert 'column path is empty in 2 of 4 rows (first: 2, 4)' in error(path)
    path = file(tmp_path, 'path,label\n,1\n"",2\n')
    assert 'column path is empty in 2 of 2 rows (first: 1, 2)' in error(path)


def test_a_column_twice(tmp_path):
    assert 'm has 2 columns caption' in error(file(tmp_path, 'path,caption, caption\na,b,c\n'))
    path = str(tmp_path / 'm.parquet')
    pq.write_table(pa.table([['a'], ['b'], ['c']], ['path', 'label', 'label']), path)
    assert 'm has 2 columns label' in error(path)
    path = file(tmp_path, '{"path": "a"}\n{"path": "a", "path": "b"}\n', 'm.jsonl')
    assert 'm is not readable as JSON lines' in error(path)
    assert '/path) was specified twice)' in error(path)


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_labels_in_all_rows_or_none(tmp_path, suffix):
    for labels in (['x', None, 'y', ' ', None], [5, None, 0, None, None]):
        path = write(tmp_path / f'm{suffix}', {'path': list('abcde'), 'label': labels})
        count, first = (3, '2, 4, 5')
        assert f'label is empty in {count} of 5 rows (first: {first})' in error(path)
    path = write(tmp_path / f'm{suffix}', {'path': ['a', 'b'], 'label': ['', None]})
    assert 'column label is empty in all 2 rows: fill it or remove the column' in error(path)


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_captions_in_no_row(tmp_path, suffix):
    columns = {'path': ['a', 'b', 'c'], 'caption': ['', '\u3000\n', None], 'label': ['x', 'y', 'z']}
    message = error(write(tmp_path / f'm{suffix}', columns))
    assert 'column caption is empty in all 3 rows: fill it or remove the column' in message


def test_a_key_that_is_null_in_all_json_lines_is_a_column(tmp_path):
    path = file(tmp_path, '{"path": "a", "label": null}\n{"path": "b"}\n', 'm.jsonl')
    assert 'column label is empty in all 2 rows' in error(path)


@pytest.mark.parametrize('suffix', SUFFIXES)
@pytest.mark.parametrize(
    'labels, message',
    [
        ([0, -1, -2], 'column label is -1 in 2 of 3 rows (first: 2, 3)'),
        ([0, 2**31, 1], 'column label is 2147483648 in 1 of 3 rows (first: 2)'),
        ([0, 100_000, 1], 'column label is 100000 in 1 of 3 rows (first: 2)'),
    ],
)
def test_labels_that_number_no_classes(tmp_path, suffix, labels, message):
    path = write(tmp_path / f'm{suffix}', {'path': ['a', 'b', 'c'], 'label': labels})
    assert message in error(path)


def test_labels_of_other_types(tmp_path):
    path = write(tmp_path / 'm.parquet', {'path': ['a', 'b'], 'label': [0.5, 1.0]})
    assert 'column label' in error(path) and 'expected names, or whole numbers' in error(path)
    path = write(tmp_path / 'm.parquet', {'path': ['a', 'b'], 'label': [True, False]})
    assert 'column label is of type bool' in error(path)
    path = file(tmp_path, 'path,label\na,99999999999999999999\n')
    assert 'column label' in error(path)
    for labels, message in [
        (['1.5', '2', '"x"'], 'column label is 1.5 in 1 of 3 rows (first: 1): expected names, or'),
        (['1', 'true', 'false'], 'column label is True in 2 of 3 rows (first: 2, 3)'),
        (['3', '"x"', '4'], 'text in some rows (first: 2) and a number in others (first: 1)'),
        (['{}', '"x"', '"x"'], 'column label is {} in 1 of 3 rows (first: 1)'),
        (['3', '99999999999999999999'], "couldn't parse:99999999999999999999"),
    ]:
        text = '\n'.join(f'{{"path": "a", "label": {label}}}' for label in labels)
        assert message in error(file(tmp_path, text, 'm.jsonl'))


def test_labels_that_name_single_videos(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, 'MAX_CLASSES', 2)
    path = write(tmp_path / 'm.csv', {'path': ['a', 'b', 'c'], 'label': ['x', 'y', 'z']})
    assert 'column label has 3 different values, more than 2' in error(path)


@pytest.mark.parametrize('suffix', SUFFIXES)
@pytest.mark.parametrize(
    'start, end, message',
    [
        (['0', 'x', '1:30', 'nan'], None, "start is 'x' in 3 of 4 rows (first: 2, 3, 4)"),
        ([0.0, -1.0, -2.0, 1.0], None, 'start is -1 in 2 of 4 rows (first: 2, 3)'),
        (None, [1.0, 2.0, -3.0, 1.0], 'end is -3 in 1 of 4 rows (first: 3)'),
        ([0.0, 2.0, 3.0, 1.0], [1, 2, None, 0.5], 'end=2 is not behind start=2 in 2 of 4 rows'),
        ([None, 2.0, 3.0, 1.0], [0.0, 3, None, 2], 'end=0 is not behind start=0 in 1 of 4 rows'),
    ],
)
def test_times(tmp_path, suffix, start, end, message):
    columns = {'path': list('abcd')}
    columns |= {'start': start} if start else {}
    columns |= {'end': [v if v is None else float(v) for v in end]} if end else {}
    path = write(tmp_path / f'm{suffix}', columns)
    if 'json' in suffix and 'first: 2, 3, 4' in message:  # text that is a number is text there
        message = "start is '0' in 4 of 4 rows (first: 1, 2, 3, 4): expected numbers"
    assert message in error(path)


def test_times_without_an_end(tmp_path):
    path = write(tmp_path / 'm.parquet', {'path': ['a', 'b'], 'end': [1.0, np.inf]})
    assert 'column end is inf in 1 of 2 rows (first: 2)' in error(path)
    path = file(tmp_path, 'path,end\na,1e999\n')
    assert 'column end is inf' in error(path)


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_splits_of_other_names(tmp_path, suffix):
    columns = {'path': list('abcde'), 'split': ['train', 'val', 'Test', None, 'val']}
    message = error(write(tmp_path / f'm{suffix}', columns))
    assert "column split is 'val', 'Test', '' in 4 of 5 rows (first: 2, 3, 4, 5)" in message
    assert 'use train and test, or remove the column' in message


def test_columns_of_other_types(tmp_path):
    columns = {'path': ['a'], 'caption': [3]}
    message = 'column caption is of type int64: expected text'
    assert message in error(write(tmp_path / 'm.parquet', columns))
    message = 'column caption is 3 in 1 of 1 rows (first: 1): expected text'
    assert message in error(write(tmp_path / 'm.jsonl', columns))
    path = str(tmp_path / 'm.parquet')
    pq.write_table(pa.table({'path': ['a'], 'start': pa.array([5], pa.duration('s'))}), path)
    assert 'column start is of type duration[s]: expected numbers' in error(path)


def test_tables_that_are_not_readable(tmp_path):
    good = write(tmp_path / 'good.parquet', {'path': [f'{i}.mp4' for i in range(1000)]})
    with open(good, 'rb') as f:
        good = f.read()
    for name, data, reason in [
        ('m.csv', '', 'm has no column path, but none at all'),
        ('m.csv', 'path;caption\na;b\n', 'm has no column path, but path;caption'),
        (
            'm.csv',
            '\npath,id\na,1\n\nb,2,x\n',
            'Row #2: Expected 2 columns, got 3',
        ),
        ('m.csv', b'path,caption\na,x\nb,\xff\n', 'Row #2.*invalid UTF8'),
        ('m.csv', 'path\na\n'.encode('utf-16'), 'not readable as CSV .*codec'),
        ('m.csv', 'path,caption\na,x\nb,"y\nc,z\n', 'double quote .* number 2, is never closed'),
        ('m.csv', 'id,path\n1,a\n2,"b\n3,c', 'double quote .* number 2, is never closed'),
        ('m.csv', 'path,id\na,1\nb,"2\nc,3\n', 'double quote .* number 2, is never closed'),
        ('m.csv', 'path,"id\na,1\n', 'not readable as CSV .*unexpected end of data'),
        ('m.jsonl', '{"path": "a"}\n\n{"path": "b"\n', 'JSON lines .row 2: Expecting'),
        ('m.jsonl', '{"path": "a", "label": 1}\n{"path": b}', 'JSON lines .row 2: Expecting'),
        ('m.jsonl', '[{"path": "a"}]', r"row 1 is \[{'path': 'a'}\]: write an object"),
        ('m.jsonl', b'{"path": "a"}\n{"path": "\xff"}', 'UTF-8'),
        ('m.parquet', b'', 'not readable as Parquet .*0 bytes'),
        ('m.parquet', b'path\na\n' * 20, 'not readable as Parquet .*magic bytes'),
        ('m.parquet', good[:-100], 'not readable as Parquet'),
        ('m.parquet', good[:100] + b'x' * 100 + good[200:], 'not readable as Parquet'),
        ('m.parquet', good[:-40] + b'x' * 32 + good[-8:], 'not readable as Parquet'),
    ]:
        message = error(file(tmp_path, data, name))
        assert re.search(reason, message), (message, reason)


def test_rows_in_messages_are_few(tmp_path):
    message = error(file(tmp_path, 'path,split\n' + 'a,x\n' * 1000))
    assert 'in 1000 of 1000 rows (first: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10)' in message
    message = error(file(tmp_path, ','.join(f'column{i}' for i in range(30)) + '\n'))
    assert 'column9 and 20 more' in message
