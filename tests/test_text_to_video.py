"""Latent mode and text, from end to end: training, prompts, pictures, what can go wrong."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import cmd_jax
from cmd_jax import stable_diffusion, video
from cmd_jax.errors import UserError
from cmd_jax.evaluation import features, moving_digits
from cmd_jax.models import convolution
from cmd_jax.parallel import mesh as meshes
from cmd_jax.stable_diffusion import make as maker
from cmd_jax.stable_diffusion import weights
from cmd_jax.training import config as configs
from cmd_jax.training import loop, parts, stages
from cmd_jax.training import state as states
from tests import evaluated, state_dicts, tiny
from tests.test_generate import one_error, script

PROMPTS = ['a three moving up', 'an eight moving down and left']


@pytest.fixture(scope='module')
def run(small_pipeline, tmp_path_factory):
    """A run on eight devices, latents drawn from the posterior."""
    workdir = tmp_path_factory.mktemp('run')
    changes = dict(stable_diffusion__posterior='sample', mesh__data=2, mesh__fsdp=4)
    loop.train(configs.parse(tiny.text_tree(small_pipeline, **changes)), workdir)
    return workdir


@pytest.fixture(scope='module')
def generator(run):
    return cmd_jax.load(run)


@pytest.fixture(scope='module')
def steered(run):
    """The same with noise in the networks: what a few steps from zero-initialised layers have
    learned is too faint for bytes."""
    generator = cmd_jax.load(run)
    networks = generator.autoencoder, generator.content, generator.motion
    rng = np.random.default_rng(0)

    def noisy(p):
        noise = rng.standard_normal(p.shape, np.float32)
        return jax.device_put(np.asarray(p) + 0.1 * noise, p.sharding)

    for network in networks:
        params = nnx.to_pure_dict(nnx.state(network, nnx.Param))
        nnx.update(network, jax.tree.map(noisy, params))
    return generator


def different(a, b):
    return np.abs(a.astype(int) - b).max() > 1


def test_run_has_what_a_run_has(run):
    for stage in configs.STAGES:
        names = {p.name for p in (run / stage / 'previews').iterdir()}
        assert '0000004.png' in names
        records = [json.loads(line) for line in (run / stage / 'metrics.jsonl').open()]
        assert all(np.isfinite(r['loss']) and r['skipped'] == 0 for r in records)
        assert 'psnr' not in records[0]  # of latents it would mean nothing
    assert json.loads((run / 'content' / 'inputs.json').read_text())['class_names'] == []


def test_content_begins_with_the_pretrained_network(small_pipeline):
    pipeline = stable_diffusion.load(small_pipeline, parts=('unet',))
    mesh = meshes.make_mesh()
    config = configs.parse(tiny.text_tree(small_pipeline))
    start = stages.start('content', config, 0, mesh)
    tx = states.optimizer(config.content.train)
    stacks, _, init = states.prepare(functools.partial(parts.make_content, config, 0), tx, mesh)
    state = init(jax.random.key(0), start)
    stored = nnx.to_pure_dict(nnx.state(pipeline.unet, nnx.Param))
    for tree_ in (state.params, state.ema):
        assert jax.tree.all(jax.tree.map(np.array_equal, stacks.unstacked(tree_), stored))


def test_generators_convolutions_spare_products(generator):
    for network in (generator.stable_diffusion.unet, generator.stable_diffusion.vae):
        layers = [x for _, x in nnx.iter_modules(network) if isinstance(x, nnx.Conv)]
        assert layers
        assert {x.conv_general_dilated for x in layers} == {convolution.conv_general_dilated}


def test_prompts_make_videos(steered):
    videos = steered(prompt=PROMPTS, num_videos=3, seed=1)
    assert videos.shape == (3, 4, 16, 24, 3) and videos.dtype == np.uint8
    one = steered(prompt=PROMPTS[0], seed=1)
    # Another batch size multiplies in another order: a rounding step of the uint8 at most.
    assert not different(one[0], videos[0])
    assert not different(steered(prompt=PROMPTS, num_videos=3, seed=1, batch_size=2), videos)
    assert different(steered(prompt=PROMPTS[1], seed=1)[0], videos[0])
    assert different(steered(prompt=PROMPTS[0], seed=2)[0], videos[0])


def test_prompts_of_videos_that_belong_together(steered):
    way = steered.interpolate(3, seeds=(1, 2), prompt=PROMPTS[0])
    for end, seed in ((0, 1), (2, 2)):
        assert not different(way[end], steered(prompt=PROMPTS[0], seed=seed)[0])
    real = np.random.default_rng(0).integers(0, 256, (2, 4, 16, 24, 3), dtype=np.uint8)
    first = steered.predict_motion(real, prompt=PROMPTS, seed=1)
    assert first.shape == real.shape
    assert different(first, steered.predict_motion(real, prompt=PROMPTS[::-1], seed=1))


def test_a_protocol_asks_for_captions(steered, clip_folder, tmp_path, monkeypatch):
    """Of real clips, and measures how the videos suit them."""
    asked, stream = [], steered.stream

    def spy(**given):
        asked.extend(given['prompt'])
        return stream(**given)

    settings = dataclasses.replace(evaluated.FEW, num_videos=4, clip=str(clip_folder))
    with monkeypatch.context() as patch:
        patch.setattr(steered, 'stream', spy)
        numbers, pictures = evaluated.carry_out(steered, 'clipsim', tmp_path, settings)
    captions = parts.make_source(steered.config['content'], 'test').captions
    assert len(asked) == 4 and set(asked) < set(captions)
    assert not different(pictures['generation'], steered(prompt=asked, seed=0))
    wanted = features.clipsim(pictures['generation'], asked, clip_folder)
    assert numbers['generation_clipsim'] == pytest.approx(wanted, abs=1e-6)


def test_guidance_and_negative_prompts(steered, log):
    plain = steered(prompt=PROMPTS[0], guidance=1.0)
    negative = steered(prompt=PROMPTS[0], guidance=1.0, negative_prompt='a nine')
    assert 'no effect' in log.text and (plain == negative).all()
    guided = steered(prompt=PROMPTS[0], guidance=5.0)
    assert different(guided, plain)
    assert different(steered(prompt=PROMPTS[0], guidance=5.0, motion_guidance=1.0), guided)
    assert different(
        steered(prompt=PROMPTS[0], guidance=5.0, negative_prompt='a nine moving left'), guided
    )
    content_alone = dict(guidance=5.0, motion_guidance=1.0)
    assert different(
        steered(prompt=PROMPTS[0], negative_prompt='a nine', **content_alone),
        steered(prompt=PROMPTS[0], **content_alone),
    )


def test_no_guidance_is_the_conditional_network(steered):
    """Guidance 1 draws what the network says under the prompt, and nothing else."""
    from cmd_jax import sampling

    asked = steered.conditions(None, PROMPTS, '', None)
    options = steered.options(guidance=1.0)['content']
    keys = sampling.video_keys(0, 0, 2)
    args = (steered.content, steered.content_process, keys, asked.content)
    drawn = sampling.content_program(*args, asked.content_null, (4, 6, 4), **options)
    noise = sampling.normal_like(sampling.split_keys(keys, 5)[0], jnp.zeros((2, 4, 6, 4)))
    wanted = cmd_jax.diffusion.sample(
        lambda x, t: steered.content(x, t, asked.content),
        noise,
        steered.content_process,
        steps=2,
        offset=1,
        final_alpha_one=False,
    )
    np.testing.assert_allclose(drawn, wanted, atol=1e-4)


def test_pictures_come_to_life(steered, log):
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (16, 24, 3), dtype=np.uint8)
    videos = steered.animate(image=picture, n=2, prompt=PROMPTS[0])
    assert videos.shape == (2, 4, 16, 24, 3) and different(videos[0], videos[1])
    assert not different(steered.animate(picture, n=2, prompt=PROMPTS[0]), videos)
    assert different(steered.animate(picture, n=2, prompt=PROMPTS[1]), videos)
    # Without a prompt nothing is asked for: a negative one is no condition.
    free = steered.animate(picture, n=1)
    assert free.shape[0] == 1 and different(free, videos[:1])
    assert not different(steered.animate(picture, n=1, negative_prompt='a nine'), free)
    assert 'no effect' in log.text
    for asked, guidance in ((False, 1.0), (True, 2.0)):
        used = steered.animation_options(asked)
        assert list(used) == ['motion'] and used['motion']['sampling'].guidance == guidance
    large = steered.animate(image=np.repeat(np.repeat(picture, 2, 0), 2, 1), n=2)
    assert 'image of 32 x 48' in log.text and large.shape == videos.shape
    with pytest.raises(UserError, match='content or image'):
        steered.animate()


@pytest.mark.usefixtures('unchecked_types')
def test_pictures_that_do_not_fit(steered):
    picture = np.zeros((16, 24, 3), np.uint8)
    for arguments, words in (
        (dict(content=picture[:8]), r'\(8, 24, 3\): this run needs \(16, 24, 3\)'),
        (dict(content=picture, image=picture), 'content or image'),
        (dict(image=picture[..., 0]), r'\(16, 24\): give RGB'),
        (dict(image=picture / 255.0), 'float64'),
    ):
        with pytest.raises(UserError, match=words):
            steered.animate(**arguments)


def test_reconstruct_goes_through_the_vae(generator):
    clips = np.random.default_rng(0).integers(0, 256, (2, 4, 16, 24, 3), dtype=np.uint8)
    vae = generator.stable_diffusion.vae
    frames = video.to_float(clips).reshape(8, 16, 24, 3)

    @jax.jit
    def through(vae, autoencoder, frames):
        latents = vae.moments(frames)[0] * vae.scaling_factor
        out = autoencoder(latents.reshape(2, 4, 4, 6, 4)).reshape(8, 4, 6, 4)
        return vae.decode(out / vae.scaling_factor)

    wanted = through(vae, generator.autoencoder, jnp.asarray(frames))
    wanted = video.to_uint8(wanted).reshape(clips.shape)
    assert not different(generator.reconstruct(clips), np.asarray(wanted))
    assert generator.content_frames(clips).shape == (2, 16, 24, 3)


def test_export_is_a_pipeline_with_the_trained_network(generator, small_pipeline, tmp_path):
    generator.export(tmp_path / 'out')  # nothing is rounded on CPUs
    ours = stable_diffusion.load(tmp_path / 'out')
    stored = nnx.to_pure_dict(nnx.state(ours.unet, nnx.Param))
    trained = nnx.to_pure_dict(nnx.state(generator.content, nnx.Param))
    assert jax.tree.all(jax.tree.map(np.array_equal, stored, trained))
    pretrained = nnx.to_pure_dict(
        nnx.state(stable_diffusion.load(small_pipeline, parts=('unet',)).unet, nnx.Param)
    )
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), stored, pretrained)
    assert sum(jax.tree.leaves(moved)) > 0.9 * len(jax.tree.leaves(moved))
    assert ours.vae is not None and ours.text_encoder is not None


def test_run_finds_a_pipeline_that_has_moved(run, small_pipeline, generator, tmp_path):
    shutil.copytree(small_pipeline, tmp_path / 'moved')
    moved = cmd_jax.load(run, stable_diffusion=tmp_path / 'moved')
    videos = [g(prompt=PROMPTS[0], seed=3) for g in (moved, generator)]
    assert not different(*videos)
    with pytest.raises(UserError, match='nowhere'):
        cmd_jax.load(run, stable_diffusion=tmp_path / 'nowhere')


def test_motion_has_a_text_encoder_of_its_own(run, small_pipeline, tmp_path):
    """A folder with nothing but an encoder, of another width than the pipeline's."""
    wide = tmp_path / 'wide'
    shutil.copytree(small_pipeline / 'tokenizer', wide)
    sizes = json.loads((small_pipeline / 'text_encoder' / 'config.json').read_text()) | dict(
        hidden_size=32
    )
    maker.write_json(wide / 'config.json', sizes)
    rng = np.random.default_rng(0)
    arguments = stable_diffusion.arguments(wide, 'text_encoder')
    encoder = maker.draw(stable_diffusion.TextEncoder, arguments, maker.RULES, rng)
    weights.save(encoder, wide / 'model.safetensors')
    for part in ('autoencoder', 'content'):
        shutil.copytree(run / part, tmp_path / 'run' / part)
    changes = dict(stable_diffusion__posterior='sample', motion__text_encoder=str(wide))
    loop.train(configs.parse(tiny.text_tree(small_pipeline, 'motion', **changes)), tmp_path / 'run')
    generator = cmd_jax.load(tmp_path / 'run')
    wide.rename(tmp_path / 'moved')
    with pytest.raises(UserError, match='wide'):
        cmd_jax.load(tmp_path / 'run')
    generator = cmd_jax.load(tmp_path / 'run', text_encoder=tmp_path / 'moved')
    assert generator.motion.text_dim == 32 and generator.stable_diffusion.text_encoder.dim == 64
    asked = generator.conditions(None, PROMPTS, '', None)
    assert asked.content.shape == (2, 77, 64) and asked.motion.shape == (2, 32)
    assert not np.asarray(asked.motion_null).any() and np.asarray(asked.content_null).any()
    assert generator(prompt=PROMPTS).shape == (2, 4, 16, 24, 3)


