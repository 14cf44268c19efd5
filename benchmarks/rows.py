"""Where benchmarks write: JSON files of rows, each written as soon as it is measured."""

import json
import time
from pathlib import Path

from cmd_jax import atomic
from cmd_jax.errors import UserError, parse_json, writable


class Rows(list):
    """The rows of a file {**about, 'rows': [...]}: a time limit costs what comes behind it alone.

    Args:
      path: None: nothing is written.
      about: what all rows share, such as `timing.machine()`.
      key: names of the values that tell rows apart.
      part: whether only some of all rows are measured: those that the file has besides stay.

    Raises:
      UserError: the folder cannot be written; or the rows that are to stay are not of these
        settings and this machine.
    """

    def __init__(self, path: str | None, about: dict, key: tuple[str, ...], part: bool = False):
        super().__init__()
        self.path, self.about, self.key = path and Path(path), about, key
        if not path:
            return
        writable('--out', self.path.parent)
        if part and self.path.is_file():
            found = parse_json(self.path, self.path.read_text())
            # As it is read back: tuples are lists.
            now = json.loads(json.dumps(about))
            for name, value in now.items():
                if name != 'date' and found.get(name) != value:
                    raise UserError(
                        f'--out={path} holds rows of {name}={found.get(name)!r}, not {value!r}: '
                        'name another file'
                    )
            self.extend(found['rows'])

    def add(self, row: dict):
        """Takes the place of the row with the same key, if there is one."""
        row = row | {'date': time.strftime('%Y-%m-%d')}
        same = [i for i, old in enumerate(self) if self._key(old) == self._key(row)]
        if same:
            self[same[0]] = row
        else:
            self.append(row)
        if self.path:
            atomic.write(self.path, json.dumps(self.about | {'rows': self}, indent=1) + '\n')

    def _key(self, row: dict) -> list:
        return [row.get(name) for name in self.key]
