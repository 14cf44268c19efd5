"""Every test sees eight simulated CPU devices, and checks the shapes that signatures promise."""

import atexit
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

# What one worker or subprocess has compiled, no other compiles again. The first process to come
# here makes the folder, the others inherit its environment.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    cache = os.environ['JAX_COMPILATION_CACHE_DIR'] = tempfile.mkdtemp(prefix='cmd_jax_tests_')
    jax.config.update('jax_compilation_cache_dir', cache)
    atexit.register(shutil.rmtree, cache, ignore_errors=True)

jax.config.update('jax_num_cpu_devices', 8)
# Before the first import of the package.
jaxtyping.install_import_hook('cmd_jax', f'{typecheck.__name__}.{typecheck.check.__name__}')


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
