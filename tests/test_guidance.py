import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax.diffusion import Process, guide, sample
from tests.test_samplers import normal


def labelled(channels, learn_sigma):
    """A network on [b 2 3 c] whose output depends on every input, and more with learned sigma."""
    out = 2 * channels if learn_sigma else channels
    weights, table = normal(0, (channels, out)), normal(1, (3, out))

    def network(x, t, label):
        bias = table[label][:, None, None] * (1 + t[:, None, None, None] / 1000)
        return jnp.tanh(x @ weights + bias)

    return network


@pytest.mark.parametrize('channels', [4, 8])
@pytest.mark.parametrize('learn_sigma', [False, True])
def test_guidance(channels, learn_sigma):
    network = labelled(channels, learn_sigma)
    x, t, label, null = (
        normal(2, (2, 2, 3, channels)),
        jnp.ones(2),
        jnp.array([0, 1]),
        jnp.array([2, 2]),
    )
    conditional, unconditional = network(x, t, label), network(x, t, null)
    for scale in (0.0, 2.5):
        out = guide(network, label, null, scale, learn_sigma=learn_sigma)(x, t)
        expected = unconditional + scale * (conditional - unconditional)
        np.testing.assert_allclose(out[..., :channels], expected[..., :channels], atol=1e-6)
        np.testing.assert_allclose(
            out[..., channels:], conditional[..., channels:], rtol=0, atol=1e-6
        )
    # every channel is guided: none equals the conditional branch
    assert np.all(np.abs(out - conditional)[..., :channels].max((0, 1, 2)) > 0.1)

    out = guide(network, label, null, 1.0, learn_sigma=learn_sigma)(x, t)
    np.testing.assert_array_equal(out, conditional)


def test_guidance_of_1_samples_like_none():
    p, network = Process(learn_sigma=True), labelled(4, True)
    x, label = normal(2, (2, 2, 3, 4)), jnp.array([0, 1])
    options = dict(sampler='ddpm', steps=5, key=jax.random.key(0))
    plain = sample(lambda x, t: network(x, t, label), x, p, **options)
    denoise = guide(network, label, jnp.array([2, 2]), 1.0, learn_sigma=True)
    np.testing.assert_array_equal(sample(denoise, x, p, **options), plain)


def test_guidance_takes_trees():
    """Conditions of several arrays, as (content frame, label) of the motion network."""

    def network(x, t, condition):
        frame, label = condition
        return x + frame + label[:, None]

    frame = normal(0, (2, 3))
    x, t = jnp.zeros((2, 3)), jnp.zeros(2)
    null = (frame, jnp.array([0, 0]))
    out = guide(network, (frame, jnp.array([1, 2])), null, 3.0, learn_sigma=False)(x, t)
    np.testing.assert_allclose(out, frame + jnp.array([[3], [6]]), rtol=1e-6)


def test_guidance_within_an_interval():
    """Outside of it the conditional branch runs alone."""
    widths = []

    def network(x, t, label):
        jax.debug.callback(widths.append, len(x))
        return x * label[:, None]

    x, label, null = normal(0, (2, 3)), jnp.array([1.0, 2.0]), jnp.zeros(2)
    denoise = jax.jit(guide(network, label, null, 3.0, learn_sigma=False, interval=(100.0, 900.0)))
    for t, factor, width in ((99, 1, 2), (100, 3, 4), (900, 3, 4), (901, 1, 2)):
        out = denoise(x, jnp.full(2, t, jnp.float32))
        jax.effects_barrier()
        np.testing.assert_allclose(out, factor * x * label[:, None], rtol=1e-6)
        assert widths.pop() == width and not widths


def test_rescaled_guidance_has_the_contrast_of_the_conditional_branch():
    """Of its own prediction; the variance channels stay."""
    x, label = normal(0, (2, 8, 8, 6)), jnp.ones(2)

    def network(x, t, label):
        return x + label[:, None, None, None] * normal(1, x.shape[1:])

    plain, rescaled = (
        guide(network, label, 0 * label, 7.0, learn_sigma=True, rescale=rescale)(x, jnp.zeros(2))
        for rescale in (0.0, 1.0)
    )
    conditional = network(x, None, label)
    deviation = conditional[..., :3].std((1, 2, 3))
    np.testing.assert_allclose(rescaled[..., :3].std((1, 2, 3)), deviation, rtol=1e-4)
    assert np.all(plain[..., :3].std((1, 2, 3)) > 2 * deviation)
    np.testing.assert_allclose(rescaled[..., 3:], conditional[..., 3:], rtol=1e-6)
