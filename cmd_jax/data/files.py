"""Files by path or URL (gs://, s3://, https://, ...): one library, fsspec, for all of them.

fsspec's own packages reach the stores: `pip install gcsfs` for gs://, `s3fs` for s3://.
"""

import contextlib
import functools
import hashlib
import os
import posixpath

import fsspec
from absl import logging

from cmd_jax import atomic
from cmd_jax.errors import UserError


def is_url(path: str) -> bool:
    return '://' in path


def join(folder: str, *parts: str) -> str:
    """A path in a folder; an absolute path or a URL stays what it is."""
    path = folder
    for part in parts:
        if is_url(part) or not is_url(path):
            path = part if is_url(part) else os.path.join(path, part)
        else:
            path = posixpath.join(path, part)
    return path


@contextlib.contextmanager
def told(path: str):
    """Whatever goes wrong with a path in the body becomes a UserError that names it."""
    try:
        yield
    except (UserError, TypeError, AttributeError, NameError, LookupError):
        raise  # the body's own
    except FileNotFoundError as e:
        raise UserError(f'{path} does not exist: give another path') from e
    except ImportError as e:
        raise UserError(f'{path}: a package is missing for this kind of address: {e}') from e
    except Exception as e:  # each store has errors of its own
        reason = getattr(e, 'strerror', None) or f'{type(e).__name__}: {e}'.splitlines()[0]
        raise UserError(f'{path} cannot be read ({reason}): check address and rights') from e


def system(path: str) -> fsspec.AbstractFileSystem:
    """The file system of a path."""
    with told(path):
        return fsspec.core.url_to_fs(path)[0]


def exists(path: str) -> bool:
    if not is_url(path):
        return os.path.exists(path)
    with told(path):
        return system(path).exists(path)


def is_folder(path: str) -> bool:
    if not is_url(path):
        return os.path.isdir(path)
    with told(path):
        return system(path).isdir(path)


def read(path: str) -> bytes:
    """The content of a file.

    Raises:
      UserError: not there, or not readable.
    """
    with told(path), fsspec.open(path, 'rb') as f:
        return f.read()


def write(path: str, content: bytes):
    """Writes a file that appears under its name only when it is complete; its folder is made."""
    if is_url(path):
        with told(path), fsspec.open(path, 'wb') as f:  # stores show a file when it is closed
            f.write(content)
        return
    atomic.write(path, content)


def names(folder: str, suffix: str) -> list[str]:
    """Sorted names of the files directly in a folder that end so; none if there is no folder."""
    if not is_url(folder):
        found = os.listdir(folder) if is_folder(folder) else []
        return sorted(name for name in found if name.endswith(suffix))
    with told(folder):
        files = system(folder)
        found = files.ls(folder, detail=False) if files.exists(folder) else []
    return sorted(posixpath.basename(p) for p in found if p.endswith(suffix))


def walk(folder: str) -> list[str]:
    """All files below a folder of a store, as paths in it."""
    with told(folder):
        files = system(folder)
        root = files._strip_protocol(folder).rstrip('/')
        return sorted(p.removeprefix(root).lstrip('/') for p in files.find(folder))


def local(path: str) -> str:
    """A path on this machine with the content of `path`; a URL's is copied once, into the cache."""
    if not is_url(path):
        return path
    target = os.path.join(cache(), hashlib.sha256(path.encode()).hexdigest()[:16])
    target = os.path.join(target, posixpath.basename(path))
    with told(path):
        files = system(path)
        if not os.path.exists(target) or os.path.getsize(target) != files.size(path):
            logging.info('copying %s (%.2f GB) to %s', path, files.size(path) / 1e9, target)
            with atomic.replacing(target) as temporary, told(path):
                files.get_file(path, str(temporary))
    return target


@functools.cache
def cache() -> str:
    """Where copies of remote files lie: CMD_JAX_CACHE, or cmd_jax in the user's cache folder."""
    usual = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    return os.environ.get('CMD_JAX_CACHE') or os.path.join(usual, 'cmd_jax')
