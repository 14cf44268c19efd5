"""Damage to any file of a checkpoint is noticed: the one before comes back, or an error."""

import re

import jax
import numpy as np
import pytest

from cmd_jax.errors import UserError
from cmd_jax.training import integrity
from cmd_jax.training.checkpoint import Checkpoints
from tests.test_checkpoint import STATISTICS, abstract, make, prepare

WIDTH = 1000  # TensorStore keeps arrays of more than 1 KiB in files of their own, without checksums

DAMAGES = {
    'halved': lambda x: x[: len(x) // 2],
    'emptied': lambda x: b'',
    'flipped at its start': lambda x: flip(x, 0),
    'flipped in its middle': lambda x: flip(x, len(x) // 2),
    'flipped at its end': lambda x: flip(x, len(x) - 1),
    'deleted': lambda x: None,
}


def flip(content, at):
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def put(path, content):
    path.unlink() if content is None else path.write_bytes(content)


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
    """Two checkpoints, with every item."""
    folder = tmp_path_factory.mktemp('pair')
    with Checkpoints(folder, keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(make(step, width=WIDTH), STATISTICS, 10 * step)
    return folder


def damages(folder):
    """Damages each file in each way, one at a time; yields (name, damage)."""
    for path in sorted(p for p in (folder / '2').rglob('*') if p.is_file()):
        content = path.read_bytes()
        assert content, f'{path} is empty'
        for damage, change in DAMAGES.items():
            put(path, change(content))
            try:
                yield path.relative_to(folder).as_posix(), damage
            finally:
                path.write_bytes(content)


def restore(folder):
    with Checkpoints(folder) as checkpoints:
        return checkpoints.restore(prepare(width=WIDTH)[0], abstract(STATISTICS))


def same(found, step):
    trees = (found, (make(step, width=WIDTH), STATISTICS, 10 * step))
    one, other = (jax.tree.leaves(tree) for tree in trees)
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_one_before_comes_back(pair):
    assert same(restore(pair), 2)
    cases = 0
    for name, damage in damages(pair):
        with Checkpoints(pair) as checkpoints:
            assert checkpoints.latest == 1, f'{name} {damage}'
        if cases % 7 == 0:  # of all files and ways
            assert same(restore(pair), 1), f'{name} {damage}'
        cases += 1
    assert cases >= 120
    assert same(restore(pair), 2)


def test_the_only_one_is_refused(pair, tmp_path):
    (pair / '1').rename(tmp_path / '1')
    try:
        for name, damage in damages(pair):
            with Checkpoints(pair) as checkpoints:
                with pytest.raises(UserError, match=rf'whole \({re.escape(name)}'):
                    print(checkpoints.latest, name, damage)
    finally:
        (tmp_path / '1').rename(pair / '1')


def test_what_is_added_or_exchanged(pair):
    extra = pair / '2/model/extra'
    extra.touch()
    with Checkpoints(pair) as checkpoints:
        assert checkpoints.latest == 1
    extra.unlink()
    # Whole in itself, but another step's.
    manifest = pair / '2/manifest.0-of-1.json'
    content = manifest.read_bytes()
    manifest.write_bytes((pair / '1/manifest.0-of-1.json').read_bytes())
    assert integrity.fault(pair / '2', 2) == 'manifest.0-of-1.json is of step 1'
    manifest.write_bytes(content)
    (pair / '2').rename(pair / '3')
    assert integrity.fault(pair / '3', 3) == 'manifest.0-of-1.json is of step 2'
    (pair / '3').rename(pair / '2')
    (pair / '2/manifest.0-of-2.json').write_bytes(content)
    assert 'of different saves' in integrity.fault(pair / '2', 2)
    (pair / '2/manifest.0-of-2.json').unlink()
    assert same(restore(pair), 2)


def test_without_manifests_damage_comes_back_as_if_sound(pair, monkeypatch):
    """What the checks above would miss: Orbax restores other weights, and another position."""
    monkeypatch.setattr(integrity, 'fault', lambda *_: None)
    path = pair / '2/data/metadata'
    content = path.read_bytes()
    path.write_bytes(content.replace(b'20', b'30'))
    assert restore(pair)[2] == 30
    path.write_bytes(content)
    path = max((pair / '2/train').rglob('*'), key=lambda p: p.stat().st_size)
    content, silent = path.read_bytes(), 0
    for i in range(1, 20):
        path.write_bytes(flip(content, i * len(content) // 20))
        try:
            silent += not same(restore(pair), 2)
        except ValueError:  # of TensorStore
            pass
    path.write_bytes(content)
    assert silent > 3


def test_processes_seal_at_the_same_time(tmp_path):
    folder = tmp_path / '3'
    folder.mkdir()
    for name in 'abcdef':
        (folder / name).write_text(name)
    # What process 1 sees while process 0 writes its manifest; by its name it would be its to hash.
    partial = folder / 'manifest.0-of-2.json.partial'
    partial.touch()
    integrity.seal(folder, 3, 1, 2)
    partial.unlink()
    assert integrity.fault(folder, 3) == 'manifest.0-of-2.json is missing'
    integrity.seal(folder, 3, 0, 2)
    assert integrity.fault(folder, 3) is None