def test_sample_script(run, tmp_path):
    flags = [f'--workdir={run}', '--prompt=a two moving up', '--prompt=a six', '--num_videos=3']
    code, stderr = script('sample.py', *flags, '--negative_prompt=blurry', f'--out={tmp_path}/a')
    assert code == 0, stderr[-2000:]
    record = json.loads((tmp_path / 'a' / 'samples.json').read_text())
    assert [v['prompt'] for v in record['videos']] == ['a two moving up', 'a six'] + [
        'a two moving up'
    ]
    assert record['negative_prompt'] == 'blurry' and record['content']['guidance'] == 4.0
    picture = np.random.default_rng(0).integers(0, 256, (20, 50, 3), dtype=np.uint8)
    video.write_image(tmp_path / 'picture.png', picture)
    flags = [f'--workdir={run}', '--prompt=a two', f'--image={tmp_path}/picture.png']
    code, stderr = script('sample.py', *flags, '--num_videos=2', f'--out={tmp_path}/b')
    assert code == 0, stderr[-2000:]
    assert 'image of 20 x 50' in stderr
    record = json.loads((tmp_path / 'b' / 'samples.json').read_text())
    assert [v['prompt'] for v in record['videos']] == ['a two'] * 2
    assert record['image'].endswith('picture.png')
    assert 'content' not in record, 'it was not sampled'
    assert record['motion']['guidance'] == 2.0
    one_error(script('sample.py', f'--workdir={run}'), 'prompt is missing')
    one_error(script('sample.py', f'--workdir={run}', '--labels=3'), '--prompt')


