"""Importers against the documented arithmetic, re-stated in PyTorch."""

import jax
import numpy as np
import pytest

from cmd_jax import interop
from cmd_jax.errors import UserError
from tests.state_dicts import autoencoder_dict, dit_dict


@pytest.fixture(scope='module')
def reference():
    from tests import torch_reference

    return torch_reference


def draw(*shape, seed=0):
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def check(ours, theirs, tolerance=1e-4):
    theirs = np.asarray(theirs)
    assert ours.shape == theirs.shape
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    print(f' error {error:.1e}', end='')
    assert error < tolerance


@pytest.mark.parity
@pytest.mark.parametrize('output', ['sigmoid', 'linear'])
def test_autoencoder(reference, output):
    state_dict = autoencoder_dict(channels=3 if output == 'sigmoid' else 4)
    sizes = dict(frames=3, height=8, width=16)
    model = interop.load_nvlabs_autoencoder(state_dict, **sizes, output=output)
    video = np.tanh(draw(2, 3, 8, 16, model.channels))
    content, motion, out = reference.autoencoder(state_dict, video, output)
    ours_content, ours_motion = jax.jit(model.encode)(video)
    check(ours_content, content)
    check(ours_motion, motion)
    check(jax.jit(model)(video), out)


@pytest.mark.parity
def test_motion_dit(reference):
    state_dict = dit_dict(channels=5, tokens=2 * 6, content=(8, 3, 4))
    model = interop.load_nvlabs_motion_dit(
        state_dict, frames=4, tokens=12, content_size=(8, 16), heads=6
    )
    z, content = draw(2, 4, 12, 5), draw(2, 8, 16, 3, seed=1)
    t = np.array([4.0, 993.0], np.float32)
    theirs = reference.dit(state_dict, z, t, 6, content=content)
    check(jax.jit(model)(z, t, content), theirs)


@pytest.mark.parity
def test_sizes_of_a_motion_dit_are_read_off(reference):
    state_dict = dit_dict(dim=384, depth=1, channels=8, tokens=64, content=(16, 3, 4))
    model = interop.load_nvlabs_motion_dit(state_dict)
    assert (2 * model.rows, 2 * model.columns) == (16, 16)
    content, z = draw(1, 16, 16, 3), draw(1, 16, 16, 8)
    out = jax.jit(model)(z, np.zeros(1, np.float32), content)
    check(out, reference.dit(state_dict, z, np.zeros(1, np.float32), 6, content=content))


@pytest.mark.parity
@pytest.mark.parametrize('load', [interop.load_dit, interop.load_nvlabs_content_dit])
def test_content_dit(reference, load):
    state_dict = dit_dict(tokens=24, classes=10)
    model = load(state_dict, height=8, width=12, heads=6)
    x, t, label = draw(2, 8, 12, 4), np.array([0.0, 700.0], np.float32), np.array([3, 10])
    check(jax.jit(model)(x, t, label), reference.dit(state_dict, x, t, 6, label=label))
    square = dit_dict(dim=384, depth=1, tokens=16, classes=3)
    assert (load(square).rows, load(square).columns) == (4, 4)


def test_a_motion_latent_of_the_authors_is_ours():
    """A wider than high video: the width part comes first."""
    state_dict = autoencoder_dict()
    model = interop.load_nvlabs_autoencoder(state_dict, frames=2, height=4, width=12)
    assert (model.columns, model.rows) == (3, 1)


def spoiled(state_dict, spoil):
    state_dict = dict(state_dict)
    spoil(state_dict)
    return state_dict


@pytest.mark.parametrize(
    'spoil, words',
    [
        (lambda d: d.pop('to_output.1.bias'), ['1 missing: to_output.1.bias']),
        (lambda d: d.update(extra=np.zeros(3)), ['1 left over: extra']),
        (
            lambda d: d.update({'post_xt.weight': np.zeros((32, 6, 1, 1), np.float32)}),
            ['1 of another shape: post_xt.weight (32, 6, 1, 1)'],
        ),
        (
            lambda d: [d.pop(k) for k in list(d) if k.startswith('decoder.layers')],
            ['36 missing: decoder.layers.0.0.fn.', 'decoder.layers.0.1.fn.proj.bias'],
        ),
        (lambda d: d.pop('to_logit.1.weight'), ['no to_logit.1.weight', 'another network']),
    ],
)
def test_what_does_not_fit_is_listed(spoil, words):
    state_dict = spoiled(autoencoder_dict(), spoil)
    with pytest.raises(UserError) as e:
        interop.load_nvlabs_autoencoder(state_dict, frames=2, height=8, width=8)
    for word in words:
        assert word in str(e.value)
    listed = str(e.value).partition('36 missing: ')[2]
    assert not listed or len(listed.split(', ')) == 10, 'the first ten are named'


def test_heads_of_an_unusual_width():
    with pytest.raises(UserError, match='heads: a network of width 96'):
        interop.load_dit(dit_dict(classes=3))
