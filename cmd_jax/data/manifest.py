"""Manifests: tables with a row for each video or part of one, as CSV, JSON lines or Parquet.

The columns, of which only `path` is needed:
  path: the video's file: relative to the manifest's folder, absolute, or a URL.
  caption: text.
  label: class names, or whole numbers from 0 on; in all rows.
  start, end: of the part that is used, in seconds; empty: the beginning, the end of the video.
  split: 'train' or 'test', in all rows.

Rows stay in the columns of Arrow and NumPy, and are checked there: a table may have millions.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cmd_jax.data import listings, tables
from cmd_jax.data.tables import FIRST, rows, short, some, unexpected
from cmd_jax.data.videos import Listing
from cmd_jax.errors import UserError

COLUMNS = {
    'path': tables.TEXT,
    'caption': tables.TEXT,
    'label': tables.NAME,
    'start': tables.NUMBER,
    'end': tables.NUMBER,
    'split': tables.TEXT,
}
SPLITS = ('train', 'test')
MAX_CLASSES = 100_000  # a label with more is the number or the name of a video
# What str.split takes for white space.
WHITE = r'[\s\v\x{1c}-\x{1f}\x{85}\p{Z}]+'
DECIMAL = r'^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$'
WHOLE = r'^-?[0-9]+$'


def read(path: str) -> Listing:
    """The videos of a manifest.

    White space in captions counts as one space. Without a column of captions, a class name in
    words is the caption of its videos. Labels that are all whole numbers are the classes' numbers
    themselves, whether they are stored as text or not.

    Args:
      path: file or URL; .csv (UTF-8, commas, a header), .jsonl or .ndjson, or .parquet.

    Raises:
      UserError: not there, not readable, no rows, or a column with what it may not hold.
    """
    table, names = tables.read(path, COLUMNS)
    columns, class_names, notes = {'file': read_paths(path, table['path'])}, [], []
    if 'label' in table.column_names:
        columns['label'], class_names, in_words = read_labels(path, table['label'])
        if in_words is not None:
            columns['caption'] = in_words
    if 'caption' in table.column_names:
        columns['caption'], blank = read_captions(path, table['caption'])
        notes += [f'{blank} of {len(table)} rows without a caption'] if blank else []
    columns |= read_parts(path, table)
    if 'split' in table.column_names:
        columns['split'] = read_splits(path, table['split'])
    used = [name for name in names if name in COLUMNS]
    ignored = [name or "''" for name in names if name not in COLUMNS]
    notes.insert(0, f'columns {", ".join(used)} (ignored: {some(ignored) or "none"})')
    return Listing(
        'manifest', folder_of(tables.address(path)), pa.table(columns), class_names, notes=notes
    )


def folder_of(path: str) -> str:
    """The folder of a file; of a URL, what posixpath.join continues to one."""
    folder, slash, _ = path.rpartition('/')
    return folder if folder and not folder.endswith('/') else folder + slash or '.'


# Columns


def read_paths(path: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    column = as_text(path, 'path', column)
    empty = missing(column)
    if empty.any():
        raise UserError(
            f'{path}: column path is empty in {rows(empty)}: fill it or remove the rows'
        )
    return column


def read_labels(path: str, column: pa.ChunkedArray):
    """Labels [rows] int32, names of the classes, and [rows] the names in words, if they are any."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_floating(column.type):  # whole numbers with gaps, to pandas
        column = pc.if_else(pc.is_nan(column), None, column)
    elif not pa.types.is_integer(column.type):
        column = pc.utf8_trim_whitespace(as_text(path, 'label', column))
    none = missing(column)
    if none.all():
        raise UserError(
            f'{path}: column label is empty in all {len(column)} rows: fill it or remove the column'
        )
    if none.any():
        raise UserError(
            f'{path}: column label is empty in {rows(none)}, but not in the others: label all '
            'videos, or remove the column'
        )
    if pa.types.is_string(column.type) and not matches(column, WHOLE).all():
        return named_labels(path, column)
    try:
        labels = column.cast(pa.int64()).to_numpy()
    except pa.ArrowInvalid as e:  # fractions, or too large
        raise UserError(f'{path}: column label: {e}: expected {COLUMNS["label"]}') from e
    wrong = (labels < 0) | (labels >= MAX_CLASSES)
    if wrong.any():
        raise UserError(
            f'{path}: column label is {labels[wrong][0]} in {rows(wrong)}: number the classes from '
            f'0 on, to {MAX_CLASSES - 1} at most'
        )
    return labels.astype(np.int32), [str(i) for i in range(labels.max() + 1)], None


