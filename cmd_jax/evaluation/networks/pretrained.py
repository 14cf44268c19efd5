"""Weight files inside installed packages: found without importing the package, and read safely.

Such packages carry pickles. A pickle can call any function while it is read, so a file is read
only if its SHA-256 is the recorded one, and by an unpickler that admits numpy arrays alone.
"""

import hashlib
import importlib.util
import io
import pathlib
import pickle

import numpy as np

from cmd_jax.errors import UserError

# An array's pickle names the function that rebuilds it by a private path, which numpy 2 has moved.
_rebuild_array = np.zeros(0).__reduce__()[0]
_ADMITTED = {
    ('numpy', 'ndarray'): np.ndarray,
    ('numpy', 'dtype'): np.dtype,
    ('numpy.core.multiarray', '_reconstruct'): _rebuild_array,
    ('numpy._core.multiarray', '_reconstruct'): _rebuild_array,
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f'{module}.{name} is not a numpy array')
        return _ADMITTED[module, name]

    def persistent_load(self, pid):
        raise pickle.UnpicklingError('it refers to an object outside the file')


def find(package: str, file: str) -> pathlib.Path | None:
    """Path of `file` inside the installed top-level `package`, or None where there is none."""
    spec = importlib.util.find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or ():
        path = pathlib.Path(folder, file)
        if path.is_file():
            return path
    return None


def sha256(path: str | pathlib.Path) -> str:
    """Of a file, as hexadecimal digits."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def read_pickle(path: str | pathlib.Path, sha256: str) -> dict:
    """Reads a pickle of nested dicts of numpy arrays.

    Args:
      path: the file.
      sha256: the file's digest, 64 hexadecimal digits.

    Raises:
      UserError: the file is not readable, is not the one with this digest, or holds anything
        other than numpy arrays.
    """
    try:
        data = pathlib.Path(path).read_bytes()
    except OSError as error:
        raise UserError(f'weights {path}: {error.strerror}; give a weight file') from None
    digest = hashlib.sha256(data).hexdigest()
    if digest != sha256:
        raise UserError(
            f'weights {path}: its SHA-256 is {digest[:12]}..., not the recorded {sha256[:12]}...; '
            'the file is damaged or of another version, install its package again'
        )
    try:
        return _ArrayUnpickler(io.BytesIO(data)).load()
    except Exception as error:  # a malformed pickle raises almost anything
        raise UserError(f'weights {path}: not a pickle of numpy arrays ({error})') from None
