"""A run that diverges: its end, its dump, and the step run again from it."""

import json
import math
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cmd_jax.errors import UserError
from cmd_jax.models.rngs import make_rngs
from cmd_jax.parallel.mesh import make_mesh
from cmd_jax.training import config as configs
from cmd_jax.training import divergence, loop, metrics, parts
from cmd_jax.training.stacks import Stacks
from tests import tiny
from tests.test_generate import one_error, script


@pytest.fixture(scope='module')
def autoencoder(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('autoencoder')
    loop.train(tiny.config('autoencoder'), workdir)
    return workdir / 'autoencoder'


def config(stage, **train):
    tree = tiny.tree(stage)
    tree[stage]['train'].update(train)
    if 'device_batch' in train:
        tree['mesh'].update(fsdp=4, tensor=2)  # a batch of 8 leaves two to each
    return configs.parse(tree)


def diverge(config, workdir):
    """Trains until the run stops; gives the message."""
    with pytest.raises(UserError) as error:
        loop.train(config, workdir)
    line = str(error.value)
    assert '\n' not in line
    return line


def command(where):
    """What `python -m cmd_jax.training.divergence` prints on as many devices as there are here."""
    done = subprocess.run(
        [sys.executable, '-m', 'cmd_jax.training.divergence', f'--dump={where}'],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {'JAX_NUM_CPU_DEVICES': str(jax.device_count())},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def table(printed):
    """{first column: the others} of what the command prints."""
    rows = [line.split() for line in printed.splitlines()]
    return {row[0]: row[1:] for row in rows}


def assert_told(printed, report):
    """Every number of the report stands in the print, twice: now, and when the run ended."""
    rows = table(printed)
    for layer, norms in report['layers'].items():
        told = [str(norms[kind]) for kind in ('parameters', 'gradient')]
        assert rows[layer] == 2 * told, layer
    for name, value in report['metrics'].items():
        assert rows[name] == 2 * [str(value)], name
    assert ': the same as on 8 x cpu in the run' in printed.splitlines()[-1]


@pytest.mark.parametrize('stage, parts', [('content', {}), ('motion', dict(device_batch=1))])
def test_run_that_diverges(stage, parts, autoencoder, tmp_path):
    shutil.copytree(autoencoder, tmp_path / 'autoencoder')
    train = dict(learning_rate=1e30, max_nonfinite=3, clip_norm=0.0) | parts
    line = diverge(config(stage, **train), tmp_path)
    records = metrics.read(tmp_path / stage / 'metrics.jsonl')
    assert [r['skipped'] for r in records][-2:] == [1, 2]
    step = records[-1]['step'] + 1
    where = tmp_path / stage / 'diverged' / str(step)
    assert [p.name for p in (tmp_path / stage / 'diverged').iterdir()] == [str(step)]
    for word in (f'up to step {step} ', f'--dump={where} ', 'learning_rate=1e+30'):
        assert word in line
    report = json.loads((where / 'report.json').read_text())
    assert report['metrics']['loss'] in ('nan', 'inf')
    assert f'loss {report["metrics"]["loss"]}, ' in line
    bad = [name for name, x in report['layers'].items() if isinstance(x['gradient'], str)]
    assert sum(name in line for name in bad) >= divergence.SHOWN
    assert any(f'blocks/{tiny.tree()[stage]["model"]["depth"] - 1}/' in name for name in bad)
    assert not (tmp_path / stage / 'checkpoints' / str(step)).exists()
    assert_told(command(where), report)


def test_script_ends_with_one_line_and_code_2(tmp_path):
    """The autoencoder, over the command line; its dump on another number of devices."""
    model = dict(patch=4, dim=16, depth=1, heads=2)
    flags = ['--config=configs/quickstart.py:autoencoder,tiny', f'--workdir={tmp_path}']
    flags += [f'--config.autoencoder.model.{k}={v}' for k, v in model.items()]
    flags += [f'--config.data.{k}={v}' for k, v in dict(frames=4, height=16, width=16).items()]
    train = dict(learning_rate=1e30, max_nonfinite=2, device_batch=4, warmup_steps=0, log_every=1)
    flags += [f'--config.autoencoder.train.{k}={v}' for k, v in train.items()]
    result = script('train.py', *flags)
    (where,) = (tmp_path / 'autoencoder' / 'diverged').iterdir()
    words = 'autoencoder diverged: 2 updates', '(loss ', f'--dump={where} '
    one_error(result, *words)
    report = json.loads((where / 'report.json').read_text())
    rows = table(command(where))
    for layer, norms in report['layers'].items():
        assert isinstance(norms['gradient'], str) == (rows[layer][1] in ('nan', 'inf')), layer
        assert rows[layer][2:] == [str(norms[kind]) for kind in ('parameters', 'gradient')]
        assert float(rows[layer][0]) == pytest.approx(norms['parameters'], rel=1e-3)


class Faulty:
    """In the place of the compiled step: some steps (from 1) see statistics that are not finite.

    Attributes:
      params: of the state before each call.
      clean: metrics of each step as they would have been.
    """

    def __init__(self, compiled, faulty):
        self.compiled, self.faulty = compiled, faulty
        self.params, self.clean = {}, {}

    def __call__(self, state, networks, batch, key):
        with jax.transfer_guard('allow'):
            step = int(state.step) + 1
            self.params[step] = jax.device_get(state.params)
            copy = jax.tree.map(jnp.copy, state)
            self.clean[step] = jax.device_get(self.compiled(copy, networks, batch, key)[1])
            if step in self.faulty:
                statistics = jax.tree.map(lambda x: x * jnp.nan, networks['statistics'])
                networks = networks | {'statistics': statistics}
            return self.compiled(state, networks, batch, key)


@pytest.fixture
def faults(monkeypatch):
    """faults(*steps) -> list that the Faulty of the next run is put into."""

    def install(*steps):
        made, original = [], loop.compile_step

        def compile_step(*args):
            made.append(Faulty(original(*args), steps))
            return made[-1]

        monkeypatch.setattr(loop, 'compile_step', compile_step)
        return made

    return install


def test_run_that_recovers_goes_on(autoencoder, tmp_path, faults):
    shutil.copytree(autoencoder, tmp_path / 'autoencoder')
    faults(2, 3, 5)
    loop.train(config('motion', max_nonfinite=3, warmup_steps=6), tmp_path)
    records = metrics.read(tmp_path / 'motion' / 'metrics.jsonl')
    # The warm-up goes on with the next update that is done.
    rates = np.array([r['learning_rate'] for r in records if r['loss'] is not None])
    np.testing.assert_allclose(rates / rates[0], [1, 2, 3], rtol=1e-6)
    assert [r['skipped'] for r in records] == [0, 1, 2, 2, 3, 3]
    assert [r['nonfinite'] for r in records] == [0, 1, 2, 0, 1, 0]
    assert [r['loss'] is None for r in records] == [False, True, True, False, True, False]
    assert (tmp_path / 'motion' / 'checkpoints' / '6').exists()
    assert not (tmp_path / 'motion' / 'diverged').exists()


@pytest.mark.parametrize('allowed', [1, 2])
def test_dump_is_of_the_step_at_fault(allowed, autoencoder, tmp_path, faults):
    """Although the next one would have been good; and its numbers are those of the loop's step."""
    shutil.copytree(autoencoder, tmp_path / 'autoencoder')
    last = 2 + allowed
    made = faults(*range(3, last + 1))
    line = diverge(config('motion', max_nonfinite=allowed, device_batch=1), tmp_path)
    (faulty,) = made
    assert max(faulty.params) == last
    where = tmp_path / 'motion' / 'diverged' / str(last)
    stored = divergence.read(where)
    network = nnx.eval_shape(
        lambda: parts.make_network('motion', config('motion'), 10, make_rngs(0))
    )
    params = Stacks(network, make_mesh()).unstack(faulty.params[last])
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        np.testing.assert_array_equal(x, stored.params[divergence.path_name(path)])
    # The statistics of the dump are the run's: computed anew the step is good.
    assert 'finite when computed anew' in line
    for name, value in stored.report['metrics'].items():
        assert value == pytest.approx(faulty.clean[last][name], rel=1e-4), name
    total = math.hypot(*(x['gradient'] for x in stored.report['layers'].values()))
    assert total == pytest.approx(faulty.clean[last]['grad_norm'], rel=1e-4)
    flat = np.concatenate([x.ravel() for x in stored.params.values()])
    total = math.hypot(*(x['parameters'] for x in stored.report['layers'].values()))
    assert total == pytest.approx(np.linalg.norm(flat), rel=1e-4)
    if allowed == 2:
        assert_told(command(where), stored.report)


def test_norms_do_not_overflow():
    tree = {'a': jnp.array([3e30, 4e30]), 'b': jnp.array([jnp.inf, 1.0]), 'c': jnp.zeros(2)}
    tree |= {'d': jnp.array([jnp.nan, 1.0]), 'blocks': {'w': jnp.full((2, 2, 2), 1e30)}}
    found = divergence.norms(tree)
    assert found['a'] == pytest.approx(5e30)
    assert found['blocks']['w'] == pytest.approx([2e30, 2e30])
    assert (found['b'], found['c']) == (jnp.inf, 0) and jnp.isnan(found['d'])


@pytest.fixture(scope='module')
def dumped(tmp_path_factory):
    """The folder of a stage with a dump."""
    workdir = tmp_path_factory.mktemp('dumped')
    diverge(config('autoencoder', learning_rate=1e30, max_nonfinite=1), workdir)
    return workdir / 'autoencoder'


@pytest.fixture
def dump(dumped, tmp_path):
    """A copy of it to be damaged."""
    folder = shutil.copytree(dumped, tmp_path / 'autoencoder')
    (where,) = (folder / 'diverged').iterdir()
    return where


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garbage(path):
    path.write_bytes(b'no such thing')


def wrong_fields(path):
    path.write_text('{"step": 1, "metrics": [], "layers": {}}')


DAMAGES = [
    *((name, cut) for name in ('report.json', 'params.safetensors', 'inputs.npz')),
    *((name, garbage) for name in ('report.json', 'params.safetensors', 'inputs.npz')),
    ('report.json', wrong_fields),
]


@pytest.mark.parametrize('name, damage', DAMAGES)
def test_damaged_dump(dump, name, damage):
    divergence.read(dump)
    damage(dump / name)
    with pytest.raises(UserError, match=rf'^--dump=\S+: {name} is damaged \(.+\): [^\n]+$'):
        divergence.read(dump)


@pytest.mark.parametrize('name', ['report.json', 'params.safetensors', 'inputs.npz'])
def test_missing_dump(dump, name):
    (dump / name).unlink()
    with pytest.raises(UserError, match=rf'^--dump=\S+: {name} is missing: give RUN'):
        divergence.read(dump)


def test_dump_must_lie_in_a_run(dump):
    for where in (dump.parent.parent, dump.with_name('5'), dump.parents[3] / 'nowhere'):
        with pytest.raises(UserError, match='give RUN/STAGE/diverged/STEP'):
            divergence.read(where)
    stored = divergence.read(dump)
    (dump.parent.parent / 'inputs.json').unlink()
    with pytest.raises(UserError, match=r'inputs\.json is missing: leave the dump in its run'):
        divergence.replay(dump, stored)


def test_dump_of_another_config(dump):
    path = dump.parent.parent / 'config.json'
    tree = json.loads(path.read_text())
    tree['autoencoder']['model']['dim'] = 32
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r'is float32 \[.*\], not float32 \[.*\] as .* says'):
        divergence.replay(dump, divergence.read(dump))


def test_command_tells_of_a_damaged_dump(dump):
    cut(dump / 'inputs.npz')
    one_error(
        script('-m', 'cmd_jax.training.divergence', f'--dump={dump}'), 'inputs.npz is damaged'
    )


def test_dump_that_cannot_be_written(tmp_path):
    """The run's folder is there, the dump's name is taken by a file: the message is not lost."""
    (tmp_path / 'autoencoder').mkdir()
    (tmp_path / 'autoencoder' / 'diverged').write_text('')
    train = dict(learning_rate=1e30, max_nonfinite=1)
    line = diverge(config('autoencoder', **train), tmp_path)
    for word in ('autoencoder diverged at step', '(loss ', 'cannot be written'):
        assert word in line
