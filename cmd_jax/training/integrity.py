"""Is a checkpoint whole? STEP/manifest.I-of-N.json says what its files were when it was saved.

Each of the N processes that saved hashes a share of the files into a manifest of its own; the
checkpoint is complete when all N are there. They may be checked by any number of processes.

STEP.unsealed is there from before the first file until the last manifest: a step without all of its
manifests was interrupted, or is still being saved, if it has one, and is damaged if it has none.
"""

import concurrent.futures
import hashlib
import json
import os
import re
import time
import zlib
from pathlib import Path

NAME = re.compile(r'manifest\.(\d+)-of-(\d+)\.json')
PARTIAL = re.compile(NAME.pattern + r'\.partial')
UNSEALED = '.unsealed'
THREADS = 4  # hashing releases the interpreter lock


def begin(folder: Path):
    """Marks a checkpoint as not yet sealed, before anything of it is written."""
    path = _marker(folder)
    path.touch()
    _sync(path.parent)


def end(folder: Path):
    """Takes the mark away, once all manifests are there."""
    _marker(folder).unlink()


def interrupted(folder: Path) -> bool:
    """Whether the saving of a checkpoint has not come to its end: killed, or still under way."""
    # In this order: the mark goes when the manifests are there.
    if not _marker(folder).exists():
        return False
    try:
        manifests = [m for path in folder.iterdir() if (m := NAME.fullmatch(path.name))]
    except OSError:
        return False  # for `fault` to tell
    return len(manifests) < max((int(m[2]) for m in manifests), default=1)


def seal(folder: Path, step: int, process: int = 0, processes: int = 1):
    """Writes the manifest of this process's share of a finished checkpoint, at once or not at all.

    The files are on the disk, not in a buffer, before their manifest says that they are.
    """
    files = _files(folder)
    # Other processes write their manifests at the same time.
    share = [n for n in files if not NAME.fullmatch(n) and _mine(n, process, processes)]
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        digests = list(pool.map(lambda name: _digest(folder / name, sync=True), share))
    content = {
        'step': step,
        'files': {name: [files[name], digest] for name, digest in zip(share, digests)},
    }
    path = folder / f'manifest.{process}-of-{processes}.json'
    partial = path.with_name(path.name + '.partial')
    with partial.open('wb') as f:
        f.write(_render(content))
        f.flush()
        os.fsync(f.fileno())
    for inner in {folder / Path(name).parent for name in share}:
        _sync(inner)
    partial.rename(path)
    _sync(folder)
    _sync(folder.parent)


def await_seals(folder: Path, processes: int, seconds: float):
    """Waits until the manifests of all processes are there.

    Raises:
      TimeoutError: they did not come in time.
    """
    names = [f'manifest.{i}-of-{processes}.json' for i in range(processes)]
    end = time.monotonic() + seconds
    while missing := [name for name in names if not (folder / name).exists()]:
        if time.monotonic() > end:
            raise TimeoutError(None, f'{missing[0]} did not come within {seconds:.0f} s')
        time.sleep(0.1)


def fingerprint(folder: Path) -> str:
    """A hash of the manifests of a checkpoint, and so of all its files."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if NAME.fullmatch(path.name):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def fault(
    folder: Path, step: int, item: str | None = None, process: int = 0, processes: int = 1
) -> str | None:
    """What is wrong with a checkpoint, beginning with the file's name; None: nothing.

    Presence and size of all files are looked at; contents of this process's share, and with `item`
    only of this item's files and of those that belong to no item.
    """
    try:
        found = _files(folder)
    except OSError as e:
        return f'cannot be listed ({e.strerror})'
    manifests = {name: m for name in found if (m := NAME.fullmatch(name))}
    counts = {int(m[2]) for m in manifests.values()}
    if not manifests:
        return 'manifest.0-of-1.json is missing'
    if len(counts) > 1:
        return f'{", ".join(sorted(manifests))} are of different saves'
    expected = {}
    for i in range(count := counts.pop()):
        name = f'manifest.{i}-of-{count}.json'
        if name not in manifests:
            return f'{name} is missing'
        content = _parse(folder / name)
        if content is None:
            return f'{name} is damaged'
        if content['step'] != step:
            return f'{name} is of step {content["step"]}'
        expected |= content['files']
    for name in sorted((expected.keys() | found.keys()) - manifests.keys()):
        if name not in found:
            return f'{name} is missing'
        if name not in expected:
            return f'{name} is no part of it'
        if found[name] != expected[name][0]:
            return f'{name} has {found[name]} bytes instead of {expected[name][0]}'

    def changed(name):
        try:
            same = _digest(folder / name) == expected[name][1]
        except OSError as e:
            return f'{name} cannot be read ({e.strerror})'
        return None if same else f'{name} has another content than was saved'

    share = [
        name
        for name in sorted(expected)
        if _mine(name, process, processes) and (not item or name.split('/')[0] in (item, name))
    ]
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return next((x for x in pool.map(changed, share) if x), None)


def _marker(folder: Path) -> Path:
    # Beside it: nothing can be put into it before Orbax gives it its name.
    return folder.with_name(folder.name + UNSEALED)


def _mine(name: str, process: int, processes: int) -> bool:
    # By name, not by place in a listing: a file system may show processes different listings.
    return zlib.crc32(name.encode()) % processes == process


def _files(folder: Path) -> dict[str, int]:
    """{path relative to the folder: bytes} of all files in and below it, but manifests that are
    being written."""

    def fail(error):
        raise error

    out = {}
    for parent, _, names in os.walk(folder, onerror=fail):
        for name in names:
            if PARTIAL.fullmatch(name):
                continue  # by the process that writes it
            path = Path(parent, name)
            out[path.relative_to(folder).as_posix()] = path.lstat().st_size
    return out


def _digest(path: Path, sync: bool = False) -> str:
    with path.open('rb') as f:
        if sync:
            os.fsync(f.fileno())
        return hashlib.file_digest(f, 'sha256').hexdigest()


def _sync(path: Path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _render(content: dict) -> bytes:
    body = json.dumps(content, indent=1, sort_keys=True)
    digest = hashlib.sha256(body.encode()).hexdigest()
    return json.dumps({**content, 'sha256': digest}, indent=1, sort_keys=True).encode()


def _parse(path: Path) -> dict | None:
    """What a manifest says; None if it is not, byte for byte, as it was written."""
    try:
        raw = path.read_bytes()
        content = json.loads(raw)
        del content['sha256']
        return content if _render(content) == raw else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
