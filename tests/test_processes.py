"""Runs in several processes are runs in one: real processes on this machine train through train.py.

The expected curve is that of one process with eight devices. Processes meet through loopback and
share a folder, as those of a cluster do; each has devices of its own.
"""

import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from cmd_jax.data import latent_records
from cmd_jax.training import config as configs
from cmd_jax.training import latent_cache, loop
from tests import tiny
from tests.test_distributed import clean, environment, free_port

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 8
SOURCE = 'moving_digits:16'  # an epoch is two batches
HUNG = 900  # seconds after which processes are given up: no measure of speed, machines may be busy
# At a constant rate the curve does not depend on how long it is to become.
TRAIN = dict(schedule='constant', save_every=STEPS // 2, keep_checkpoints=3, preview_every=0)


def tree(stage: str = 'all', **changes) -> dict:
    tree = tiny.tree(stage, source=SOURCE)
    for part in configs.STAGES:
        tree[part]['model']['heads'] = 4  # that a tensor axis can split
        tree[part]['train'].update(steps=STEPS, **TRAIN)
    tree['motion']['statistics_clips'] = 16
    return tiny.changed(tree, **changes)


def flags(tree: dict, path: str = '--config') -> list[str]:
    """The flags that make a config of a shipped one."""
    found = []
    for name, value in tree.items():
        if isinstance(value, dict):
            found += flags(value, f'{path}.{name}')
        elif (path, name) != ('--config', 'stage'):
            found.append(f'{path}.{name}={value}')
    return found


class Processes:
    """Processes of one run, whose output goes to files. A context manager: what is left ends."""

    def __init__(self, command: list[str], folder, count: int, devices: int, last=(), **env):
        """`last`: arguments of the last process alone."""
        port, self.folder, self.all = free_port(), folder, []
        folder.mkdir(parents=True)
        for i in range(count):
            place = [f'--process_count={count}', f'--process_id={i}', '--distributed=on']
            place += [f'--coordinator_address=localhost:{port}']
            if count == 1:
                place = ['--distributed=off']
            elif i == count - 1:
                place += last
            more = dict(JAX_NUM_CPU_DEVICES=str(devices), WATCHED=str(folder / f'{i}.read'))
            # Another process may be writing an entry of the cache of compiled programs.
            more |= dict(PYTHONWARNINGS='ignore::UserWarning:jax._src.compiler')
            with (folder / f'{i}.err').open('w') as err:
                self.all.append(
                    subprocess.Popen(
                        [sys.executable, *command, *place],
                        # Where Gloo talks.
                        stdout=subprocess.DEVNULL,
                        stderr=err,
                        cwd=ROOT,
                        env=environment(**more, **env),
                    )
                )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for one in self.all:
            one.kill()
            one.wait()

    def end(self) -> tuple[list[int], list[str]]:
        """Exit codes, and what was said on stderr."""
        stop = time.monotonic() + HUNG
        codes = [one.wait(max(0.1, stop - time.monotonic())) for one in self.all]
        return codes, [clean((self.folder / f'{i}.err').read_text()) for i in range(len(codes))]

    def read(self, stage: str) -> list[list[list]]:
        """(index, place) of the samples that each process was given, batch by batch."""
        found = []
        for i in range(len(self.all)):
            lines = map(json.loads, (self.folder / f'{i}.read').read_text().splitlines())
            mine = [line[2:] for line in lines if line[:2] == [stage, 0]]
            found.append([list(zip(*batch, strict=True)) for batch in mine])
        return found


def training(tree: dict, workdir, folder, count: int, devices: int, *more, **options):
    """Processes that train."""
    name = 'text_to_video' if tree['condition'] == 'text' else 'quickstart'
    command = ['-m', 'tests.watched', 'train.py', f'--workdir={workdir}']
    command += [f'--config=configs/{name}.py:{tree["stage"]},tiny', *flags(tree), *more]
    return Processes(command, folder, count, devices, **options)


def train(*args, **kwargs) -> Processes:
    """The same, at their end."""
    with training(*args, **kwargs) as started:
        codes, errs = started.end()
    assert not any(codes), '\n'.join(err[-3000:] for err in errs)
    # Process 0 tells of the run, the others of nothing.
    assert not any(errs[1:]), errs[1:]
    return started


def curve(workdir, stage: str) -> list[float]:
    """The losses of the steps 1, 2, ..."""
    lines = (workdir / stage / 'metrics.jsonl').read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record['step'] for record in records] == list(range(1, len(records) + 1))
    return [record['loss'] for record in records]


