"""Checkpoints that cannot be written: told in one line, and the one before stays whole."""

import os
import resource
import shutil
import sys
import time

import jax
import numpy as np
import pytest

from cmd_jax.errors import UserError
from cmd_jax.training import integrity, loop
from cmd_jax.training.checkpoint import Checkpoints
from cmd_jax.training.metrics import Metrics
from tests import tiny
from tests.test_checkpoint import child, fill, make, names, prepare, restored


def step_on(checkpoints):
    """As training does after a save, but for half a minute."""
    for _ in range(3000):
        checkpoints.check()
        time.sleep(0.01)


def test_disk_full(tmp_path):
    """Files larger than a limit cannot be written: of Orbax, of TensorStore, the manifest."""
    done = child(fill_disk, tmp_path)
    assert 'Traceback' not in done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    for line, limit in zip(lines, ('20', '1000', '9000', 'manifest')):
        folder = tmp_path / limit
        assert line == (
            f'checkpoint {folder / "2"} cannot be saved (File too large); the newest whole '
            'checkpoint is of step 1: make room or mend the folder, and start again'
        )
        with Checkpoints(folder) as checkpoints:
            assert checkpoints.latest == 1
            state = checkpoints.restore(prepare(width=1000)[0], None)[0]
            jax.tree.map(np.testing.assert_array_equal, state, make(1, width=1000))
            checkpoints.save(make(2, width=1000), None, 20)
        assert '2' in names(folder) and '1' not in names(folder)


def fill_disk(folder):
    seal = integrity.seal

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def seal_on_full_disk(*args):
        limit(100)
        seal(*args)

    for size in ('20', '1000', '9000', 'manifest'):
        try:
            with Checkpoints(os.path.join(folder, size)) as checkpoints:
                checkpoints.save(make(1, width=1000), None, 10)
                checkpoints.wait()
                if size == 'manifest':
                    integrity.seal = seal_on_full_disk
                else:
                    limit(int(size))
                checkpoints.save(make(2, width=1000), None, 20)
                step_on(checkpoints)
        except UserError as e:
            limit(resource.RLIM_INFINITY)
            print(e)


def test_no_folder(tmp_path):
    (tmp_path / 'file').touch()
    for folder in (tmp_path / 'file', tmp_path / 'file/checkpoints'):
        with pytest.raises(UserError, match=f'{folder} cannot be read .Not a directory'):
            with Checkpoints(folder) as checkpoints:
                _ = checkpoints.latest
        with pytest.raises(UserError, match='Not a directory'):
            fill(folder, 1)


def test_the_folder_goes_away(tmp_path):
    with pytest.raises(UserError, match=r'2 cannot be saved \(the folder is gone\); no checkpoint'):
        with Checkpoints(tmp_path / 'run') as checkpoints:
            checkpoints.save(make(1), None, 10)
            checkpoints.wait()
            shutil.rmtree(tmp_path / 'run')
            checkpoints.save(make(2), None, 20)


def fail_to_seal(monkeypatch, error):
    def seal(*_):
        raise error

    monkeypatch.setattr(integrity, 'seal', seal)


def test_a_failure_is_told_once_and_at_the_next_chance(tmp_path, monkeypatch, log):
    fill(tmp_path, 1)
    fail_to_seal(monkeypatch, PermissionError(13, 'Permission denied'))
    told = r'2 cannot be saved \(Permission denied\); the newest whole checkpoint is of step 1'
    with pytest.raises(UserError, match=told):  # closing
        fill(tmp_path, 2)
    with pytest.raises(UserError, match=told):  # the next save
        fill(tmp_path, 2, 3)
    with pytest.raises(UserError, match=told):  # the next step
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(make(2), None, 20)
            step_on(checkpoints)
    assert 'cannot be saved' not in log.text
    with pytest.raises(ZeroDivisionError):  # which is the news
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(make(2), None, 20)
            _ = 1 / 0
    assert '2 cannot be saved (Permission denied)' in log.text
    monkeypatch.undo()
    assert restored(tmp_path) == (1, 10)


def test_a_failure_without_words_is_one(tmp_path, monkeypatch):
    """And so is one in a folder that can no longer be looked into."""
    fail_to_seal(monkeypatch, TimeoutError())
    with pytest.raises(UserError, match=r'1 cannot be saved \(TimeoutError\)'):
        fill(tmp_path, 1)


def test_a_defect_keeps_its_traceback(tmp_path, monkeypatch):
    fail_to_seal(monkeypatch, KeyError('defect'))
    with pytest.raises(KeyError, match='defect'):
        fill(tmp_path, 2)


def test_a_run_whose_folder_goes_away_says_so(tmp_path, monkeypatch):
    write = Metrics.write

    def write_and_delete(self, step, scalars):
        write(self, step, scalars)
        if step == 3:
            shutil.rmtree(tmp_path / 'run')

    monkeypatch.setattr(Metrics, 'write', write_and_delete)
    with pytest.raises(UserError, match='metrics.jsonl cannot be written .No such file'):
        loop.train(tiny.config('autoencoder'), tmp_path / 'run')


if __name__ == '__main__':
    globals()[sys.argv[1]](*sys.argv[2:])