def named_labels(path, column):
    names = pc.unique(column)
    if len(names) > MAX_CLASSES:
        raise UserError(
            f'{path}: column label has {len(names)} different values, more than {MAX_CLASSES}: '
            'labels are classes; what describes one video goes into caption'
        )
    names = sorted(names.to_pylist())
    labels = pc.index_in(column, pa.array(names, pa.string()))
    words = pa.array([listings.in_words(name) for name in names], pa.string())
    return labels.to_numpy().astype(np.int32), names, words.take(labels.combine_chunks())


def read_captions(path: str, column: pa.ChunkedArray) -> tuple[pa.ChunkedArray, int]:
    """Captions, '' where there is none; and how many of these there are."""
    column = pc.fill_null(as_text(path, 'caption', column), '')
    column = pc.replace_substring_regex(column, WHITE, ' ')
    column = pc.utf8_trim(column, ' ')
    blank = missing(column)
    if blank.all():
        raise UserError(
            f'{path}: column caption is empty in all {len(column)} rows: fill it or remove the '
            'column'
        )
    return column, int(blank.sum())


def read_parts(path: str, table: pa.Table) -> dict[str, np.ndarray]:
    """The columns start and end, NaN where a row has none; without those that are always empty."""
    parts = {}
    for name in ('start', 'end'):
        if name in table.column_names:
            parts[name] = read_seconds(path, name, table[name])
    start, end = (parts.get(name, np.full(len(table), np.nan)) for name in ('start', 'end'))
    wrong = end <= np.nan_to_num(start)
    if wrong.any():
        row = np.argmax(wrong)
        raise UserError(
            f'{path}: end={end[row]:g} is not behind start={np.nan_to_num(start[row]):g} in '
            f'{rows(wrong)}: both are seconds from the beginning of the video'
        )
    return {name: values for name, values in parts.items() if not np.isnan(values).all()}


def read_seconds(path: str, name: str, column: pa.ChunkedArray) -> np.ndarray:
    """Times [rows] float64."""
    kind = column.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)):
        column = pc.utf8_trim_whitespace(as_text(path, name, column))
        column = pc.if_else(pc.equal(column, ''), None, column)
        wrong = ~matches(column, DECIMAL)
        if wrong.any():
            raise unexpected(
                path, name, column[int(np.argmax(wrong))].as_py(), wrong, COLUMNS[name]
            )
    seconds = pc.fill_null(column.cast(pa.float64(), safe=False), np.nan).to_numpy()
    wrong = (seconds < 0) | np.isinf(seconds)
    if wrong.any():
        raise UserError(
            f'{path}: column {name} is {seconds[wrong][0]:g} in {rows(wrong)}: use seconds from 0 '
            'on, or leave it empty'
        )
    return seconds


def read_splits(path: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    column = pc.fill_null(pc.utf8_trim_whitespace(as_text(path, 'split', column)), '')
    wrong = ~pc.is_in(column, pa.array(SPLITS)).to_numpy()
    if wrong.any():
        values = pc.unique(column.filter(pa.array(wrong))).slice(0, FIRST).to_pylist()
        raise UserError(
            f'{path}: column split is {some([short(v) for v in values])} in {rows(wrong)}: '
            f'use {" and ".join(SPLITS)}, or remove the column'
        )
    return column


def as_text(path: str, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of any of Arrow's types for text, as strings."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    is_text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    if not any(test(kind) for test in (*is_text, pa.types.is_null)):
        raise UserError(f'{path}: column {name} is of type {kind}: expected {COLUMNS[name]}')
    column = column.cast(pa.string())
    try:
        column.validate(full=True)
    except pa.ArrowInvalid as e:
        raise UserError(f'{path}: column {name} is not UTF-8: save it as UTF-8') from e
    return column


def missing(column: pa.ChunkedArray) -> np.ndarray:
    """Which rows [rows] have no value, or only white space."""
    if pa.types.is_string(column.type):
        column = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(column), ''), True)
        return column.to_numpy()
    return column.is_null().to_numpy()


def matches(column: pa.ChunkedArray, pattern: str) -> np.ndarray:
    """Which rows [rows] match a regular expression, or are null."""
    return pc.fill_null(pc.match_substring_regex(column, pattern), True).to_numpy()
