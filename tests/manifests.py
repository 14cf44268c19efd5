"""Manifests for tests: written in each format, locally or in the memory of the process."""

import json

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

SUFFIXES = ('.csv', '.jsonl', '.ndjson', '.parquet')


def write(path, columns):
    """A table in the format of the extension; a value of None is an empty field, or no key."""
    path = str(path)
    rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
    with fsspec.open(path, 'wb') as f:
        if path.endswith('.csv'):

            def field(value):
                return '' if value is None else '"' + str(value).replace('"', '""') + '"'

            lines = [','.join(columns)] + [','.join(map(field, row.values())) for row in rows]
            f.write('\r\n'.join(lines + ['']).encode())
        elif path.endswith('.parquet'):
            pq.write_table(pa.table(columns), f)
        else:
            rows = [{k: v for k, v in row.items() if v is not None} for row in rows]
            f.write('\n'.join(map(json.dumps, rows)).encode())
    return path


def file(tmp_path, text, name='m.csv'):
    (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return str(tmp_path / name)
