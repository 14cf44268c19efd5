"""Files that get their name only when they are whole, whatever ends the process before."""

import contextlib
import os
import pathlib
import re
from collections.abc import Iterator

from cmd_jax.errors import UserError

TEMPORARY = re.compile(r'.+\.\d+\.tmp')  # names of unfinished files: NAME.PROCESS.tmp


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Gives a path in the same folder, which is made; the file that the body writes there becomes
    `path`, with its content on the disk, if the body succeeds, and is deleted otherwise.

    Raises:
      UserError: for OSErrors, with their reason.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        # Some file systems would give a file its name first, and after a crash it would be empty.
        with temporary.open('rb') as f:
            os.fsync(f.fileno())
        temporary.replace(path)
    except OSError as e:
        reason = e.strerror or e
        raise UserError(f'{path} cannot be written ({reason}): choose another folder') from e
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write(path: str | os.PathLike, content: str | bytes):
    """Writes a file as UTF-8; raises as `replacing` does."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def clear(folder: str | os.PathLike):
    """Deletes the unfinished files that killed processes have left directly in a folder.

    Only where no other process is at work.
    """
    for path in pathlib.Path(folder).glob('*.tmp'):
        if TEMPORARY.fullmatch(path.name):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
