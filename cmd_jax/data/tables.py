"""Tables in files of CSV, JSON lines or Parquet: the columns that are wanted, in Arrow's memory.

What no reader can take makes a `UserError` with the number of the row, counted from 1 behind the
header; blank lines do not count.
"""

import contextlib
import csv
import io
import json
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from cmd_jax.data import files
from cmd_jax.errors import UserError

# What a column may hold, in words for messages.
TEXT, NAME, NUMBER = 'text', 'names, or whole numbers', 'numbers'
FIRST = 10  # things in an error message
HEAD = 2**20  # bytes of JSON lines that are looked into for names of columns


def read(path: str, columns: Mapping[str, str]) -> tuple[pa.Table, list[str]]:
    """The columns of a table that are wanted and there.

    CSV (UTF-8, commas, a header) has text alone, whatever is wanted: '001' and 'NA' are what they
    are, and an empty field is null. JSON lines have strings for TEXT, float64 for NUMBER, and
    either strings or int64 for NAME; a key that is missing is null, and one that has no value in
    any row may count as no column. Parquet has the types it was written with.

    Args:
      path: file or URL; .csv, .jsonl or .ndjson, or .parquet.
      columns: {name: TEXT, NAME or NUMBER} of those wanted, the first of which must be there.

    Returns:
      The table, and the names of all columns, also of those that are not wanted.

    Raises:
      UserError: unknown extension, not there, not readable, without rows, without the first column,
        or with two of one name.
    """
    extension = posixpath.splitext(address(path))[1].lower()
    if extension not in READERS:
        raise UserError(
            f'{path}: the extension {extension!r} is unknown: give a file that ends in '
            f'{", ".join(READERS)}'
        )
    table, names = READERS[extension](path, columns)
    if not len(table):
        raise UserError(f'{path} has no rows: write one for each video')
    return table, names


def address(path: str) -> str:
    """A URL without the signature behind it."""
    return path.partition('?')[0] if path.startswith(('http://', 'https://')) else path


def read_csv(path, columns) -> tuple[pa.Table, list[str]]:
    with opened(path, 'CSV') as f:
        # One line after the other: pyarrow reads on behind the header, so its errors count rows.
        lines = (line.decode('utf-8-sig') for line in iter(f.readline, b''))
        header = next((row for row in csv.reader(lines, strict=True) if row), [])
        names = [name.strip() for name in header]
        wanted = pick(path, columns, names)
        table = pyarrow.csv.read_csv(
            Ended(f, [END if name == wanted[0] else '' for name in names]),
            # Only one thread knows the number of a row.
            pyarrow.csv.ReadOptions(use_threads=False, column_names=names),
            pyarrow.csv.ParseOptions(newlines_in_values=True),
            pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(wanted, pa.string()),
                include_columns=wanted,
                null_values=[''],
                strings_can_be_null=True,
            ),
        )
    if not len(table) or table[0][-1].as_py() != END:
        raise UserError(
            f'{path}: a double quote that is opened in its last row, number {len(table)}, is never '
            'closed: look for it there, or above'
        )
    return table.slice(0, len(table) - 1), names


END = '\x1e the end'


class Ended:
    """A CSV file with one row more, which a quote that is never closed would swallow.

    pyarrow takes such a quote for closed at the end of the file, and the rows behind it for text.
    """

    closed = False

    def __init__(self, f: io.IOBase, row: Sequence[str]):
        self._file, self._rest = f, ('\n' + ','.join(row) + '\n').encode()

    def read(self, size: int = -1) -> bytes:
        content = self._file.read(size)
        if not content:
            content, self._rest = self._rest, b''
        return content

    def readable(self) -> bool:
        return True


def read_jsonl(path, columns) -> tuple[pa.Table, list[str]]:
    with opened(path, 'JSON lines') as f:
        head = f.read(HEAD)
    if not head.strip():
        return pa.table({}), []
    names = head_keys(head)
    errors = []
    for kind in (pa.string(), pa.int64()):
        types = {TEXT: pa.string(), NAME: kind, NUMBER: pa.float64()}
        options = pyarrow.json.ParseOptions(
            explicit_schema=pa.schema([(name, types[what]) for name, what in columns.items()]),
            unexpected_field_behavior='ignore',
        )
        with opened(path, 'JSON lines') as f:
            try:
                # Threads would read the whole file before they parse it.
                one = pyarrow.json.ReadOptions(use_threads=False)
                table = pyarrow.json.read_json(f, one, options)
            except pa.ArrowInvalid as e:
                errors.append(e)
                continue
        names += [n for n in columns if n not in names and table[n].null_count < len(table)]
        return table.select(pick(path, columns, names) if len(table) else []), names
    with opened(path, 'JSON lines') as f:
        explain(path, columns, f)
        # Of a kind that another try is for, or else what is wrong.
        reason = next((e for e in errors if 'changed from' not in str(e)), errors[0])
        raise pa.ArrowInvalid(re.sub(' in row [0-9]+', '', str(reason)))  # of a block, not the file


