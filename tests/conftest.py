"""Every test sees eight simulated CPU devices, and checks the shapes that signatures promise."""

import atexit
import json
import logging
import os
import shutil
import tempfile

import jax
import jaxtyping
import pytest

from tests import typecheck

# Tests compile more than they compute. Subprocesses inherit this, too.
os.environ['XLA_FLAGS'] = (
    f'{os.environ.get("XLA_FLAGS", "")} --xla_backend_optimization_level=0'.strip()
)

# What one worker or subprocess has compiled, no other compiles again, however small. The first
# process to come here makes the folder, the others inherit its environment.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    cache = os.environ['JAX_COMPILATION_CACHE_DIR'] = tempfile.mkdtemp(prefix='cmd_jax_tests_')
    os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
    jax.config.update('jax_compilation_cache_dir', cache)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
    atexit.register(shutil.rmtree, cache, ignore_errors=True)

# Begun first, so that none of them is left to one worker at the end.
LONGEST = (
    'test_processes',
    'test_text_to_video',
    'test_latents',
    'test_generate',
    'test_evaluation',
    'test_divergence',
    'test_moving_digits',
    'test_training',
    'test_benchmarks',
    'test_import_run',
    'test_notebook',
    'test_stable_diffusion',
    'test_stable_diffusion_parity',
    'test_resume',
    'test_i3d',
)

jax.config.update('jax_num_cpu_devices', 8)
# Before the first import of the package.
jaxtyping.install_import_hook('cmd_jax', f'{typecheck.__name__}.{typecheck.check.__name__}')

from cmd_jax.parallel import xla_flags  # noqa: E402  behind the hook

# Programs are those that users run.
xla_flags.set_options()


def pytest_collection_modifyitems(items):
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture
def unchecked_types():
    """For tests of what a wrong argument meets where nothing checks signatures: at a user's."""
    jaxtyping.config.update('jaxtyping_disable', True)
    yield
    jaxtyping.config.update('jaxtyping_disable', False)


@pytest.fixture
def log(caplog, monkeypatch):
    """Messages of absl, which keeps them from the root logger."""
    from cmd_jax.data import videos

    monkeypatch.setattr(logging.getLogger('absl'), 'propagate', True)
    videos.log_once.cache_clear()
    caplog.set_level('INFO', 'absl')
    return caplog


@pytest.fixture(scope='session')
def small_pipeline(tmp_path_factory):
    """A small Stable Diffusion folder, all of its weights random."""
    # Not before the import hook.
    from cmd_jax.stable_diffusion import make, make_vae

    path = tmp_path_factory.mktemp('sd') / 'tiny'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_vae, 'train', lambda vae, steps, seed: vae)
        make.make(path, 'tiny')
    return path


@pytest.fixture(scope='session')
def clip_folder(small_pipeline, tmp_path_factory):
    """A whole CLIP model with random weights, made of the small pipeline's text encoder."""
    import jax.numpy as jnp
    import safetensors.numpy

    from cmd_jax.evaluation.networks import clip
    from cmd_jax.stable_diffusion import weights

    sizes = dict(dim=24, depth=2, heads=4, hidden=40)
    path = tmp_path_factory.mktemp('clip')
    part = small_pipeline / 'text_encoder'
    text = json.loads((part / 'config.json').read_text())
    vision = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40)
    vision |= dict(image_size=32, patch_size=8)
    tree = dict(model_type='clip', text_config=text, vision_config=vision, projection_dim=12)
    (path / 'config.json').write_text(json.dumps(tree))
    for file in (small_pipeline / 'tokenizer').iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    network = weights.abstract(
        clip.ImageEncoder, size=32, patch=8, projected=12, text_dim=text['hidden_size'], **sizes
    )
    network = jax.tree.map(
        lambda x: 0.2 * jax.random.normal(jax.random.key(x.size), x.shape, jnp.float32), network
    )
    weights.save(network, path / 'model.safetensors')
    tensors = safetensors.numpy.load_file(path / 'model.safetensors')
    tensors |= safetensors.numpy.load_file(part / 'model.safetensors')
    safetensors.numpy.save_file(tensors, path / 'model.safetensors')
    return path


@pytest.fixture(scope='session')
def digits_run(tmp_path_factory):
    """A trained run of digits, 4 x 16 x 16."""
    from cmd_jax.training import config, loop
    from tests import tiny

    workdir = tmp_path_factory.mktemp('digits') / 'run'
    loop.train(config.parse(tiny.tree()), workdir)
    return workdir


@pytest.fixture(scope='session')
def generator(digits_run):
    import cmd_jax

    return cmd_jax.load(digits_run)


@pytest.fixture
def not_decoded(monkeypatch):
    """No real clip may be asked for."""
    from cmd_jax.evaluation import real_clips

    monkeypatch.setattr(real_clips.RealClips, '__iter__', lambda _: pytest.fail('decoded'))
