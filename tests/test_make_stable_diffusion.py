import inspect
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from cmd_jax import stable_diffusion
from cmd_jax.data.moving_digits import CLASS_NAMES, DIRECTIONS, MovingDigits
from cmd_jax.errors import UserError
from cmd_jax.models import flops
from cmd_jax.parallel.mesh import make_mesh
from cmd_jax.stable_diffusion import VAE, make_vae, options, weights
from cmd_jax.stable_diffusion.families import FAMILIES
from cmd_jax.stable_diffusion.folder import PARTS
from cmd_jax.stable_diffusion.make import DTYPES, make
from tests.test_stable_diffusion import SD15_TEXT, SD15_UNET

STEPS = 25
NOT_READ = ('self', 'remat', 'dtype', 'rngs')  # arguments that no config.json tells of


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp('made') / 'tiny'
    make(folder, 'tiny', vae_steps=STEPS)
    return folder


@pytest.fixture(scope='module')
def pipeline(tiny):
    return load(tiny)


def load(folder, **kwargs):
    mesh = make_mesh(devices=jax.devices()[:1])
    return stable_diffusion.load(folder, mesh=mesh, **kwargs)


def draw(*shape, seed=0):
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture(scope='module')
def captions():
    """(digit, direction, caption) of each caption of the moving digits."""
    source = MovingDigits('train', frames=1)
    found = {(source[i]['caption'], int(source[i]['label'])) for i in range(1000)}
    assert len(found) == len(CLASS_NAMES) * len(DIRECTIONS)
    return [
        (label, DIRECTIONS.index(caption.split(' moving ')[1]), caption)
        for caption, label in sorted(found)
    ]


def test_tiny_is_small_and_begins_at_zero(pipeline):
    """8 x 8 latents of 32 x 32 frames; multiply-adds count twice."""
    x, t, text = draw(2, 8, 8, 4), jnp.array([3.0, 900.0]), draw(2, 77, 64)
    assert not jax.jit(pipeline.unet)(x, t, text).any()
    assert flops.count(pipeline.unet, x, t, text).flops / 2 < 0.17e9
    frame = jnp.zeros((1, 32, 32, 3))
    assert jax.eval_shape(pipeline.vae.moments, frame)[0].shape == (1, 8, 8, 4)
    assert flops.count(pipeline.vae.moments, frame).flops < 40e6
    assert pipeline.process.schedule == 'scaled_linear' and pipeline.process.beta_end == 0.012


def test_vae_is_trained(pipeline):
    """A few steps beat the best constant image; latents are scaled as Stable Diffusion's are."""
    test = make_vae.frames(MovingDigits('test', frames=1), 0, 64)
    train = make_vae.frames(MovingDigits('train', frames=1), 0, 64)
    mean, _ = jax.jit(pipeline.vae.moments)(test)
    error = np.mean((np.asarray(jax.jit(pipeline.vae.decode)(mean)) - test) ** 2)
    assert error < 0.8 * np.mean((train.mean(0) - test) ** 2)
    mean, log_variance = jax.jit(pipeline.vae.moments)(train)
    latents = mean + np.exp(log_variance / 2) * draw(*mean.shape)
    assert pipeline.vae.scaling_factor == 0.18215
    scaled = pipeline.vae.scaling_factor * latents
    assert np.abs(scaled.mean((0, 1, 2))).max() < 0.1
    assert np.abs(scaled.std((0, 1, 2)) - 1).max() < 0.05


def test_latents_can_be_normalised():
    """Any map of the latents: the same images come back, and both moments are mapped."""
    module = weights.abstract(VAE, block_channels=(8, 8), groups=4, layers=1)
    graphdef, params = nnx.split(module, nnx.Param)
    random = np.random.RandomState(0)
    params = jax.tree.map(lambda x: 0.3 * random.standard_normal(x.shape), params)
    params = jax.tree.map(lambda x: x.astype(np.float32), nnx.to_pure_dict(params))
    images, offset, scale = (
        jnp.asarray(draw(2, 8, 8, 3)),
        draw(4),
        np.array([0.5, 1, 2, 3], np.float32),
    )

    @jax.jit
    def run(params):
        vae = nnx.merge(graphdef, params)
        mean, log_variance = vae.moments(images)
        return mean, log_variance, vae.decode(mean)

    mean, log_variance, decoded = run(params)
    make_vae.normalise(params, jnp.asarray(offset), jnp.asarray(scale))
    mapped, mapped_variance, again = run(params)
    np.testing.assert_allclose(mapped, (mean - offset) / scale, atol=1e-4)
    np.testing.assert_allclose(mapped_variance, log_variance - 2 * np.log(scale), atol=1e-4)
    np.testing.assert_allclose(again, decoded, atol=1e-4 * np.abs(decoded).max())


