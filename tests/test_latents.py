"""Latent caches: what they hold, training from them, and what is refused."""

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from cmd_jax import stable_diffusion, video
from cmd_jax.data import latent_records, pipeline, records
from cmd_jax.errors import UserError
from cmd_jax.parallel import mesh as meshes
from cmd_jax.parallel.placement import put_batch
from cmd_jax.training import config as configs
from cmd_jax.training import frozen, latent_cache, loop, parts, stages, trained
from tests import tiny
from tests.test_generate import one_error
from tests.tiny_videos import numbered

SOURCE = 'moving_digits:20'


def config(stage='all', source=SOURCE, **data) -> configs.Config:
    tree = tiny.tree(stage, source=source, **data)
    tree['motion']['statistics_clips'] = 16
    return configs.parse(tree)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('run')
    loop.train(config('autoencoder'), workdir)
    return workdir


def write(run, out, **options):
    latent_cache.write(run, out, {}, **dict(batch_size=8, shard_clips=6, limit=20) | options)
    return out


@pytest.fixture(scope='module')
def cache(run, tmp_path_factory):
    return write(run, tmp_path_factory.mktemp('cache') / 'latents')


def content(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(pathlib.Path(folder).glob('*.*'))}


def test_a_cache_holds_what_the_autoencoder_says(run, cache):
    autoencoder = trained.load(run, 'autoencoder', meshes.make_mesh()).network
    for split in ('train', 'test'):
        source, clips = (
            latent_records.Latents(str(cache), split),
            parts.make_source(config(), split),
        )
        assert len(source) == 20 and source.class_names == clips.class_names
        for i in (0, 7, 19):
            sample, clip = source[i], clips[i]
            frame, motion = autoencoder.encode(jnp.asarray(video.to_float(clip['video'])[None]))
            np.testing.assert_allclose(sample['content'], frame[0], atol=2e-6)
            np.testing.assert_allclose(sample['motion'], motion[0], atol=2e-6)
            assert all(sample[name] == clip[name] for name in ('label', 'caption', 'index'))
            assert sample['label'].dtype == np.int32 and sample['index'].dtype == np.int64
    header = json.loads((cache / 'header.json').read_text())
    assert header['splits']['train'] == {'records': 20, 'shards': 4, 'skipped': {}}


@pytest.mark.parametrize('stage', ['content', 'motion'])
def test_training_from_a_cache_is_training_on_the_clips(run, cache, stage, tmp_path):
    """The same clips in the same order: the same losses, motion statistics and network."""
    losses, networks = [], []
    for name, source in (('clips', SOURCE), ('cache', f'latents:{cache}')):
        shutil.copytree(run, tmp_path / name)
        loop.train(config(stage, source), tmp_path / name)
        lines = (tmp_path / name / stage / 'metrics.jsonl').read_text().splitlines()
        losses.append([json.loads(line)['loss'] for line in lines])
        networks.append(trained.load(tmp_path / name, stage, meshes.make_mesh()))
        assert list((tmp_path / name / stage / 'previews').glob('*.png'))
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert len(set(losses[0])) == 6
    # As one vector: where a gradient is rounding noise, Adam's update may point anywhere.
    one, other = (
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(nnx.state(n.network, nnx.Param))])
        for n in networks
    )
    assert np.linalg.norm(one - other) < 1e-3 * np.linalg.norm(one)
    if stage == 'motion':
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
            *(network.statistics for network in networks),
        )


def test_an_interrupted_cache_goes_on(run, cache, tmp_path, monkeypatch):
    begun, real = [], records.write_shard

    def write_shard(path, made):
        begun.append(path)
        if len(begun) == 3:  # some of the shard has been written
            made = (record if i < 2 else 1 / 0 for i, record in enumerate(made))
        return real(path, made)

    monkeypatch.setattr(records, 'write_shard', write_shard)
    with pytest.raises(ZeroDivisionError):
        write(run, tmp_path / 'x')
    names = {p.name for p in (tmp_path / 'x').glob('*')}
    assert names == {
        *('settings.json', 'parts'),
        *(f'train-0000{k}-of-00004.array_record' for k in range(2)),
    }
    with pytest.raises(UserError, match='no header.json.*completely'):
        latent_records.Latents(str(tmp_path / 'x'), 'train')
    begun.clear()
    begun.append('counted already')
    monkeypatch.setattr(records, 'write_shard', lambda p, r: (begun.append(p), real(p, r))[1])
    write(run, tmp_path / 'x')
    assert [pathlib.Path(p).name[:11] for p in begun[1:3]] == ['train-00002', 'train-00003']
    assert content(tmp_path / 'x') == content(cache)
    begun.clear()
    write(run, tmp_path / 'x')
    assert not begun
    with pytest.raises(UserError, match='holds another cache .*seed: 0 -> 1.*choose another --out'):
        write(run, tmp_path / 'x', seed=1)


