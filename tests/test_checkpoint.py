"""Checkpoints that come back on other devices, that are cut short, and that are read meanwhile."""

import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import SingleDeviceSharding

from cmd_jax.errors import UserError
from cmd_jax.parallel.mesh import make_mesh
from cmd_jax.training import integrity
from cmd_jax.training import state as states
from cmd_jax.training.checkpoint import Checkpoints

STATISTICS = {'mean': np.arange(3, dtype=np.float32), 'std': np.full(3, 2.0, np.float32)}


@functools.cache
def prepare(devices=None, mesh=(1, -1, 1), width=16):
    return states.prepare(
        lambda rngs: nnx.Linear(8, width, rngs=rngs),
        optax.adam(0.1),
        make_mesh(*mesh, devices=devices or jax.devices()[:1]),
    )[1:]


def make(step, **how):
    """A state that is another one at each step."""
    init = prepare(**how)[1]
    state = init(jax.random.key(step), {})
    return state.replace(step=state.step + step)


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def fill(folder, *steps, **options):
    with Checkpoints(folder, **options) as checkpoints:
        for step in steps:
            checkpoints.save(make(step), None, 10 * step)


def restored(folder):
    """(step, position) of what comes back, which is compared with what was saved."""
    with Checkpoints(folder) as checkpoints:
        state, _, position = checkpoints.restore(prepare()[0], None)
        assert checkpoints.latest == int(state.step)
    jax.tree.map(np.testing.assert_array_equal, state, make(int(state.step)))
    return int(state.step), position


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def child(task, *args, check=True):
    """Runs a function of a test file in a process of its own."""
    module = f'tests.{task.__module__.split(".")[-1]}'
    command = [sys.executable, '-m', module, task.__name__, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert not check or done.returncode == 0, done.stderr[-2000:]
    return done


# --- What comes back ----------------------------------------------------------------------------


@pytest.mark.parametrize('statistics, position', [(None, 7), (STATISTICS, None)])
def test_what_is_saved_comes_back(tmp_path, statistics, position):
    state = make(3)
    with Checkpoints(tmp_path / 'run/checkpoints') as checkpoints:
        assert checkpoints.latest is None
        assert not (tmp_path / 'run').exists(), 'looking leaves no trace'
        checkpoints.save(state, statistics, position)
        expected = abstract(statistics) if statistics else None
        found, found_statistics, place = checkpoints.restore(prepare()[0], expected)
        assert (checkpoints.latest, place) == (3, position)
        model = {'ema': prepare()[0].ema} | ({'statistics': expected} if expected else {})
        model = checkpoints.restore_model(model)
    jax.tree.map(np.testing.assert_array_equal, found, state)
    jax.tree.map(np.testing.assert_array_equal, found_statistics, statistics)
    jax.tree.map(np.testing.assert_array_equal, model['ema'], state.ema)


def test_which_are_kept(tmp_path):
    fill(tmp_path / 'one', 1, 2, 3)
    assert names(tmp_path / 'one') == ['3']
    fill(tmp_path / 'two', *range(1, 8), keep=2, keep_every=3)
    assert names(tmp_path / 'two') == ['3', '6', '7']
    with pytest.raises(UserError, match='keep_checkpoints=0'):
        Checkpoints(tmp_path, keep=0)


def test_on_other_devices(tmp_path):
    spread = {'devices': tuple(jax.devices()[:8]), 'mesh': (2, 2, 2)}
    state = make(1, **spread)
    assert len(state.params['kernel'].sharding.device_set) == 8
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, None, 1)
        one = checkpoints.restore(prepare()[0], None)[0]
        again = checkpoints.restore(prepare(**spread)[0], None)[0]
        device = SingleDeviceSharding(jax.devices()[3])
        plain = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), abstract(state.ema)
        )
        model = checkpoints.restore_model({'ema': plain})['ema']
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(one)} == {1}
    jax.tree.map(np.testing.assert_array_equal, one, state)
    jax.tree.map(np.testing.assert_array_equal, again, state)
    assert jax.tree.map(lambda x: x.sharding, again) == jax.tree.map(lambda x: x.sharding, state)
    jax.tree.map(np.testing.assert_array_equal, model, state.ema)


def test_another_shape(tmp_path):
    fill(tmp_path, 1)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(
            UserError, match=r'1 does not fit .* opt_state/0/mu/bias: \(1, 16\) -> \(1, 24\)'
        ):
            checkpoints.restore(prepare(width=24)[0], None)
        with pytest.raises(UserError, match=r'ema/bias: \(1, 16\) -> \(1, 24\)'):
            checkpoints.restore_model({'ema': prepare(width=24)[0].ema})


