"""Parameters of our modules from and to safetensors files with diffusers' names and layouts.

The attribute paths of the modules are the parameters' names, but for the last word:

    kernel [in out], [kh kw in out]  <->  weight [out in], [out in kh kw]
    scale, embedding                 <->  weight
    all others                       <->  the same name
"""

import re
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from cmd_jax.errors import UserError, parse_json
from cmd_jax.models.rngs import make_rngs
from cmd_jax.parallel.mesh import param_sharding
from cmd_jax.parallel.placement import put

WORDS = {'kernel': 'weight', 'scale': 'weight', 'embedding': 'weight'}
# Buffers of old files that are no parameters.
SKIPPED = r'(.*\.)?position_ids'
PICKLES = ('.bin', '.pt', '.pth', '.ckpt')
LISTED = 10  # names in an error message

Renamed = tuple[tuple[str, str], ...]


def abstract(module: type, **arguments) -> nnx.Module:
    """A network that has shapes in place of parameters."""
    return nnx.eval_shape(lambda: module(**arguments, rngs=make_rngs(0)))


class Tensors:
    """The tensors of a part's folder by name, over one file or several with an index."""

    def __init__(self, folder: Path, stems: tuple[str, ...]):
        self.folder = folder
        self.files = {}
        for path in find_files(folder, stems):
            try:
                with safetensors.safe_open(path, framework='numpy') as f:
                    for name in f.keys():
                        self.files[name] = path
            except (safetensors.SafetensorError, OSError) as e:
                raise UserError(f'{path} cannot be read ({e}): download it again') from e

    def names(self, renamed: Renamed, skipped: str) -> Iterator[tuple[str, str]]:
        """(our name, name in the file) of each parameter."""
        for name in self.files:
            if re.fullmatch(f'{SKIPPED}|{skipped}', name):
                continue
            ours = name
            for pattern, word in renamed:
                ours = re.sub(pattern, word, ours)
            yield ours, name

    def read(self, name: str) -> np.ndarray:
        with safetensors.safe_open(self.files[name], framework='numpy') as f:
            return f.get_tensor(name)


def find_files(folder: Path, stems: tuple[str, ...]) -> list[Path]:
    """The safetensors files of a part: one file, or those that an index names; full precision
    before a variant (.fp16)."""
    if not folder.is_dir():
        raise UserError(f'{folder.parent} has no {folder.name}/: give a whole diffusers folder')
    for stem in stems:
        for variant in ('', '.fp16', '.bf16'):
            single = folder / f'{stem}{variant}.safetensors'
            if single.exists():
                return [single]
            for index in folder.glob(f'{stem}.safetensors.index{variant}.json'):
                listed = parse_json(index, index.read_bytes()).get('weight_map')
                if not isinstance(listed, dict) or not listed:
                    raise UserError(f'{index} has no weight_map: download it again')
                names = sorted(set(listed.values()))
                missing = [name for name in names if not (folder / name).exists()]
                if missing:
                    raise UserError(f'{folder} lacks {missing[0]}, which {index.name} names')
                return [folder / name for name in names]
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise UserError(
            f'{folder} holds {pickles[0]} and no safetensors file: a pickle can run any program '
            'when it is opened, so it is not read; convert it to safetensors'
        )
    raise UserError(
        f'{folder} holds no {stems[0]}.safetensors: download the folder again; where a repository '
        'has none, read the model with its own library, and save_pretrained it to a folder'
    )


def name_of(path: tuple) -> str:
    """The name in a file of the parameter at a path of the module."""
    *module, last = (str(word) for word in path)
    return '.'.join([*module, WORDS.get(last, last)])


def to_ours(x: np.ndarray, path: tuple) -> np.ndarray:
    """From PyTorch's layout to ours."""
    if path[-1] != 'kernel':
        return x
    return x.T if x.ndim == 2 else x.transpose(2, 3, 1, 0)


def to_theirs(x: np.ndarray, path: tuple) -> np.ndarray:
    """From our layout to PyTorch's."""
    if path[-1] != 'kernel':
        return x
    return x.T if x.ndim == 2 else x.transpose(3, 2, 0, 1)


def load(
    module: nnx.Module,
    folder: Path,
    stems: tuple[str, ...],
    renamed: Renamed,
    skipped: str,
    mesh: jax.sharding.Mesh,
    dtype,
) -> nnx.Module:
    """An abstract module filled from a part's folder, tensor by tensor.

    Args:
      module: its parameters' shapes are what the files must have.
      folder, stems: of the part, and its files' names without suffix.
      renamed: (pattern, replacement) of names that differ from ours in some files.
      skipped: pattern of names that are not the module's.
      mesh: where the parameters are placed, as PARAMS says.
      dtype: what parameters are kept in.

    Raises:
      UserError: for missing or unreadable files, and for missing, unknown or misshapen parameters.
    """
    graphdef, params = nnx.split(module, nnx.Param)
    params = nnx.to_pure_dict(params)
    tensors = Tensors(folder, stems)
    names = dict(tensors.names(renamed, skipped))
    expected = {name_of(path): path for path in paths(params)}
    complain(folder, 'missing', [name for name in expected if name not in names])
    complain(folder, 'unknown', [name for name in names if name not in expected])
    shardings = param_sharding(params, mesh)
    wrong = []

    def place(path, leaf, sharding):
        path = tuple(key.key for key in path)
        x = tensors.read(names[name_of(path)])
        # Very old files keep linear layers as 1x1 convolutions.
        if x.ndim == 4 and len(leaf.shape) == 2 and x.shape[2:] == (1, 1):
            x = x[:, :, 0, 0]
        x = to_ours(x, path)
        if x.shape != leaf.shape:
            wrong.append(f'{name_of(path)} ({x.shape} instead of {leaf.shape})')
            return None
        return put(np.ascontiguousarray(x, dtype), sharding)

    params = jax.tree_util.tree_map_with_path(place, params, shardings)
    complain(folder, 'misshapen', wrong)
    return nnx.merge(graphdef, params)


def save(module: nnx.Module, path: Path):
    """Writes a module's parameters as one safetensors file."""
    params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    tensors = {}
    for path_, x in jax.tree_util.tree_leaves_with_path(params):
        keys = tuple(key.key for key in path_)
        tensors[name_of(keys)] = np.ascontiguousarray(to_theirs(np.asarray(x), keys))
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(tensors, path, metadata={'format': 'pt'})


def paths(params: dict) -> list[tuple]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [tuple(key.key for key in path) for path, _ in leaves]


def complain(folder: Path, what: str, names: list[str]):
    if names:
        more = f' and {len(names) - LISTED} more' if len(names) > LISTED else ''
        raise UserError(
            f'{folder}: {len(names)} {what} parameters: {", ".join(names[:LISTED])}{more}'
        )