def same(found: list[float], expected: list[float]):
    np.testing.assert_allclose(found, expected[: len(found)], rtol=1e-5)
    assert len(set(found)) == len(found)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """One process, eight devices."""
    workdir = tmp_path_factory.mktemp('whole')
    loop.train(configs.parse(tree()), workdir)
    return workdir


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    """Two processes with four devices each: (run, processes)."""
    folder = tmp_path_factory.mktemp('two')
    return folder / 'run', train(tree(), folder / 'run', folder / 'logs', 2, 4)


def test_two_processes_are_one(whole, two):
    run, _ = two
    for stage in configs.STAGES:
        found, expected = curve(run, stage), curve(whole, stage)
        assert len(found) == STEPS
        same(found, expected)
        names = [sorted(p.name for p in (w / stage / 'previews').iterdir()) for w in (run, whole)]
        assert names[0] == names[1]


def test_every_sample_is_used_once(two):
    """By all processes together, in each epoch."""
    for stage in configs.STAGES:
        shares = two[1].read(stage)
        assert [len(share) for share in shares] == [STEPS] * 2
        steps = [sum(batch, []) for batch in zip(*shares, strict=True)]
        assert all(sorted(place for _, place in step) == list(range(8)) for step in steps)
        used = [index for step in steps for index, _ in step]
        epochs = [used[i : i + 16] for i in range(0, 8 * STEPS, 16)]
        assert [sorted(epoch) for epoch in epochs] == [list(range(16))] * (STEPS // 2)
        assert len(set(map(tuple, epochs))) == STEPS // 2


@pytest.mark.parametrize(
    'stage, count, devices, mesh',
    [
        ('motion', 1, 4, {}),
        ('content', 4, 2, {}),
        # The tensor axis joins the two.
        ('autoencoder', 2, 2, dict(mesh__fsdp=1, mesh__tensor=4)),
    ],
)
def test_other_processes_go_on(whole, two, stage, count, devices, mesh, tmp_path):
    run = tmp_path / 'run'
    shutil.copytree(two[0], run)
    shutil.rmtree(run / stage / 'checkpoints' / str(STEPS))
    done = train(tree(stage, **mesh), run, tmp_path / 'logs', count, devices)
    same(curve(run, stage), curve(whole, stage))
    shares, before = done.read(stage), two[1].read(stage)
    if mesh:
        # Both read all.
        assert shares[0] == shares[1]
        shares = shares[:1]
    for step, expected in zip(zip(*shares), list(zip(*before))[STEPS // 2 :], strict=True):
        assert sorted(sum(step, [])) == sorted(sum(expected, []))


def wait_for(workdir, stage: str, steps: int, started: Processes):
    """Waits until so many steps are told of."""
    path = workdir / stage / 'metrics.jsonl'
    stop = time.monotonic() + HUNG
    while time.monotonic() < stop:
        if path.exists() and len(path.read_text().splitlines()) >= steps:
            return
        assert all(one.poll() is None for one in started.all), started.end()
        time.sleep(0.05)
    raise AssertionError('no steps')


def saved(workdir, stage: str) -> int:
    folder = workdir / stage / 'checkpoints'
    return max(int(p.name) for p in folder.iterdir() if p.name.isdecimal())


def test_who_is_asked_to_go_takes_all_along(whole, tmp_path):
    """SIGTERM to the one, Ctrl-C to the other; then the rest of the way."""
    run, steps = tmp_path / 'run', 0
    long = tree('content', content__train__steps=2000, content__train__save_every=2000)
    shutil.copytree(whole / 'autoencoder', run / 'autoencoder')
    for who, number, code, reason in (
        (1, signal.SIGTERM, 75, 'SIGTERM'),
        (0, signal.SIGINT, 130, 'Ctrl-C'),
    ):
        with training(long, run, tmp_path / reason, 2, 2) as started:
            wait_for(run, 'content', steps + 2, started)
            started.all[who].send_signal(number)
            codes, errs = started.end()
        assert codes == [code] * 2, errs
        assert saved(run, 'content') == len(curve(run, 'content')) > steps + 1
        steps = saved(run, 'content')
        for i, err in enumerate(errs):
            where = reason if i == who else f'{reason} in process {who}'
            assert f'interrupted: {where}: content saved at step {steps}' in err
    long['content']['train']['steps'] = steps + 2
    train(long, run, tmp_path / 'last', 2, 2, '--force_config')
    found, expected = curve(run, 'content'), curve(whole, 'content')
    assert len(found) == steps + 2
    same(found[:STEPS], expected[: len(found)])


@pytest.mark.parametrize('late', [False, True])
def test_an_error_of_one_ends_all(late, tmp_path):
    """Process 1 cannot read its data: from the beginning, or after two steps."""
    long = tree('autoencoder', autoencoder__train__steps=2000)
    options = dict(last=['--config.data.source=folder:/nowhere'])
    if late:
        options = dict(WATCHED_FAIL='1:2')
    with training(long, tmp_path / 'run', tmp_path / 'logs', 2, 2, **options) as started:
        first, second = started.all
        assert second.wait(HUNG) == 2
        begun = time.monotonic()
        assert first.wait(30) == 2 and time.monotonic() - begun < 10
        _, errs = started.end()
    said = 'the disk is gone' if late else '/nowhere'
    assert errs[1].startswith('[process 1] error: ') and said in errs[1], errs[1]
    assert len(errs[1].splitlines()) == 1
    line = errs[0].splitlines()[-1]
    assert line.startswith('error: process 1 has ended (') and said in line, errs[0][-2000:]
    assert (tmp_path / 'run' / 'autoencoder' / 'metrics.jsonl').exists() == late


def test_text(small_pipeline, tmp_path):
    """VAE, U-Net and tables of captions."""
    steps = {f'{stage}__train__steps': 2 for stage in configs.STAGES}
    one, run = tmp_path / 'one', tmp_path / 'run'
    given = tiny.text_tree(small_pipeline, data__source=SOURCE, **steps)
    # With one device: with eight, the U-Net's many arrays are eight times as many to be saved.
    train(given, one, tmp_path / 'one_logs', 1, 1)
    shutil.copytree(one / 'autoencoder', run / 'autoencoder')
    train(given, run, tmp_path / 'logs', 2, 2)
    for stage in ('content', 'motion'):
        found = curve(run, stage)
        assert len(found) == 2
        same(found, curve(one, stage))


def test_a_cache_of_latents(whole, tmp_path):
    """Made in two processes, and trained from."""
    one, two = tmp_path / 'one', tmp_path / 'two'
    options = dict(batch_size=8, shard_clips=6, limit=16)
    latent_cache.write(whole, one, {}, **options)
    command = ['-m', 'cmd_jax.data.latents', f'--workdir={whole}', f'--out={two}']
    command += [f'--{name}={value}' for name, value in options.items()]
    with Processes(command, tmp_path / 'made', 2, 2) as started:
        codes, errs = started.end()
    assert codes == [0, 0], errs
    assert errs[1] == '' and 'latents of train' in errs[0]
    assert sorted(p.name for p in two.iterdir()) == sorted(p.name for p in one.iterdir())
    for split in ('train', 'test'):
        found, expected = (latent_records.Latents(str(p), split) for p in (two, one))
        assert len(found) == len(expected) == 16
        assert found.header == expected.header
        for i in range(16):
            a, b = found[i], expected[i]
            for name in ('content', 'motion'):
                np.testing.assert_allclose(a[name], b[name], atol=2e-6)
            assert all(a[name] == b[name] for name in ('label', 'caption', 'index'))
    run = tmp_path / 'run'
    shutil.copytree(whole / 'autoencoder', run / 'autoencoder')
    cached = tree('motion', data__source=f'latents:{two}', motion__train__steps=3)
    train(cached, run, tmp_path / 'logs', 2, 2)
    found = curve(run, 'motion')
    assert len(found) == 3
    same(found, curve(whole, 'motion'))
