"""Six steps equal three steps, a new process and three more steps, bit for bit."""

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from cmd_jax.training.config import STAGES

COST = {'seconds', 'memory_gb', 'videos_per_second', 'model_tflops_per_second'}


def train(workdir, stage, stop=0):
    command = [sys.executable, '-m', 'tests.stop_and_go', str(workdir), stage, str(stop)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def state(folder, step):
    """Everything a checkpoint holds, and the position in the data."""
    path = folder / 'checkpoints' / str(step)
    trees = [ocp.StandardCheckpointer().restore(path / item) for item in ('train', 'model')]
    return trees, json.loads((path / 'data/metadata').read_text())


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('whole')
    train(workdir, 'all')
    return workdir


def test_what_a_kill_left_behind_the_last_save_is_mended(whole, tmp_path):
    shutil.copytree(whole / 'autoencoder', tmp_path / 'autoencoder')
    folder = tmp_path / 'autoencoder' / 'previews'
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    # Of one that was killed behind the last file of its last save.
    checkpoints = tmp_path / 'autoencoder' / 'checkpoints'
    (checkpoints / '6.unsealed').touch()
    for step in (2, 3, 4):
        (checkpoints / str(step) / 'train').mkdir(parents=True)
    # Of a process that was killed while it wrote the one and had not begun with the other.
    (folder / '0000006.png').unlink()
    (folder / '0000006.mp4').rename(folder / '0000006.mp4.0123cdef.tmp')
    train(tmp_path, 'autoencoder')
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    # The newest two, whatever they are.
    assert sorted(path.name for path in checkpoints.iterdir()) == ['4', '6']


@pytest.mark.parametrize('stage', STAGES)
def test_resume_is_exact(whole, stage, tmp_path):
    if stage != 'autoencoder':
        shutil.copytree(whole / 'autoencoder', tmp_path / 'autoencoder')
    assert f'{stage} saved at step 3' in train(tmp_path, stage, stop=3)
    # Of a process that was killed between two saves.
    (tmp_path / stage / 'previews').mkdir(exist_ok=True)
    left = tmp_path / stage / 'previews' / '0000004.png.0123cdef.tmp'
    left.touch()
    assert [p.name for p in (tmp_path / stage / 'checkpoints').glob('[0-9]*')] == ['3']
    train(tmp_path, stage)
    assert not left.exists()

    expected, data = state(whole / stage, 6)
    found, found_data = state(tmp_path / stage, 6)
    assert jax.tree.structure(expected) == jax.tree.structure(found)
    jax.tree.map(np.testing.assert_array_equal, expected, found)
    assert found_data == data
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), found[0]['params'], found[1]['ema'])
    assert any(jax.tree.leaves(moved)), 'the average lags behind the parameters'

    lines, found_lines = (
        [json.loads(line) for line in (w / stage / 'metrics.jsonl').read_text().splitlines()]
        for w in (whole, tmp_path)
    )
    assert [line['step'] for line in found_lines] == [1, 2, 3, 4, 5, 6]
    for one, other in zip(lines, found_lines, strict=True):
        assert {k: one[k] for k in one.keys() - COST} == {k: other[k] for k in other.keys() - COST}
    seconds = [line['seconds'] for line in found_lines]
    assert seconds == sorted(seconds), 'time goes on over the interruption'
