"""A run from end to end: train all stages, load, sample, and what can go wrong."""

import json
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import cmd_jax
from cmd_jax import video
from cmd_jax.errors import UserError
from cmd_jax.parallel import mesh as meshes
from cmd_jax.training import config as configs
from cmd_jax.training import loop, parts
from tests import tiny


def script(name, *flags):
    done = subprocess.run(
        [sys.executable, name, *flags], capture_output=True, text=True, timeout=600
    )
    return done.returncode, done.stderr


def one_error(result, *words):
    code, stderr = result
    assert code == 2, stderr[-2000:]
    line = stderr.strip().splitlines()[-1]
    assert line.startswith('error: ') and 'Traceback' not in stderr, stderr[-2000:]
    for word in words:
        assert word in line, line


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A trained tiny run, on the eight devices of this process."""
    workdir = tmp_path_factory.mktemp('run')
    tree = tiny.tree()
    tree['mesh'] = dict(data=2, fsdp=4, tensor=1)
    tree['content']['train']['preview_every'] = 3
    loop.train(configs.parse(tree), workdir)
    return workdir


@pytest.fixture(scope='module')
def generator(run):
    return cmd_jax.load(run)


def test_run_directory_holds_what_it_should(run):
    for stage in configs.STAGES:
        folder = run / stage
        names = {p.name for p in folder.iterdir()}
        expected = {'config.json', 'inputs.json', 'checkpoints', 'metrics.jsonl', 'previews'}
        assert names == expected
        previews = {p.name for p in (folder / 'previews').iterdir()}
        assert '0000006.png' in previews
        assert ('0000003.png' in previews) == (stage == 'content')
        assert ('0000006.mp4' in previews) == (stage != 'content')
        records = [json.loads(line) for line in (folder / 'metrics.jsonl').open()]
        assert [r['step'] for r in records] == [1, 2, 3, 4, 5, 6]
        assert all(np.isfinite(r['loss']) and r['skipped'] == 0 for r in records)
        assert records[0]['learning_rate'] < records[1]['learning_rate']
    inputs = json.loads((run / 'content' / 'inputs.json').read_text())
    assert len(inputs['class_names']) == 10 and inputs['autoencoder_step'] == 6


def test_second_run_has_nothing_to_do(run):
    before = (run / 'content' / 'metrics.jsonl').read_text()
    tree = tiny.tree('content')
    tree['content']['train']['preview_every'] = 3
    loop.train(configs.parse(tree), run)
    assert (run / 'content' / 'metrics.jsonl').read_text() == before


def test_videos_depend_on_seed_and_place_alone(generator):
    labels = [3, 1, 7, 0, 9]
    videos = generator(labels, seed=1)
    assert videos.shape == (5, 4, 16, 16, 3) and videos.dtype == np.uint8
    single = generator(labels, seed=1, batch_size=2)
    # Another batch size multiplies in another order: a rounding step of the uint8 at most.
    assert np.abs(videos.astype(int) - single).max() <= 1
    other = generator(labels, seed=2)
    assert np.abs(videos.astype(int) - other).max() > 1


def test_videos_do_not_depend_on_the_devices(run, monkeypatch):
    def videos(devices):
        mesh = meshes.make_mesh(devices=jax.devices()[:devices])
        with monkeypatch.context() as m:
            m.setattr('cmd_jax.loading.make_mesh', lambda: mesh)
            return cmd_jax.load(run)([3, 1, 7], seed=1)

    assert np.abs(videos(1).astype(int) - videos(8)).max() <= 1


def test_options_of_sampling_change_the_video(generator):
    base = dict(guidance=9.0, steps=6)
    changes = (
        *(dict(guidance=2.0), dict(steps=5), dict(motion_guidance=2.0), dict(motion_steps=4)),
        *(dict(guidance_rescale=1.0), dict(guidance_start=0.5), dict(guidance_end=0.5)),
        *(dict(spacing='trailing'), dict(sampler='ddpm'), dict(sampler='dpmpp_2m')),
    )
    videos = [generator([3], **base | change) for change in ({}, *changes)]
    for i, found in enumerate(videos):
        same = [j for j in range(i) if (found == videos[j]).all()]
        assert not same, (changes[i - 1], same)


def test_reconstruct_and_content_frames(generator):
    clips = np.random.default_rng(0).integers(0, 256, (3, 4, 16, 16, 3), dtype=np.uint8)
    out = generator.reconstruct(clips)
    assert out.shape == clips.shape and out.dtype == np.uint8
    expected = generator.autoencoder(jnp.asarray(video.to_float(clips)))
    assert np.abs(video.to_uint8(np.asarray(expected)).astype(int) - out).max() <= 1
    frames = generator.content_frames(clips)
    assert (frames >= clips.min(1)).all() and (frames <= clips.max(1)).all()


def test_animate_gives_different_motions_of_one_frame(generator):
    frame = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    videos = generator.animate(frame, n=3, label=4)
    assert videos.shape == (3, 4, 16, 16, 3)
    assert (videos[0] != videos[1]).any()
    with pytest.raises(UserError, match=r'\(16, 16, 3\)'):
        generator.animate(frame[:8])


def test_interpolate_goes_from_one_seed_to_another(generator):
    videos = generator.interpolate(5, seeds=(3, 8), label=2)
    assert videos.shape == (5, 4, 16, 16, 3)
    for end, seed in ((0, 3), (4, 8)):
        alone = generator([2], seed=seed)[0]
        # The far end's noise is cos(pi / 2) of the near one's away from its own.
        assert np.abs(videos[end].astype(int) - alone).max() <= 1
    steps = np.abs(np.diff(videos.astype(int), axis=0)).mean(axis=(1, 2, 3, 4))
    whole = np.abs(videos[4].astype(int) - videos[0]).mean()
    assert np.all(steps > 0) and steps.max() < whole


def test_predict_motion_of_real_clips(generator):
    real = np.random.default_rng(0).integers(0, 256, (3, 4, 16, 16, 3)).astype(np.uint8)
    first = generator.predict_motion(real, [0, 1, 2], seed=1)
    assert first.shape == real.shape
    alone = generator.predict_motion(real[1:2], [1], seed=1, first=1)
    assert np.abs(first[1:2].astype(int) - alone).max() <= 1
    other = generator.predict_motion(real, [0, 1, 2], seed=2)
    assert np.abs(first.astype(int) - other).max() > 0


def test_videos_that_belong_together_need_a_condition(generator):
    real = np.zeros((3, 4, 16, 16, 3), np.uint8)
    for ask in (lambda: generator.interpolate(3), lambda: generator.predict_motion(real)):
        with pytest.raises(UserError, match=r'a class is missing: name one of 0\.\.9'):
            ask()
    with pytest.raises(UserError, match='3 videos and 2 conditions: give one for each'):
        generator.predict_motion(real, [0, 1])
    with pytest.raises(UserError, match='ddpm adds noise at every step'):
        generator.interpolate(3, label=1, sampler='ddpm')
    with pytest.raises(UserError, match='no videos were given'):
        generator.reconstruct(real[:0])


def test_stages_on_their_own(run, generator):
    alone = cmd_jax.load(run, stages=['autoencoder', 'motion'])
    real = np.random.default_rng(0).integers(0, 256, (2, 4, 16, 16, 3)).astype(np.uint8)
    for ask in (alone.__call__, alone.interpolate):
        with pytest.raises(UserError, match='the content stage was not loaded'):
            ask()
    predicted = [x.predict_motion(real, [0, 1], seed=1) for x in (alone, generator)]
    np.testing.assert_array_equal(*predicted)
    with pytest.raises(UserError, match='the motion stage was not loaded'):
        cmd_jax.load(run, stages=['autoencoder']).animate(real[0, 0])
    with pytest.raises(UserError, match="'autoencoder', 'content', 'motion'"):
        cmd_jax.load(run, stages=['content'])


def test_networks_that_compute_in_bfloat16_are_kept_so(run, tmp_path):
    """With the videos of parameters in full precision, to the bit."""
    workdir = tmp_path / 'run'
    shutil.copytree(run, workdir)
    for path in workdir.glob('*/config.json'):
        path.write_text(path.read_text().replace('"precision": "auto"', '"precision": "bfloat16"'))
    lean, full = (cmd_jax.load(workdir, full_precision=x) for x in (False, True))
    for name in configs.STAGES:
        kernels = {}
        for generator in (lean, full):
            state = nnx.to_flat_state(nnx.state(getattr(generator, name), nnx.Param))
            assert all(x.dtype == jnp.float32 for path, x in state if 'norm' in path[-2])
            kernels[generator] = [x for path, x in state if path[-1] == 'kernel']
        half = [x.dtype == jnp.bfloat16 for x in kernels[lean]]
        assert sum(half) > len(half) / 2 and all(x.dtype == jnp.float32 for x in kernels[full])
    np.testing.assert_array_equal(lean([3], seed=1), full([3], seed=1))
    assert lean.sha256 == full.sha256 and len(set(lean.sha256.values())) == 3


def test_sample_script(run, tmp_path):
    how = '--sampler=unipc --spacing=trailing --steps=3 --guidance=2 --motion_guidance=3'
    how += ' --guidance_rescale=0.5 --guidance_end=0.8'
    asked = ['--labels=three,7', '--num_videos=3', f'--out={tmp_path}', *how.split()]
    code, stderr = script('sample.py', f'--workdir={run}', *asked)
    assert code == 0, stderr[-2000:]
    names = {p.name for p in tmp_path.iterdir()}
    expected = {'0000.mp4', '0001.mp4', '0002.mp4', 'grid.mp4', 'grid.gif'}
    assert names == expected | {'frames.png', 'samples.json'}
    record = json.loads((tmp_path / 'samples.json').read_text())
    assert [v['label'] for v in record['videos']] == [3, 7, 3]
    assert record['checkpoint_steps'] == dict.fromkeys(configs.STAGES, 6)
    assert record['seed'] == 0
    used = dict(sampler='unipc', spacing='trailing', steps=3, guidance=2.0)
    assert used.items() <= record['content'].items()
    assert record['content']['guidance_rescale'] == 0.5
    assert record['motion']['guidance'] == 3 and record['motion']['guidance_end'] == 0.8
    assert video.read(tmp_path / '0000.mp4').shape[0] == 4


# --- What a user can do wrong -----------------------------------------------------------------


def test_labels_out_of_range(generator):
    with pytest.raises(UserError, match=r'label 10 is out of range: this run has 0\.\.9'):
        generator([10])
    with pytest.raises(UserError, match='sampler'):
        generator([1], sampler='ddmi')


def test_sampling_options_that_have_no_meaning(run):
    config = {stage: configs.load(run / stage / 'config.json') for stage in ('content', 'motion')}
    for options, said in (
        (dict(guidance=1.0, motion_guidance=3.0), 'motion_guidance=3.0: this run has no classes'),
        (dict(guidance=0.0), 'guidance=0.0: this run has no classes'),
        (dict(guidance_rescale=0.5), 'guidance_rescale=0.5: this run has no classes'),
        (dict(guidance_end=0.5), 'guidance_end=0.5: this run has no classes'),
        (dict(steps=1001), 'steps=1001'),
    ):
        with pytest.raises(UserError, match=said):
            parts.sampling_options(config, conditioned=False, **options)


def test_scripts_fail_in_one_line(run, tmp_path):
    one_error(script('train.py'), '--config is missing')
    one_error(script('train.py', '--confg=x'), 'confg', 'Did you mean')
    config = '--config=configs/quickstart.py:all,tiny'
    one_error(script('train.py', config), '--workdir is missing')
    workdir = f'--workdir={tmp_path}/new'
    one_error(script('train.py', '--config=configs/nothing.py', workdir), 'configs/nothing.py')
    one_error(script('train.py', f'{config},big', workdir), "'big'", 'tiny')
    one_error(
        script('train.py', config, '--config.content.train.step=3', workdir),
        'content.train.step',
        'content.train.steps',
    )
    one_error(script('train.py', config, '--config.data.frames=x', workdir), 'data.frames')
    one_error(
        script('sample.py', f'--workdir={tmp_path}/none'), 'no trained autoencoder', 'train.py'
    )
    one_error(script('sample.py', f'--workdir={run}', '--labels=elf'), "'elf'", 'zero')
    one_error(script('train.py', f'-{config[2:]}', '-config.data.fraems=3', workdir), 'data.frames')
    (tmp_path / 'file').write_text('')
    one_error(script('sample.py', f'--workdir={run}', f'--out={tmp_path}/file/x'), '--out')
    assert not (tmp_path / 'new').exists(), 'nothing was written'


@pytest.mark.parametrize(
    'change, words',
    [
        (lambda t: t['data'].update(height=18), ['height=18', 'patch=4']),
        (lambda t: t['autoencoder']['model'].update(heads=3), ['dim=16', 'heads=3']),
        (lambda t: t['content']['train'].update(batch_size=9), ['batch_size=9', '8 devices']),
        (lambda t: t['mesh'].update(tensor=3, fsdp=1), ['tensor=3', '8 devices']),
        (lambda t: t['data'].update(source='folder:/none'), ['/none']),
        (lambda t: t['data'].update(source='movies'), ["'movies'", 'moving_digits']),
        (lambda t: t['motion']['model'].update(patch=3), ['frames=4', 'patch=3']),
        (lambda t: t['motion']['sampling'].update(steps=5000), ['steps=5000', '1000']),
        (lambda t: t['content']['model'].update(dim=12, rotary=True), ['head_dim=6', 'divisible']),
        (lambda t: t['motion']['model'].update(dim=12, rotary=True), ['head_dim=6', 'divisible']),
        (lambda t: t['content'].update(start='/none/dit.pt'), ['/none/dit.pt']),
    ],
)
def test_bad_configs_stop_before_training(change, words, tmp_path):
    tree = tiny.tree()
    change(tree)
    with pytest.raises(UserError) as e:
        loop.train(configs.parse(tree), tmp_path)
    for word in words:
        assert word in str(e.value)
    # The mended command is not held against the wrong one.
    loop.check_config('autoencoder', tiny.config(), tmp_path / 'autoencoder', False)
    assert not list(tmp_path.rglob('*.json'))


def test_content_needs_an_autoencoder(tmp_path):
    with pytest.raises(UserError, match=r'no trained autoencoder: python train.py .*:autoencoder'):
        loop.train(tiny.config('content'), tmp_path)


def test_changed_config_is_shown(run, tmp_path):
    tree = tiny.tree('autoencoder')
    tree['autoencoder']['train']['learning_rate'] = 0.5
    with pytest.raises(UserError, match=r'learning_rate: 0.001 -> 0.5.*--force_config'):
        loop.train(configs.parse(tree), run)
    # Forced, a config whose arrays have other shapes is still refused, and nothing is lost.
    shutil.copytree(run / 'autoencoder', tmp_path / 'autoencoder')
    tree['autoencoder']['model']['dim'] = 24
    with pytest.raises(UserError, match='does not fit this config'):
        loop.train(configs.parse(tree), tmp_path, force_config=True)
    shutil.copytree(run / 'content', tmp_path / 'content')
    shutil.copytree(run / 'motion', tmp_path / 'motion')
    assert cmd_jax.load(tmp_path)([1]).shape == (1, 4, 16, 16, 3)


@pytest.mark.parametrize('name', ['sample.py', 'evaluate.py'])
def test_sigterm_ends_at_once(run, name, tmp_path):
    # More than it gets to.
    command = [sys.executable, name, f'--workdir={run}', f'--out={tmp_path / "out"}']
    command += ['--protocol=moving_digits'] if name == 'evaluate.py' else []
    with subprocess.Popen([*command, '--num_videos=100000'], stderr=subprocess.PIPE) as started:
        until = time.monotonic() + 120
        while not (tmp_path / 'out').exists() and time.monotonic() < until:
            time.sleep(0.1)
        time.sleep(1.0)
        started.terminate()
        begun = time.monotonic()
        try:
            said = started.communicate(timeout=60)[1].decode()
        finally:
            started.kill()
    assert started.returncode == 75, said[-2000:]
    assert 'interrupted: SIGTERM' in said and 'Traceback' not in said, said[-2000:]
    assert time.monotonic() - begun < 15
    assert not list((tmp_path / 'out').iterdir()), 'nothing is half done'


def test_stages_must_agree_on_the_autoencoder(run):
    tree = tiny.tree('motion')
    tree['autoencoder']['model']['depth'] = 2
    with pytest.raises(UserError, match='autoencoder.model.depth: 1 -> 2'):
        loop.train(configs.parse(tree), run, force_config=True)


def test_unwritable_workdir(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='cannot be written'):
        loop.train(tiny.config(), tmp_path / 'file')


def test_content_needs_a_finished_autoencoder(run, tmp_path):
    shutil.copytree(run / 'autoencoder', tmp_path / 'autoencoder')
    path = tmp_path / 'autoencoder' / 'config.json'
    stored = json.loads(path.read_text())
    stored['autoencoder']['train']['steps'] = 60
    path.write_text(json.dumps(stored))
    with pytest.raises(UserError, match='6 of 60 steps'):
        loop.train(tiny.config('content'), tmp_path)


@pytest.mark.parametrize('classes', [True, False])
def test_folder_of_videos_end_to_end(classes, tmp_path):
    rng = np.random.default_rng(0)
    for i in range(4):
        folder = tmp_path / 'videos' / (f'class{i % 2}' if classes else '')
        noise = rng.integers(0, 256, (10, 24, 32, 3), dtype=np.uint8)
        video.write(folder / f'{i}.mp4', noise)
    (tmp_path / 'videos' / 'empty.mp4').write_bytes(b'')
    tree = tiny.tree(name='folder', source=f'folder:{tmp_path / "videos"}')
    loop.train(configs.parse(tree), tmp_path / 'run')
    generator = cmd_jax.load(tmp_path / 'run')
    assert generator.class_names == (['class0', 'class1'] if classes else [])
    assert generator(num_videos=3, seed=0).shape == (3, 4, 16, 16, 3)
    if not classes:
        with pytest.raises(UserError, match='no classes'):
            generator([0])
        with pytest.raises(UserError, match='guidance=4.0'):
            generator(guidance=4.0)


def test_every_field_can_be_set_on_the_command_line(tmp_path):
    """Among them those that may be absent, like head_dim."""
    flags = ['--config.autoencoder.model.head_dim=6', '--config.content.loss.min_snr=5']
    config = '--config=configs/quickstart.py:all,tiny'
    one_error(script('train.py', config, *flags, f'--workdir={tmp_path}'), 'head_dim=6')
    spaced = ['--config', 'configs/quickstart.py:all,tiny', '--config.content.train.step=3']
    one_error(script('train.py', *spaced, f'--workdir={tmp_path}'), 'content.train.steps')


@pytest.mark.usefixtures('unchecked_types')
def test_floats_are_not_taken_for_videos(generator):
    with pytest.raises(UserError, match='float32'):
        generator.reconstruct(np.zeros((1, 4, 16, 16, 3), np.float32))
