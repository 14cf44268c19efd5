"""State dicts from files: safetensors, or PyTorch's pickles where PyTorch is installed."""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import safetensors
from absl import logging

from cmd_jax.errors import UserError

PICKLES = ('.pt', '.pth', '.ckpt')
# Under which names a file may hold a stage's network: averaged weights before others.
NAMES = {
    'autoencoder': ('autoenc', 'model', 'state_dict', 'ema'),
    'content': ('ema', 'cdiff_model', 'model', 'state_dict'),
    'motion': ('ema', 'mdiff_model', 'model', 'state_dict'),
}
# Of networks that were trained on several devices.
PREFIX = 'module.'
LISTED = 10  # names in an error message


def read_state_dict(path: str | Path, names: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """{name: array} of a file.

    Args:
      path: FILE.safetensors, or FILE.pt, .pth or .ckpt, which are opened for tensors alone: a
        pickle that asks for more runs nothing.
      names: a pickle may hold the state dict in a dict; under the first of these names that is
        there. The log says which.

    A prefix 'module.' that all names have is taken off.

    Raises:
      UserError: for a missing or unreadable file, a pickle of other things or without PyTorch.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f'{path}: no such file')
    if path.suffix == '.safetensors':
        arrays = read_safetensors(path)
    elif path.suffix in PICKLES:
        arrays = read_pickle(path, names)
    else:
        raise UserError(f'{path}: give a file that ends in .safetensors, {", ".join(PICKLES)}')
    if all(name.startswith(PREFIX) for name in arrays):
        arrays = {name.removeprefix(PREFIX): x for name, x in arrays.items()}
    return arrays


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        with safetensors.safe_open(path, framework='numpy') as f:
            return {name: f.get_tensor(name) for name in f.keys()}
    except (safetensors.SafetensorError, OSError) as e:
        raise UserError(f'{path} cannot be read ({e}): download it again') from e


def read_pickle(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    try:
        import torch
        from torch.serialization import safe_globals
    except ImportError as e:
        raise UserError(
            f'{path} is a pickle, which only PyTorch reads: install torch (2.5 or newer), or '
            'convert the file where it is installed (safetensors.torch.save_file of its state dict)'
        ) from e

    try:
        # Training scripts keep their flags beside the weights; the class is a plain record.
        with safe_globals([argparse.Namespace]):
            tree = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as e:  # of the archive, the pickle, the tensors and the file system alike
        wanted = re.search(r'GLOBAL (\S+)', str(e))
        if wanted:
            raise UserError(
                f'{path} holds more than weights (opening it would call {wanted[1]}): it is not '
                'opened; save its state dict alone, or convert it to safetensors'
            ) from e
        if 'TorchScript' in str(e):
            raise UserError(
                f'{path} is a program (TorchScript), which is not run: save its weights where you '
                'trust it, torch.save(torch.jit.load(FILE).state_dict(), OTHER), and give that file'
            ) from e
        raise UserError(
            f'{path} cannot be read as a checkpoint of PyTorch ({type(e).__name__}): '
            'download it again'
        ) from e

    def is_state_dict(x):
        return (
            isinstance(x, Mapping)
            and len(x) > 0
            and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in x.items())
        )

    if not is_state_dict(tree):
        found = list(tree) if isinstance(tree, Mapping) else []
        name = next((name for name in names if name in found and is_state_dict(tree[name])), None)
        if name is None:
            holds = ', '.join(map(str, found[:LISTED])) or f'a {type(tree).__name__}'
            raise UserError(
                f'{path} holds {holds}: no state dict, neither itself nor as '
                f'{", ".join(names) or "a part"}'
            )
        logging.info('%s: the weights named %r', path, name)
        tree = tree[name]
    # NumPy has no bfloat16.
    tensors = {k: v.detach() for k, v in tree.items()}
    return {k: (v.float() if v.is_floating_point() else v).numpy() for k, v in tensors.items()}
