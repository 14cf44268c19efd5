"""Captions of the videos in a folder: one table, or a text file beside each video."""

import csv
import io
import os
from collections.abc import Collection, Sequence
from concurrent import futures

from cmd_jax.data import files
from cmd_jax.errors import UserError

CSV = 'captions.csv'
COLUMNS = ('path', 'caption')


def read(
    folder: str, videos: Sequence[str], others: Collection[str]
) -> tuple[dict[str, str], list[str]]:
    """The captions that the files of a folder have of their own.

    A file's caption is its row of captions.csv in the folder (UTF-8; a header with the columns
    `path` and `caption`, others are ignored), or else the content of the text file beside it
    (cat/1.mp4: cat/1.txt). White space counts as one space, and a blank caption as none.

    Args:
      folder: of the videos, a path or URL.
      videos: paths in the folder, '/' between parts.
      others: of the other files in it, among which captions are looked for.

    Returns:
      {file: caption}, without the videos that have none; and paths of captions.csv that are not
      among the videos.

    Raises:
      UserError: not UTF-8, a table without these columns or with broken rows, or with two captions
        for one file.
    """
    others = set(others)
    table = read_table(files.join(folder, CSV)) if CSV in others else {}
    absent = sorted(table.keys() - set(videos))
    rest = [v for v in videos if not table.get(v) and beside(v) in others]

    def caption(video):
        return in_one_line(read_text(files.join(folder, beside(video))))

    with futures.ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
        found = table | dict(zip(rest, pool.map(caption, rest)))
    return {video: found[video] for video in videos if found.get(video)}, absent


def beside(video: str) -> str:
    """The text file of a video."""
    return os.path.splitext(video)[0] + '.txt'


def read_table(path: str) -> dict[str, str]:
    """{path: caption} of a captions.csv."""
    rows = csv.reader(io.StringIO(read_text(path), newline=''), strict=True)
    table = {}
    try:
        header = [name.strip() for name in next(rows, [])]
        missing = [name for name in COLUMNS if header.count(name) != 1]
        if missing:
            raise UserError(
                f'{path}: its header is {",".join(header)!r}: name one column {missing[0]!r}, with '
                'commas between columns'
            )
        places = [header.index(name) for name in COLUMNS]
        for row in rows:
            if not row:
                continue
            if len(row) != len(header):
                raise UserError(
                    f'{path}, line {rows.line_num}: {len(row)} fields instead of {len(header)}: '
                    'put a caption that holds a comma between double quotes'
                )
            file, caption = (row[i] for i in places)
            caption = in_one_line(caption)
            if table.setdefault(file, caption) != caption:
                raise UserError(
                    f'{path}, line {rows.line_num}: a second caption for {file}: {caption!r} after '
                    f'{table[file]!r}; leave one'
                )
    except csv.Error as e:
        raise UserError(
            f'{path}, line {rows.line_num}: not readable as CSV ({e}); write a double quote inside '
            'a quoted caption twice'
        ) from e
    return table


def read_text(path: str) -> str:
    """The content of a file in UTF-8, with or without a byte order mark.

    Raises:
      UserError: unreadable or not UTF-8.
    """
    try:
        return files.read(path).decode('utf-8-sig')
    except UnicodeDecodeError as e:
        line = e.object.count(b'\n', 0, e.start) + 1
        raise UserError(f'{path}, line {line}: not UTF-8 ({e.reason}); save it as UTF-8') from e


def in_one_line(text: str) -> str:
    return ' '.join(text.split())
