"""State dicts from files, readable and not."""

import pickle
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from cmd_jax.errors import UserError
from cmd_jax.interop import files
from tests.state_dicts import dit_dict, tensors

DIT = dit_dict(depth=1, classes=10)


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    with pytest.raises(UserError, match='none.pt: no such file'):
        files.read_state_dict(tmp_path / 'none.pt')
    path = tmp_path / 'weights.safetensors'
    path.write_bytes(b'corrupt')
    with pytest.raises(UserError, match='weights.safetensors cannot be read'):
        files.read_state_dict(path)
    path = tmp_path / 'weights.bin'
    path.write_bytes(b'')
    with pytest.raises(UserError, match=r'ends in .safetensors, .pt, .pth, .ckpt'):
        files.read_state_dict(path)
    monkeypatch.setitem(sys.modules, 'torch', None)
    path = tmp_path / 'weights.pt'
    path.write_bytes(b'')
    with pytest.raises(UserError, match=r'install torch .*, or convert'):
        files.read_state_dict(path)


def test_a_prefix_of_all_names_is_taken_off(tmp_path):
    save_file({f'module.{k}': x for k, x in DIT.items()}, tmp_path / 'a.safetensors')
    found = files.read_state_dict(tmp_path / 'a.safetensors')
    jax.tree.map(np.testing.assert_array_equal, found, DIT)
    mixed = {'module.a': np.zeros(1), 'b': np.zeros(1)}
    save_file(mixed, tmp_path / 'b.safetensors')
    assert set(files.read_state_dict(tmp_path / 'b.safetensors')) == set(mixed)


@pytest.mark.parity
def test_half_precision(tmp_path):
    import torch

    halves = {'a': torch.ones(2, dtype=torch.bfloat16), 'b': torch.ones(2, dtype=torch.float16)}
    torch.save(halves, tmp_path / 'halves.pt')
    halves = files.read_state_dict(tmp_path / 'halves.pt')
    assert {x.dtype for x in halves.values()} == {np.dtype('float32')}


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, 'w')


@pytest.mark.parity
def test_files_of_pytorch_that_are_refused(tmp_path):
    import torch

    path, mark = tmp_path / 'weights.pt', tmp_path / 'mark'
    # In today's archive, and as the bare pickle of old files.
    for save in (torch.save, lambda saved, path: path.write_bytes(pickle.dumps(saved, 2))):
        save({'ema': {}, 'x': Malicious(str(mark))}, path)
        with pytest.raises(UserError, match=r'more than weights \(opening it would call \w+.open'):
            files.read_state_dict(path, ('ema',))
        assert not mark.exists()
    pickle.loads(pickle.dumps(Malicious(str(mark)))).close()
    assert mark.exists(), 'as an ordinary reader of pickles would do'

    torch.save({'model': tensors(DIT)}, path)
    with path.open('r+b') as f:
        f.truncate(1000)
    with pytest.raises(UserError, match='cannot be read as a checkpoint of PyTorch'):
        files.read_state_dict(path)
    for saved, words in (
        ({'epoch': 3, 'optimizer': {}}, 'holds epoch, optimizer: no state dict, .* as ema, model'),
        ([1, 2], 'holds a list: no state dict'),
    ):
        torch.save(saved, path)
        with pytest.raises(UserError, match=words):
            files.read_state_dict(path, ('ema', 'model'))
