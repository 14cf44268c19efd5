"""Files that get their name only when they are whole, whatever ends the process before."""

import contextlib
import errno
import os
import pathlib
import re
import secrets
from collections.abc import Iterator

from cmd_jax.errors import UserError

TEMPORARY = re.compile(r'.+\.[0-9a-f]{8}\.tmp')  # names of unfinished files: NAME.RANDOM.tmp
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Gives a path in the same folder, which is made; the file that the body writes there becomes
    `path`, with its content on the disk, if the body succeeds, and is deleted otherwise.

    What is no regular file, such as /dev/stdout, is written to as it is.

    Raises:
      UserError: the folder or the disk refuses. Other errors of the body stay what they are.
    """
    path = pathlib.Path(path).resolve()
    # Processes of several hosts may have one number.
    temporary = path.with_name(f'{path.name}.{secrets.token_hex(4)}.tmp')
    if path.exists() and not path.is_file():
        temporary = path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise _refused(path, e) from e
    try:
        yield temporary
        if temporary != path:
            # Some file systems would give a file its name first: after a crash it would be empty.
            with temporary.open('rb') as f:
                os.fsync(f.fileno())
            temporary.replace(path)
    except OSError as e:
        if e.errno in FULL or str(e.filename) == str(temporary):
            raise _refused(path, e) from e
        raise
    finally:
        if temporary != path:
            with contextlib.suppress(OSError):
                temporary.unlink()


def _refused(path: pathlib.Path, error: OSError) -> UserError:
    return UserError(f'{path} cannot be written ({error.strerror}): choose another folder')


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
