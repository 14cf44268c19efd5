"""The exceptions that are not defects, and checks that raise one."""

import difflib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in a config, file, weight or shape that the user can mend.

    The message is one line that names the field, the value and the remedy. Scripts print it and
    exit with code 2, without a traceback. Any other exception is a defect of this library and
    keeps its traceback.
    """


class Interrupted(Exception):
    """A signal asked for the end, and what was to be saved is saved.

    Attributes:
      code: the exit code of scripts.
    """

    def __init__(self, message: str = '', code: int = 130):
        super().__init__(message)
        self.code = code


def choose(field: str, value: str, known: Iterable[str]):
    """Raises UserError if the value of a field is not one of the known ones; names the nearest."""
    known = list(known)
    if value not in known:
        near = difflib.get_close_matches(str(value), known, n=1, cutoff=0.0)[0]
        raise UserError(
            f'{field}={value!r} is unknown: did you mean {near!r}? Known: {", ".join(known)}'
        )


def parse_json(where: str | os.PathLike, text: str | bytes) -> dict:
    """The object that a JSON file holds.

    Raises:
      UserError: `where` is damaged, or no object.
    """
    try:
        tree = json.loads(text)
    except ValueError as e:  # also of bytes that are no text
        raise UserError(f'{where} is not readable as JSON ({e}): restore it or remove it') from e
    if not isinstance(tree, dict):
        raise UserError(f'{where} holds {type(tree).__name__}, not an object: restore it')
    return tree


def writable(name: str, folder: str | os.PathLike) -> pathlib.Path:
    """Makes a folder, or says that it cannot be before anything costly is done.

    Raises:
      UserError: `name`=folder cannot be written, or is an address rather than a folder.
    """
    if '://' in str(folder):
        raise UserError(
            f'{name}={str(folder)!r} is an address: give a folder, such as one that the bucket is '
            'mounted on'
        )
    folder = pathlib.Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise UserError(
            f'{name}={str(folder)!r} cannot be written ({e.strerror}): choose another folder'
        ) from e
    return folder