def test_words_of_captions_are_tokens(pipeline, captions):
    words = {word for *_, caption in captions for word in caption.split()}
    assert len(words) == 18
    for word in words:
        ids = pipeline.tokenizer(word).input_ids
        assert len(ids) == 3, word
    texts = ['a teddy bear, 12 years old!', 'na\u00efve \u4e2d\u6587', 'zebra moves upwards']
    for text in texts:
        ids = pipeline.tokenizer(text).input_ids
        decoded = pipeline.tokenizer.decode(ids, skip_special_tokens=True)
        assert decoded.replace(' ', '') == text.replace(' ', '')
    assert (pipeline.tokenize(['a one'])[0] == pipeline.text_encoder.end).sum() == 77 - 3


def test_captions_are_told_apart(pipeline, captions):
    """A linear probe names digit and direction of captions whose combination it has not seen."""
    digits, directions, texts = zip(*captions)
    ids = pipeline.tokenize(texts)
    hidden, pooled = jax.jit(pipeline.text_encoder)(ids)
    held_out = (np.array(digits) + np.array(directions)) % 4 == 0
    for features in (hidden.mean(1), pooled):
        features = np.asarray(features, np.float64)
        # A condition that hardly differs from caption to caption would be hard to learn from.
        assert features.std(0).mean() > 0.15 * np.sqrt(np.mean(features**2))
        for labels in (digits, directions):
            x, y = features[~held_out], np.eye(10)[list(labels)]
            center, base = x.mean(0), y[~held_out].mean(0)
            x = x - center
            ridge = 1e-4 * np.trace(x.T @ x) / x.shape[1] * np.eye(x.shape[1])
            weights = np.linalg.solve(x.T @ x + ridge, x.T @ (y[~held_out] - base))
            guess = np.argmax((features[held_out] - center) @ weights + base, axis=1)
            np.testing.assert_array_equal(guess, np.array(labels)[held_out])


def test_published_sizes():
    """2.1 is our networks' default, whose parameters test_stable_diffusion counts."""
    others = {'unet': SD15_UNET, 'text_encoder': SD15_TEXT}
    for part, about in PARTS.items():
        signature = inspect.signature(about.module.__init__).parameters.values()
        default = {p.name: p.default for p in signature if p.name not in NOT_READ}
        for family, changes in (('sd21', {}), ('sd15', others.get(part, {}))):
            arguments = getattr(options, part)('config.json', FAMILIES[family][part])
            assert arguments == default | changes, (family, part)


def test_seeds_and_half_precision(tiny, tmp_path, monkeypatch):
    """The same seed gives the same networks, rounded to what the files keep."""
    monkeypatch.setattr(make_vae, 'train', lambda vae, steps, seed: vae)
    make(tmp_path / 'again', 'tiny', dtype='bfloat16')
    make(tmp_path / 'other', 'tiny', seed=1)

    def tensors(folder, name):
        return safetensors.numpy.load_file(folder / name)

    name = 'text_encoder/model.safetensors'
    parts = ('unet', 'text_encoder')
    folders = (tmp_path / 'again', tmp_path / 'other', tiny)
    again, other, first = (load(folder, parts=parts) for folder in folders)
    for part in parts:
        a, b, c = (
            nnx.to_pure_dict(nnx.state(getattr(p, part), nnx.Param)) for p in (again, first, other)
        )
        rounded = jax.tree.map(lambda x: np.asarray(x).astype('bfloat16'), b)
        assert jax.tree.all(jax.tree.map(np.array_equal, a, rounded))
        assert not jax.tree.all(jax.tree.map(np.array_equal, b, c))
    header = (tmp_path / 'again' / name).read_bytes()[:200]
    assert b'"BF16"' in header and b'"F32"' not in header
    assert {x.dtype.name for x in tensors(tmp_path / 'other', name).values()} == {'float32'}


def test_errors(tiny, tmp_path):
    for arguments, words in (
        (dict(family='sdxl'), "--family='sdxl' is unknown: choose from tiny, sd15, sd21"),
        (dict(family='tiny', dtype='int8'), f"--dtype='int8' is unknown: choose from {DTYPES[0]}"),
    ):
        with pytest.raises(UserError) as e:
            make(tmp_path / 'new', **arguments)
        assert words in str(e.value) and not (tmp_path / 'new').exists()
    before = json.loads((tiny / 'model_index.json').read_text())
    with pytest.raises(UserError, match='holds unet already: remove it or choose another'):
        make(tiny, 'sd15')
    assert json.loads((tiny / 'model_index.json').read_text()) == before


