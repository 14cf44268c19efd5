"""A DiT as the start of training in another setting."""

import numpy as np
import pytest
from flax import nnx

from cmd_jax import interop
from cmd_jax.errors import UserError
from cmd_jax.models.content import ContentDiT
from tests.state_dicts import dit_dict, params

DIT = dit_dict(depth=1, channels=3, tokens=64, classes=10)


def content_dit(**sizes):
    sizes = dict(height=16, width=16, channels=3, patch=2, dim=96, depth=1, heads=6) | sizes
    return ContentDiT(**dict(num_classes=10) | sizes, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    'sizes, left',
    [
        ({}, set()),
        ({'num_classes': 3}, {'label_embed/embedding'}),
        ({'num_classes': 0}, set()),
        ({'height': 8}, {'positions/position'}),
        # As many patches, but of another grid.
        ({'height': 8, 'width': 32}, {'positions/position'}),
        ({'height': 32, 'num_classes': 3}, {'label_embed/embedding', 'positions/position'}),
    ],
)
def test_what_a_start_takes_over(sizes, left):
    network = content_dit(**sizes)
    setting = dict(height=16, width=16, num_classes=10) | sizes
    begun = interop.dit_start(DIT, **setting, heads=6)
    fresh, theirs = params(network), params(interop.load_dit(DIT, heads=6))
    assert fresh.keys() - begun.keys() == left
    assert begun.keys() <= fresh.keys(), 'nothing that the network lacks'
    for name, x in begun.items():
        assert x.shape == fresh[name].shape and x.dtype == np.float32
        np.testing.assert_array_equal(x, theirs[name])
    interop.check_start(begun, nnx.eval_shape(lambda: content_dit(**sizes)))


@pytest.mark.parametrize(
    'sizes, words',
    [
        ({'dim': 48}, 'content.model.dim=48 (the weights: 96)'),
        ({'depth': 2}, 'content.model.depth=2 (the weights: 1)'),
        ({'patch': 4}, 'content.model.patch squared times channels=48 (the weights: 12)'),
        ({'channels': 4}, 'times channels=16 (the weights: 12)'),
        ({'learn_sigma': False}, 'content.process.learn_sigma=False (the weights: True)'),
    ],
)
def test_a_start_for_another_network_is_refused(sizes, words):
    begun = interop.dit_start(DIT, height=16, width=16, num_classes=10, heads=6)
    with pytest.raises(UserError) as e:
        interop.check_start(begun, nnx.eval_shape(lambda: content_dit(**sizes)))
    assert words in str(e.value)


def test_heads_of_a_start():
    """Shapes do not tell them: a network of the width of DiT-S has six."""
    state_dict = dit_dict(dim=384, depth=1, channels=3, tokens=64, classes=10)
    begun = interop.dit_start(state_dict, height=16, width=16, num_classes=10)
    with pytest.raises(UserError, match=r'content.model.heads=4 \(the weights: 6\)'):
        interop.check_start(begun, nnx.eval_shape(lambda: content_dit(dim=384, heads=4)))
    interop.check_start(begun, nnx.eval_shape(lambda: content_dit(dim=384)))