def test_random_clips_of_a_folder(run, tmp_path):
    """Several clips of each video, drawn anew each time; broken videos are told of."""
    for i in range(5):
        video.write(tmp_path / 'videos' / f'{i}.mp4', numbered(30, 24, 40))
    data = dict(source=f'folder:{tmp_path / "videos"}', flip=True, probe=False, workers=0)
    (tmp_path / 'videos' / 'zero.mp4').touch()
    made = {}
    for seed in (0, 0, 1):
        out = tmp_path / f'{len(made)}_{seed}'
        latent_cache.write(run, out, data, clips_per_video=3, batch_size=8, seed=seed)
        made[out.name] = [latent_records.Latents(str(out), s) for s in ('train', 'test')]
    (train, test), (again, _), (other, _) = made.values()
    found = {s: train.header['splits'][s] for s in ('train', 'test')}
    videos = {'train': len(train) // 3, 'test': len(test)}
    assert sum(videos.values()) == 5
    skipped = [s for s in found if 'zero.mp4' in found[s]['skipped']]
    assert len(skipped) == 1 and found[skipped[0]]['skipped'] == {'zero.mp4': ['empty file', '']}
    contents = [train[i]['content'].tobytes() for i in range(len(train))]
    # A solid grey looks the same wherever the window lies.
    assert len(set(contents)) > len(contents) // 2
    assert contents == [again[i]['content'].tobytes() for i in range(len(train))]
    assert contents != [other[i]['content'].tobytes() for i in range(len(train))]


def test_unreadable_videos_may_be_allowed_afterwards(run, tmp_path):
    """Short ones are no mistake of the data's."""
    for i in range(4):
        video.write(tmp_path / 'videos' / f'{i}.mp4', numbered(30, 24, 40))
    video.write(tmp_path / 'videos' / 'short.mp4', numbered(2, 24, 40))
    data = dict(source=f'folder:{tmp_path / "videos"}', probe=False, workers=0, max_bad=0.0)
    latent_cache.write(run, tmp_path / 'short', data, batch_size=8)
    (tmp_path / 'videos' / 'zero.mp4').touch()
    out = tmp_path / 'out'
    said = r'1 of . clips .* more than --max_bad=0.0 allows .*zero.mp4: empty file: mend'
    with pytest.raises(UserError, match=said):
        latent_cache.write(run, out, data, batch_size=8)
    before = {path: path.stat().st_mtime_ns for path in out.glob('*.array_record')}
    latent_cache.write(run, out, data | {'max_bad': 1.0}, batch_size=8)
    assert len(before) == 2
    assert before == {path: path.stat().st_mtime_ns for path in out.glob('*.array_record')}
    assert sum(len(latent_records.Latents(str(out), s)) for s in ('train', 'test')) == 4
    # As an older version has told of it.
    path = out / 'settings.json'
    stored = json.loads(path.read_text())
    stored['data']['max_bad'], stored['networks']['model']['remat'] = 0.5, 'full'
    path.write_text(json.dumps(stored))
    latent_cache.write(run, out, data, batch_size=8)
    # As cmd_jax.data.prepare tells of what it makes.
    (tmp_path / 'prepared').mkdir()
    (tmp_path / 'prepared' / 'settings.json').write_text(json.dumps({'data': 'folder:x'}))
    with pytest.raises(UserError, match='holds another cache .networks.autoencoder: None -> '):
        latent_cache.write(run, tmp_path / 'prepared', data, batch_size=8)
    for i in range(4):
        shutil.copy(tmp_path / 'videos' / 'short.mp4', tmp_path / 'videos' / f'{i}.mp4')
    with pytest.raises(UserError, match='none of . clips of the split .train. can be had'):
        latent_cache.write(run, tmp_path / 'empty', data | {'max_bad': 1.0}, batch_size=8)
    assert not (tmp_path / 'empty' / 'header.json').exists()


def loss_of(name: str, tree: dict, run, steps=2):
    """The losses of a stage on its first batches, with fresh weights; and motion statistics."""
    config, mesh = configs.parse(tree | {'stage': name}), meshes.make_mesh()
    data = stages.load_data(config)
    given = frozen.load(name, config, run, data, mesh)
    stage = stages.make(name, config, len(data.class_names), mesh)
    batches = pipeline.Batches(data.source, 8, seed=0, shuffle=True, repeat=True)
    networks = given.networks
    if name == 'motion':
        networks |= {'statistics': frozen.measure_statistics(networks, batches, 8, 3, mesh)}
    loss = jax.jit(lambda *args: stage.loss(*args)[0])
    model, keys = stage.make_model(nnx.Rngs(0)), jax.random.split(jax.random.key(1), 8)
    with jax.set_mesh(mesh):
        found = []
        for _ in range(steps):
            batch = put_batch(given.inputs(next(batches)), mesh)
            found.append(float(loss(model, networks, batch, keys)))
    return found


def test_text_features_come_from_the_cache(small_pipeline, tmp_path):
    """Content (a U-Net on prompts) and motion: the losses are those of encoding in the step."""
    tree = tiny.text_tree(small_pipeline, 'autoencoder', data__source=SOURCE)
    loop.train(configs.parse(tree), tmp_path / 'run')
    cache = tmp_path / 'latents'
    latent_cache.write(tmp_path / 'run', cache, {}, batch_size=8, limit=20)
    source = latent_records.Latents(str(cache), 'train')
    encoder = stable_diffusion.load(small_pipeline, parts=('text_encoder',))
    hidden, pooled = encoder.encode([source[3]['caption'], ''])
    np.testing.assert_allclose(source[3]['hidden'], hidden[0], atol=1e-5)
    np.testing.assert_allclose(source[3]['pooled'], pooled[0], atol=1e-5)
    np.testing.assert_allclose(source.empty_prompt()['hidden'], hidden[1], atol=1e-5)
    cached = tree | {'data': tree['data'] | {'source': f'latents:{cache}'}}
    for stage in ('content', 'motion'):
        losses = [loss_of(stage, t, tmp_path / 'run') for t in (tree, cached)]
        np.testing.assert_allclose(*losses, rtol=1e-5)
        assert losses[0][0] != losses[0][1]
    other = tmp_path / 'other'
    shutil.copytree(small_pipeline, other)
    path = other / 'text_encoder' / 'model.safetensors'
    weights = safetensors.numpy.load_file(path)
    weights[min(weights)] += 1
    safetensors.numpy.save_file(weights, path)
    tree['stable_diffusion']['source'] = str(other)
    autoencoder = trained.load(tmp_path / 'run', 'autoencoder', meshes.make_mesh())
    with pytest.raises(UserError, match='other networks .content_text, motion_text differ'):
        latent_cache.check(source, configs.parse(tree), autoencoder)


def test_caches_of_others_are_refused(run, cache, tmp_path):
    source = f'latents:{cache}'
    with pytest.raises(UserError, match='for the content and motion stages: the autoencoder'):
        loop.train(config('all', source), tmp_path / 'x')
    with pytest.raises(UserError, match="'frames': 4.*the config asks for .*'frames': 6"):
        data = stages.load_data(config('motion', source))
        found = trained.load(run, 'autoencoder', meshes.make_mesh())
        latent_cache.check(data.source, config('motion', source, frames=6), found)
    tree = tiny.tree('autoencoder', source=SOURCE)
    tree['autoencoder']['train']['steps'] = 7
    loop.train(configs.parse(tree), tmp_path / 'other')
    with pytest.raises(UserError, match='other networks .autoencoder, autoencoder_step differ'):
        loop.train(config('motion', source), tmp_path / 'other')
    with pytest.raises(UserError, match='no trained autoencoder'):
        write(tmp_path / 'nothing', tmp_path / 'y')
    with pytest.raises(UserError, match='give the videos that it was made from'):
        latent_cache.write(run, tmp_path / 'z', {'source': source})
    shutil.copytree(cache, tmp_path / 'lost')
    (tmp_path / 'lost' / 'train-00001-of-00004.array_record').unlink()
    with pytest.raises(UserError, match="3 shards of the split 'train'.*some are missing"):
        latent_records.Latents(str(tmp_path / 'lost'), 'train')


def test_the_command(run, cache, tmp_path):
    command = [sys.executable, '-m', 'cmd_jax.data.latents']

    def call(*flags):
        done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=300)
        return done.returncode, done.stderr

    one_error(call(), '--workdir is missing')
    one_error(call(f'--workdir={run}', f'--out={tmp_path}', '--dtype=int8'), 'dtype', 'float16')
    one_error(call(f'--workdir={run}', f'--out={tmp_path}/a', '--data=folder:/nowhere'), '/nowhere')
    flags = [f'--workdir={run}', f'--out={tmp_path}/b', '--limit=20', '--shard_clips=6']
    code, errors = call(*flags, '--dtype=float16', '--batch_size=8')
    assert code == 0, errors[-2000:]
    assert 'Warning' not in errors
    half, full = (latent_records.Latents(str(p), 'test') for p in (tmp_path / 'b', cache))
    for i in range(20):
        np.testing.assert_allclose(half[i]['motion'], full[i]['motion'], atol=1e-3)
        assert half[i]['content'].dtype == np.float32
