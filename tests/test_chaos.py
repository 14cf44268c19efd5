"""A run that is killed ends as one that never was; `python -m tests.chaos` does it at length."""

import json
import shutil
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from cmd_jax.training import integrity
from tests.chaos import run
from tests.test_resume import state

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='looks into /proc')
STEPS = 10


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp('chaos')


@pytest.fixture(scope='module')
def verdict(workdir):
    with pytest.MonkeyPatch.context() as patch:
        # Entries that the killed leave half written are not for others.
        patch.setenv('JAX_COMPILATION_CACHE_DIR', str(workdir / 'compiled'))
        return run.campaign(
            workdir, ['seal', 'preview', 'restore', 'delete', 'any', 'SIGTERM'], STEPS, seed=0
        )


def test_killed_runs_end_as_if_they_had_not_been(verdict):
    assert verdict.failures == []
    assert sum(verdict.tally.values()) >= 5


def test_sigterm_saves_and_ends_in_time(verdict):
    assert verdict.sigterm == []


def test_differences_are_found(verdict, workdir, tmp_path):
    whole, other = workdir / 'reference' / run.STAGE, tmp_path / 'other'
    shutil.copytree(whole, other)
    assert run.compare(whole, other, STEPS) == []
    (name, *_) = run.names(other / 'previews')
    for damage, found in (
        (lambda: change(other / 'metrics.jsonl', '"step": 3', '"step": 4'), 'metrics.jsonl'),
        (lambda: change(other / 'inputs.json', 'null', '7'), 'inputs.json'),
        (lambda: move_on(other / f'checkpoints/{STEPS}/data/metadata'), 'position in the data'),
        (lambda: change_array(other), "[0]['params']"),
        (lambda: (other / 'previews' / name).write_bytes(b'cut'), f'previews/{name}'),
        (lambda: (other / 'previews/x.partial').touch(), 'previews/x.partial is left over'),
    ):
        damage()
        failures = run.compare(whole, other, STEPS)
        assert any(failure.startswith(found) for failure in failures), (found, failures)
    (other / 'previews' / name).unlink()
    assert f'previews/{name} is missing' in run.compare(whole, other, STEPS)
    (other / 'metrics.tmp').touch()
    assert 'metrics.tmp' in run.compare(whole, other, STEPS)[0]
    (other / 'metrics.tmp').unlink()
    change(other / f'checkpoints/{STEPS}/data/metadata', '}', ' }')
    assert run.compare(whole, other, STEPS)[0].startswith('data/metadata has')


def change(path, old, new):
    content = path.read_text()
    assert old in content
    path.write_text(content.replace(old, new, 1))


def move_on(path):
    position = json.loads(path.read_text())['position']
    path.write_text(json.dumps({'position': position + 1}))
    integrity.seal(path.parents[1], STEPS)


def change_array(folder):
    """By one bit of one number."""
    train = state(folder, STEPS)[0][0]
    leaves, structure = jax.tree.flatten(train['params'])
    leaves[0] = np.array(leaves[0])
    leaves[0].view(np.uint32).flat[0] ^= 1
    path = folder / f'checkpoints/{STEPS}/train'
    shutil.rmtree(path)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, train | {'params': jax.tree.unflatten(structure, leaves)})
    integrity.seal(path.parent, STEPS)
