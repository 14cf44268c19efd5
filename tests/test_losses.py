"""What the losses and the draws hand to the networks."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax import sampling
from cmd_jax.training import config as configs
from cmd_jax.training import loop, losses, parts
from tests import tiny


class Motion:
    """Remembers the content frame that it is given; two tokens of three channels."""

    rows = columns = patch = 2
    channels = 3

    def __call__(self, x, t, content, condition):
        self.content = content
        return jnp.zeros_like(x)

    def null_condition(self, condition):
        return condition


@pytest.fixture
def content():
    return jax.random.uniform(jax.random.key(0), (2, 32, 32, 3), minval=-1.0)


@pytest.mark.parametrize('deviation', [0.0, 0.5])
def test_motion_sees_noisy_content(deviation, content, unchecked_types):
    """In training and in sampling, and not the same noise for two examples."""
    config, keys = tiny.config('motion'), jax.random.split(jax.random.key(1), 2)
    process, label = parts.make_process(config.motion.process), jnp.zeros(2, jnp.int32)
    statistics = {'mean': jnp.zeros(3), 'std': jnp.ones(3)}
    model = Motion()
    batch = {'content': content, 'motion': jnp.zeros((2, 4, 4, 3)), 'label': label}
    loss = losses.motion_loss(process, config.motion.loss, content_noise=deviation)
    loss(model, {'statistics': statistics}, batch, keys)
    seen = [model.content]
    options = parts.sampling_options(dict(content=config, motion=config), False)['motion']
    options['content_noise'] = deviation
    with jax.disable_jit():
        sampling.draw_motion(model, process, keys, content, label, label, statistics, **options)
    seen.append(model.content)
    for found in seen:
        noise = np.asarray(found - content)
        assert noise.std(axis=(1, 2, 3)) == pytest.approx([deviation] * 2, rel=0.05)
        assert not deviation or np.abs(np.corrcoef(*noise.reshape(2, -1))[0, 1]) < 0.1


def test_the_autoencoder_is_trained_on_pixels_and_lpips(tmp_path):
    """As configs/folder.py and configs/ucf101.py have it, on eight devices."""
    tree = tiny.tree('autoencoder')
    weights = dict(l1_weight=4.0, l2_weight=0.5, lpips_weight=2.0)
    tree['autoencoder']['loss'].update(weights)
    tree['autoencoder']['train'].update(steps=2, preview_every=0)
    loop.train(configs.parse(tree), tmp_path)
    lines = (tmp_path / 'autoencoder' / 'metrics.jsonl').read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == 2
    for found in records:
        wanted = sum(weights[f'{name}_weight'] * found[name] for name in ('l1', 'l2', 'lpips'))
        assert found['loss'] == pytest.approx(wanted, rel=1e-5)
        assert 0.1 < found['lpips'] < 2 and found['skipped'] == 0