def test_of_two_processes(tmp_path):
    """Each writes and checks its share; both come to the same step; one process reads it all."""
    with socket.socket() as s:
        s.bind(('localhost', 0))
        address = f'localhost:{s.getsockname()[1]}'
    command = [sys.executable, '-m', 'tests.test_checkpoint', 'one_of_two', str(tmp_path), address]
    workers = [
        subprocess.Popen([*command, str(i)], stderr=subprocess.PIPE, text=True) for i in range(2)
    ]
    try:
        errors = [worker.communicate(timeout=120)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], '\n'.join(errors)[-3000:]
    manifests = sorted(p.name for p in (tmp_path / '3').glob('manifest*'))
    assert manifests == ['manifest.0-of-2.json', 'manifest.1-of-2.json']
    shares = [integrity._parse(tmp_path / '3' / name)['files'] for name in manifests]
    assert all(shares) and not shares[0].keys() & shares[1].keys()
    assert names(tmp_path) == ['1', '2.broken', '3']
    assert restored(tmp_path) == (3, 30)
    (tmp_path / '3.unsealed').touch()
    assert restored(tmp_path) == (3, 30), 'the mark alone says nothing'
    (tmp_path / '3' / manifests[1]).unlink()
    assert integrity.interrupted(tmp_path / '3')
    assert restored(tmp_path) == (1, 10)


def one_of_two(folder, address, process):
    jax.config.update('jax_num_cpu_devices', 1)
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    jax.distributed.initialize(address, 2, int(process))
    spread = {'devices': tuple(jax.devices())}
    assert len(spread['devices']) == 2

    def check(checkpoints, step):
        assert checkpoints.latest == step
        state, _, position = checkpoints.restore(prepare(**spread)[0], None)
        assert position == 10 * step
        pairs = zip(jax.tree.leaves(state), jax.tree.leaves(make(step, **spread)), strict=True)
        for one, other in pairs:
            np.testing.assert_array_equal(one.addressable_data(0), other.addressable_data(0))

    with Checkpoints(folder, keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(make(step, **spread), None, 10 * step)
        check(checkpoints, 2)
    jax.experimental.multihost_utils.sync_global_devices('saved')
    if process == '0':  # a file of either's share: only one of them sees it
        damage(os.path.join(folder, '2/data/metadata'))
    jax.experimental.multihost_utils.sync_global_devices('damaged')
    with Checkpoints(folder, keep=2) as checkpoints:
        check(checkpoints, 1)
        checkpoints.save(make(3, **spread), None, 30)


def damage(path, at=-1):
    with open(path, 'rb') as f:
        content = bytearray(f.read())
    content[at] ^= 1
    with open(path, 'wb') as f:
        f.write(content)


# --- What is cut short --------------------------------------------------------------------------


def test_a_broken_one_is_passed_over_and_put_aside(tmp_path, log):
    fill(tmp_path, 1, 2, 3, keep=3)
    (tmp_path / '3' / 'manifest.0-of-1.json').unlink()
    damage(tmp_path / '2/model/_METADATA')
    (tmp_path / '3.broken').mkdir()
    before = names(tmp_path)
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        assert checkpoints.latest == 1
        assert f'{tmp_path / "3"} is passed over: manifest.0-of-1.json is missing' in log.text
        assert f'{tmp_path / "2"} is passed over: model/_METADATA has another content' in log.text
        checkpoints.restore(prepare()[0], None)
        assert names(tmp_path) == before, 'reading moves nothing'
        checkpoints.save(make(2), None, 20)
    assert '3 was passed over' not in log.text and '3.broken-1' in log.text
    assert names(tmp_path) == ['1', '2', '2.broken', '3.broken', '3.broken-1']
    assert restored(tmp_path) == (2, 20)


def test_none_whole_is_not_none_at_all(tmp_path):
    fill(tmp_path, 1, 2, keep=2)
    (tmp_path / '2/data/metadata').unlink()
    (tmp_path / '1/extra').touch()
    found = r'none of 2 checkpoints is whole \(2/data/metadata is missing; 1/extra is no part'
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UserError, match=found):
            _ = checkpoints.latest
        with pytest.raises(UserError, match=found):
            checkpoints.save(make(3), None, 30)
    assert names(tmp_path) == ['1', '2']


def test_what_sampling_does_not_read_is_not_hashed(tmp_path):
    fill(tmp_path, 1, 2, keep=2)
    damage(tmp_path / '2/train/_METADATA')
    assert restored(tmp_path) == (1, 10)
    with Checkpoints(tmp_path, model_only=True) as checkpoints:
        assert checkpoints.latest == 2
        found = checkpoints.restore_model({'ema': prepare()[0].ema})['ema']
        with pytest.raises(ValueError):
            checkpoints.restore(prepare()[0], None)
        with pytest.raises(ValueError):
            checkpoints.save(make(3), None, 30)
    jax.tree.map(np.testing.assert_array_equal, found, make(2).ema)
    for path in ('2/model/_METADATA', '2/_CHECKPOINT_METADATA'):
        damage(tmp_path / path)
        with Checkpoints(tmp_path, model_only=True) as checkpoints:
            assert checkpoints.latest == 1
        damage(tmp_path / path)
    (tmp_path / '2/train/_METADATA').write_bytes(b'')
    with Checkpoints(tmp_path, model_only=True) as checkpoints:
        assert checkpoints.latest == 1