def head_keys(head: bytes) -> list[str]:
    """The keys of the first JSON lines, as they come; for those that are null in all rows, and to
    tell of those that are not read."""
    names = {}
    with contextlib.suppress(ValueError):  # a line that is cut, or no JSON: pyarrow sees that
        for line in head.splitlines()[:100]:
            row = json.loads(line) if line.strip() else {}
            names |= dict.fromkeys(row if isinstance(row, dict) else ())
    return list(names)


def explain(path, columns, f: io.IOBase):
    """Raises what is wrong with JSON lines that pyarrow does not read, where Python can tell."""
    known = {TEXT: (str,), NAME: (str, int), NUMBER: (int, float)}
    wrong, examples, kinds, count = {}, {}, {}, 0
    for line in f:
        if not line.strip():
            continue
        count += 1
        try:
            values = json.loads(line)
        except ValueError as e:
            raise UserError(f'{path} is not readable as JSON lines (row {count}: {e})') from e
        if not isinstance(values, dict):
            raise UserError(
                f'{path} is not readable as JSON lines: row {count} is {short(values)}: write an '
                f'object in each line, such as {{"{next(iter(columns))}": "a.mp4"}}'
            )
        for name, what in columns.items():
            value = values.get(name)
            if value is None:
                continue
            if type(value) not in known[what]:  # not isinstance: a bool is an int to it
                wrong.setdefault(name, []).append(count - 1)
                examples.setdefault(name, value)
            elif what == NAME:
                kinds.setdefault(name, {}).setdefault(type(value), count)
    for name, value in examples.items():
        mask = np.isin(np.arange(count), wrong[name])
        raise unexpected(path, name, value, mask, columns[name])
    for name, first in kinds.items():
        if len(first) > 1:
            raise UserError(
                f'{path}: column {name} is text in some rows (first: {first[str]}) and a number in '
                f'others (first: {first[int]}): use one of them'
            )


def read_parquet(path, columns) -> tuple[pa.Table, list[str]]:
    with opened(path, 'Parquet') as f:
        file = pyarrow.parquet.ParquetFile(f)
        names = file.schema_arrow.names
        return file.read(pick(path, columns, names)), names


READERS = {
    '.csv': read_csv,
    '.jsonl': read_jsonl,
    '.ndjson': read_jsonl,
    '.parquet': read_parquet,
}
REMEDIES = {
    'CSV': 'put text with commas between double quotes, and double those inside of it',
    'JSON lines': 'write one object in each line',
    'Parquet': 'write it again',
}


@contextlib.contextmanager
def opened(path: str, kind: str) -> Iterator[io.IOBase]:
    """The file; what is wrong with its content becomes a UserError."""
    with files.told(path), fsspec.open(path, 'rb') as f:
        try:
            yield f
        except (pa.ArrowException, UnicodeDecodeError, csv.Error, OSError) as e:
            # Broken Parquet is a bare OSError without a number, to pyarrow.
            if isinstance(e, OSError) and (type(e) is not OSError or e.errno is not None):
                raise
            reason = ' '.join(str(e).split())
            reason = reason if len(reason) <= 200 else f'{reason[:200]}...'
            raise UserError(f'{path} is not readable as {kind} ({reason}): {REMEDIES[kind]}') from e


def pick(path: str, columns: Mapping[str, str], names: Sequence[str]) -> list[str]:
    """Of the names of a table's columns those that are wanted."""
    for name in columns:
        if names.count(name) > 1:
            raise UserError(f'{path} has {names.count(name)} columns {name}: leave one')
    first = next(iter(columns))
    if first not in names:
        raise UserError(
            f'{path} has no column {first}, but {some(names) or "none at all"}: name one so'
        )
    return [name for name in columns if name in names]


# Messages


def unexpected(path: str, name: str, value, wrong: np.ndarray, what: str) -> UserError:
    """Of a column, one of the values, and the mask [rows] of all that are wrong."""
    return UserError(f'{path}: column {name} is {short(value)} in {rows(wrong)}: expected {what}')


def rows(wrong: np.ndarray) -> str:
    """'2 of 10 rows (first: 3, 7)', counted from 1, of a mask [rows]."""
    first = (np.flatnonzero(wrong)[:FIRST] + 1).tolist()
    return f'{np.count_nonzero(wrong)} of {len(wrong)} rows (first: {", ".join(map(str, first))})'


def some(names: Sequence[str]) -> str:
    more = f' and {len(names) - FIRST} more' if len(names) > FIRST else ''
    return ', '.join(names[:FIRST]) + more


def short(value, most: int = 60) -> str:
    """The value as Python writes it, cut."""
    text = repr(value)
    return text if len(text) <= most else text[: most - 3] + '...'
