"""A script of this repository, and what its training reads: `python -m tests.watched SCRIPT FLAGS`.

WATCHED=FILE: writes a line of JSON for each batch that a stage asks for, [stage, reader, indices,
places]; reader 0 is that of the training. WATCHED_FAIL=I:N: process I cannot have a batch after N.
"""

import collections
import json
import os
import runpy
import sys

from cmd_jax.errors import UserError
from cmd_jax.training import loop


def main():
    path, last = os.environ['WATCHED'], None
    if 'WATCHED_FAIL' in os.environ:
        process, count = os.environ['WATCHED_FAIL'].split(':')
        last = int(count) if f'--process_id={process}' in sys.argv else None
    real, readers = loop.read, collections.Counter()

    def read(config, stage, data):
        batches, name = real(config, stage, data), stage.name
        following, reader, asked = type(batches).__next__, readers[name], [0]
        readers[name] += 1

        class Watched(type(batches)):
            def __next__(self):
                if asked[0] == last:
                    raise UserError('the disk is gone')
                asked[0] += 1
                batch = following(self)
                line = [name, reader, batch['index'].tolist(), batch['place'].tolist()]
                with open(path, 'a') as f:
                    f.write(json.dumps(line) + '\n')
                return batch

        batches.__class__ = Watched
        return batches

    loop.read = read
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name='__main__')


if __name__ == '__main__':
    main()