def test_the_old_one_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    go, threads, seal = threading.Event(), [], integrity.seal

    def wait(*args):
        threads.append(threading.current_thread())
        assert go.wait(30)
        seal(*args)

    fill(tmp_path, 1)
    monkeypatch.setattr(integrity, 'seal', wait)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make(2), None, 20)
        while not (tmp_path / '2').exists():
            time.sleep(0.01)
        with Checkpoints(tmp_path) as reader:
            assert reader.latest == 1
        assert '2.unsealed' in names(tmp_path)
        checkpoints.check()
        go.set()
    assert threading.main_thread() not in threads and len(threads) == 1
    assert names(tmp_path) == ['2']


def test_training_goes_on_while_it_is_read(tmp_path, monkeypatch):
    fill(tmp_path, 1)
    fault, saved = integrity.fault, []

    def late(folder, step, *args):
        if not saved:  # by now it is replaced
            saved.append(2)
            fill(tmp_path, 2)
        return fault(folder, step, *args)

    monkeypatch.setattr(integrity, 'fault', late)
    with Checkpoints(tmp_path) as reader:
        assert reader.latest == 2


def test_deleted_while_it_is_read(tmp_path, monkeypatch):
    fill(tmp_path, 1)
    original = Checkpoints._check

    def late(*args):
        shutil.rmtree(tmp_path / '1/model')
        original(*args)

    monkeypatch.setattr(Checkpoints, '_check', late)
    with Checkpoints(tmp_path) as reader:
        with pytest.raises(UserError, match=r'1 has changed while it was read \(model/.* missing'):
            reader.restore_model({'ema': prepare()[0].ema})


@pytest.mark.parametrize('before', [None, 1], ids=['first save', 'second save'])
@pytest.mark.parametrize('when', ['in the middle', 'before the manifest', 'after the manifest'])
def test_killed(tmp_path, when, before, log):
    done = child(die, tmp_path, when, before or 0, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    left = names(tmp_path)
    assert '2.unsealed' in left
    assert ('2' in left) == (when != 'in the middle')
    assert when != 'in the middle' or any(name.startswith('2.orbax') for name in left)
    expected = 2 if when == 'after the manifest' else before
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest == expected
        assert ('2 is passed over: its saving was interrupted' in log.text) == (
            when == 'before the manifest'
        )
        if expected:
            state, _, position = checkpoints.restore(prepare(width=400_000)[0], None)
            assert position == 10 * expected
            jax.tree.map(np.testing.assert_array_equal, state, make(expected, width=400_000))
        assert names(tmp_path) == left, 'reading changes nothing'
        checkpoints.save(make(3, width=400_000), None, 30)
    assert names(tmp_path) == ['3']


def die(folder, when, before):
    with Checkpoints(folder) as checkpoints:
        if before != '0':
            checkpoints.save(make(int(before), width=400_000), None, 10 * int(before))
            checkpoints.wait()

        def kill(*_):
            os.kill(os.getpid(), signal.SIGKILL)

        def watch():
            while not any(name.startswith('2.orbax') for name in os.listdir(folder)):
                pass
            kill()

        if when == 'in the middle':
            os.makedirs(folder, exist_ok=True)
            threading.Thread(target=watch, daemon=True).start()
        elif when == 'before the manifest':
            integrity.seal = kill
        else:
            integrity.end = kill
        checkpoints.save(make(2, width=400_000), None, 20)


def test_what_is_interrupted_is_not_damaged(tmp_path):
    """A mark is not needed for what is whole; without one, what is not whole is damaged."""
    fill(tmp_path, 1, 2, keep=2)
    (tmp_path / '1.unsealed').touch()
    (tmp_path / '2.unsealed').touch()
    assert restored(tmp_path) == (2, 20)
    (tmp_path / '2/manifest.0-of-1.json').unlink()
    assert restored(tmp_path) == (1, 10)
    damage(tmp_path / '1/model/_METADATA')
    with pytest.raises(UserError, match=r'none of 2 checkpoints is whole \(1/model/_METADATA has'):
        restored(tmp_path)
    (tmp_path / '1/manifest.0-of-1.json').unlink()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest is None
        with pytest.raises(UserError, match='holds no checkpoint: train first'):
            checkpoints.restore(prepare()[0], None)
    (tmp_path / '2.unsealed').unlink()
    with pytest.raises(UserError, match=r'\(2/manifest.0-of-1.json is missing\)'):
        restored(tmp_path)


if __name__ == '__main__':
    globals()[sys.argv[1]](*sys.argv[2:])