def test_prompts_that_do_not_suit_the_run(generator, run):
    with pytest.raises(UserError, match='steps=1000, spacing=.leading., offset=1'):
        generator(prompt='a three', steps=1000, spacing='leading')
    with pytest.raises(UserError, match='use protocol=prompted_digits'):
        moving_digits.evaluate(generator, num_videos=10)
    for arguments, words in (
        (dict(labels=[3]), 'takes a prompt'),
        (dict(), 'prompt is missing'),
        (dict(prompt=[]), 'prompt is empty'),
    ):
        with pytest.raises(UserError, match=words):
            generator(**arguments)


def test_classes_on_latents(small_pipeline, tmp_path):
    """ContentDiT in latent mode, started from a DiT of other classes and another size."""
    changes = dict(
        condition='class',
        content__model=dict(patch=2, dim=16, depth=1, heads=2, rotary=False, remat='none'),
        content__process=dict(schedule='linear', prediction='epsilon', learn_sigma=True),
    )
    start = state_dicts.dit_dict(dim=16, depth=1, patch=2, channels=4, tokens=4, classes=7)
    safetensors.numpy.save_file(start, tmp_path / 'dit.safetensors')
    changes['content__start'] = str(tmp_path / 'dit.safetensors')
    config = configs.parse(tiny.text_tree(small_pipeline, **changes))
    given = stages.start('content', config, 10, meshes.make_mesh())
    np.testing.assert_array_equal(
        given['time_embed/out/kernel'], start['t_embedder.mlp.2.weight'].T
    )
    # Ten classes rather than seven; 2 x 3 patches rather than 2 x 2.
    assert not {'label_embed/embedding', 'positions/position'} & set(given)
    with pytest.raises(UserError, match='content.model.dim=32'):
        wrong = tiny.text_tree(small_pipeline, **changes)
        wrong['content']['model']['dim'] = 32
        stages.start('content', configs.parse(wrong), 10, meshes.make_mesh())
    loop.train(config, tmp_path)
    generator = cmd_jax.load(tmp_path)
    assert generator([3, 1]).shape == (2, 4, 16, 24, 3)
    assert len(generator.class_names) == 10 and generator.stable_diffusion.unet is None
    with pytest.raises(UserError, match='not conditioned on text'):
        generator(prompt='a three')
    with pytest.raises(UserError, match='run on text'):
        generator.export(tmp_path / 'out')