def test_nothing_is_left_where_it_fails(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(make_vae, 'train', interrupt)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / 'new', 'tiny')
    assert list((tmp_path / 'new').iterdir()) == []


def test_command_line():
    command = [sys.executable, '-m', 'cmd_jax.stable_diffusion.make', '--family=tiny']
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2
    assert done.stderr == 'error: --out is missing: for example --out=DIR --family=tiny\n'


def test_what_was_not_downloaded_is_not_named(tiny, tmp_path):
    """Such as a safety checker, of which a repository gives the config without the weights."""
    shutil.copytree(tiny, tmp_path / 'with')
    (tmp_path / 'with' / 'safety_checker').mkdir()
    (tmp_path / 'with' / 'safety_checker' / 'config.json').write_text('{}')
    (tmp_path / 'with' / 'feature_extractor').mkdir()
    (tmp_path / 'with' / 'feature_extractor' / 'preprocessor_config.json').write_text('{}')
    index = json.loads((tiny / 'model_index.json').read_text())
    index['safety_checker'] = ['stable_diffusion', 'StableDiffusionSafetyChecker']
    index['feature_extractor'] = ['transformers', 'CLIPImageProcessor']
    index['requires_safety_checker'] = True
    (tmp_path / 'with' / 'model_index.json').write_text(json.dumps(index))
    stable_diffusion.save(load(tmp_path / 'with', parts=('unet',)), tmp_path / 'out')
    saved = json.loads((tmp_path / 'out' / 'model_index.json').read_text())
    index |= {'safety_checker': [None, None], 'requires_safety_checker': False}
    assert saved == index
    assert not (tmp_path / 'out' / 'safety_checker').exists()
    assert (tmp_path / 'out' / 'feature_extractor' / 'preprocessor_config.json').exists()


def test_schedules_of_another_process_are_refused(tiny, tmp_path):
    shutil.copytree(tiny / 'scheduler', tmp_path / 'scheduler')
    path = tmp_path / 'scheduler' / 'scheduler_config.json'
    usual = json.loads(path.read_text())
    assert stable_diffusion.process(tmp_path) == stable_diffusion.process(tiny)
    for change in ({'rescale_betas_zero_snr': True}, {'trained_betas': [0.1, 0.2]}):
        path.write_text(json.dumps(usual | change))
        with pytest.raises(UserError, match=f'{list(change)[0]}=.* is not supported'):
            stable_diffusion.process(tmp_path)


@pytest.mark.parity
def test_diffusers_and_transformers_load_it(tiny, pipeline, tmp_path):
    """As one pipeline; with its zeros filled, each network computes the same there."""
    import diffusers
    import torch

    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tiny)
    assert theirs.unet.config.cross_attention_dim == theirs.text_encoder.config.hidden_size
    assert not diffusers.DDIMScheduler.from_pretrained(tiny, subfolder='scheduler').config[
        'set_alpha_to_one'
    ]
    filled = load(tiny)
    random = np.random.RandomState(0)
    for part in (filled.unet, filled.vae, filled.text_encoder):
        params = nnx.state(part, nnx.Param)
        noisy = jax.tree.map(lambda x: x + 0.02 * random.standard_normal(x.shape), params)
        nnx.update(part, noisy)
    stable_diffusion.save(filled, tmp_path / 'filled')
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / 'filled')

    def check(ours, wanted):
        assert np.abs(np.asarray(ours) - wanted).max() < 1e-4 * np.abs(wanted).max()

    ids = filled.tokenize(['a seven moving up and right', 'a teddy bear'])
    options = dict(padding='max_length', truncation=True, max_length=77)
    wanted = theirs.tokenizer(['a seven moving up and right', 'a teddy bear'], **options).input_ids
    np.testing.assert_array_equal(ids, wanted)
    x, t = draw(2, 8, 8, 4), np.array([3.0, 901.0], np.float32)
    latents = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        text = theirs.text_encoder(torch.from_numpy(ids).long())
        check(jax.jit(filled.text_encoder)(ids)[0], text.last_hidden_state.numpy())
        check(jax.jit(filled.text_encoder)(ids)[1], text.pooler_output.numpy())
        out = theirs.unet(latents, torch.from_numpy(t), text.last_hidden_state).sample
        ours = jax.jit(filled.unet)(x, t, text.last_hidden_state.numpy())
        check(ours, out.numpy().transpose(0, 2, 3, 1))
        decoded = theirs.vae.decode(latents).sample.numpy()
        check(jax.jit(filled.vae.decode)(x), decoded.transpose(0, 2, 3, 1))
