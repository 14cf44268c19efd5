import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from cmd_jax.diffusion import Process, process
from cmd_jax.errors import UserError

SCHEDULES = ('linear', 'scaled_linear', 'cosine')


def normal(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


# ---- process ---------------------------------------------------------------------------------


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_schedule(schedule):
    p = Process(schedule=schedule)
    ends = {'linear': (1e-4, 0.02), 'scaled_linear': (0.00085, 0.012)}.get(schedule)
    if ends:
        np.testing.assert_allclose(p.betas[[0, -1]], ends, rtol=1e-12)
    else:  # Nichol and Dhariwal 2021, eq. 17, as far as the cap on beta lets it be
        angle = (np.array([1, 500, 998]) / 1000 + 0.008) / 1.008 * np.pi / 2
        expected = np.cos(angle) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
        np.testing.assert_allclose(p.alphas_cumprod[[0, 499, 997]], expected, rtol=1e-9)
        assert p.betas.max() == 0.999
    assert np.all(np.diff(p.alphas_cumprod) < 0)
    np.testing.assert_allclose(np.prod(1 - p.betas), p.alphas_cumprod[-1], rtol=1e-9)


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_cycle(schedule):
    """x_0 -> x_t -> v -> x_0 and noise, at every timestep."""
    p = Process(schedule=schedule, prediction='v')
    t = jnp.arange(p.steps)
    x_0, noise = normal(0, (p.steps, 2, 3)), normal(1, (p.steps, 2, 3))
    x_t, v = p.add_noise(x_0, noise, t), p.target(x_0, noise, t)
    np.testing.assert_allclose(p.to_x_0(v, x_t, t), x_0, atol=1e-6)
    np.testing.assert_allclose(p.to_noise(v, x_t, t), noise, atol=1e-6)
    np.testing.assert_allclose(x_t**2 + v**2, x_0**2 + noise**2, rtol=1e-5)  # a rotation

    p = dataclasses.replace(p, prediction='epsilon')
    assert p.target(x_0, noise, t) is noise
    assert p.to_noise(noise, x_t, t) is noise
    # Dividing by alpha_t magnifies the rounding of x_t.
    error = np.abs(p.to_x_0(noise, x_t, t) - x_0).max((1, 2))
    assert np.all(error < 2e-6 / np.sqrt(p.alphas_cumprod))


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_posterior_is_product_of_gaussians(schedule):
    """q(x_{t-1} | x_t, x_0) against prior times likelihood on a grid of x_{t-1}."""
    p = Process(schedule=schedule)
    for t in (1, 10, 500, 998):
        x_0, x_t = 0.3, -0.4
        mean, log_variance = p.posterior(*jnp.array([[x_0], [x_t]]), jnp.array([t]))
        mean, std = float(mean[0]), float(np.exp(0.5 * log_variance[0]))
        grid = np.linspace(-8, 8, 4001) * std + mean
        before, beta = p.alphas_cumprod[t - 1], p.betas[t]
        log_density = stats.norm.logpdf(grid, np.sqrt(before) * x_0, np.sqrt(1 - before))
        log_density += stats.norm.logpdf(x_t, np.sqrt(1 - beta) * grid, np.sqrt(beta))
        density = np.exp(log_density - log_density.max())
        density /= density.sum()
        expected_mean = (density * grid).sum()
        expected_std = np.sqrt((density * (grid - expected_mean) ** 2).sum())
        assert abs(mean - expected_mean) < 1e-6 + 1e-4 * std
        assert abs(std / expected_std - 1) < 1e-4


def test_posterior_at_0():
    p = Process()
    x_0, x_t = normal(0, (1, 5)), normal(1, (1, 5))
    mean, log_variance = p.posterior(x_0, x_t, jnp.array([0]))
    np.testing.assert_array_equal(mean, x_0)
    np.testing.assert_array_equal(log_variance, p.posterior(x_0, x_t, jnp.array([1]))[1])


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_log_variance_limits(schedule):
    p = Process(schedule=schedule, learn_sigma=True)
    t = jnp.array([1, 10, 500, 999])
    ones = jnp.ones((4, 2))
    abar, before = p.alphas_cumprod[t], p.alphas_cumprod[t - 1]
    high, low = np.log(p.betas[t]), np.log(p.betas[t] * (1 - before) / (1 - abar))
    np.testing.assert_allclose(p.log_variance(ones, t)[:, 0], high, rtol=1e-5)
    np.testing.assert_allclose(p.log_variance(-ones, t)[:, 0], low, rtol=1e-5)
    np.testing.assert_allclose(p.log_variance(0 * ones, t)[:, 0], (high + low) / 2, rtol=1e-5)


# ---- losses ----------------------------------------------------------------------------------


@pytest.mark.parametrize('prediction', ['epsilon', 'v'])
def test_loss_of_true_posterior(prediction):
    """The exact prediction with the posterior's variance: no error and no divergence."""
    p = Process(prediction=prediction, learn_sigma=True)
    t = jnp.arange(1, p.steps)
    x_0, noise = normal(0, (len(t), 4)), normal(1, (len(t), 4))
    target = p.target(x_0, noise, t)
    losses = p.loss(jnp.concatenate([target, -jnp.ones_like(target)], -1), x_0, noise, t)
    np.testing.assert_array_equal(losses['mse'], 0)
    np.testing.assert_allclose(losses['vb'], 0, atol=1e-6)
    # and one with the other end of the variance: KL of two Gaussians of the same mean, in bits
    ratio = (1 - p.alphas_cumprod[t - 1]) / (1 - p.alphas_cumprod[t])
    losses = p.loss(jnp.concatenate([target, jnp.ones_like(target)], -1), x_0, noise, t)
    expected = 0.5 * (ratio - 1 - np.log(ratio)) / np.log(2)
    np.testing.assert_allclose(losses['vb'], expected, rtol=1e-3, atol=1e-6)


def test_vb_is_per_example_and_scaled():
    """KL with a wrong mean by hand; process.steps / 1000 in front."""
    p = Process(learn_sigma=True, steps=500)
    t = jnp.array([100, 300])
    x_0, noise = normal(0, (2, 3)), normal(1, (2, 3))
    shift = jnp.array([[0.5], [1.0]])
    losses = p.loss(jnp.concatenate([noise + shift, -jnp.ones((2, 3))], -1), x_0, noise, t)
    np.testing.assert_allclose(losses['mse'], [0.25, 1.0], rtol=1e-5)
    abar, before, beta = p.alphas_cumprod[t], p.alphas_cumprod[t - 1], p.betas[t]
    error = np.sqrt(before) * beta / (1 - abar) * np.sqrt(1 - abar) / np.sqrt(abar) * shift[:, 0]
    variance = beta * (1 - before) / (1 - abar)
    expected = 0.5 * error**2 / variance / np.log(2) * 0.5
    np.testing.assert_allclose(losses['vb'], expected, rtol=1e-3)


def test_likelihood_at_0():
    """At t = 0 the bound is -log2 of a bin's probability (images) or of the density."""
    p = Process(learn_sigma=True)
    t = jnp.zeros(1, jnp.int32)
    x_0 = jnp.array([[-1.0, -0.5, 2 * 200 / 255 - 1, 1.0]])
    noise = normal(1, (1, 4))
    wrong, s = noise + 0.5, jnp.array([[-1.0, 0.0, 0.5, 1.0]])
    abar, tilde = p.alphas_cumprod, p.betas[1] * p.betas[0] / (1 - p.alphas_cumprod[1])
    mean = x_0[0] - np.sqrt(1 - abar[0]) / np.sqrt(abar[0]) * 0.5  # a_0 = 1, b_0 = 0
    u = (s[0] + 1) / 2
    std = np.exp(0.5 * (u * np.log(p.betas[0]) + (1 - u) * np.log(tilde)))

    losses = p.loss(jnp.concatenate([wrong, s], -1), x_0, noise, t)
    density = -stats.norm.logpdf(x_0[0], mean, std).mean() / np.log(2)
    np.testing.assert_allclose(losses['vb'], [density], rtol=1e-3)

    losses = p.loss(jnp.concatenate([wrong, s], -1), x_0, noise, t, discretized=True)
    upper = np.where(x_0[0] == 1, 1, stats.norm.cdf(x_0[0] + 1 / 255, mean, std))
    lower = np.where(x_0[0] == -1, 0, stats.norm.cdf(x_0[0] - 1 / 255, mean, std))
    np.testing.assert_allclose(losses['vb'], [-np.log2(upper - lower).mean()], rtol=1e-3)


@pytest.mark.parametrize('mean, std', [(0.0, 0.01), (0.7, 0.3), (-0.99, 0.05), (0.3, 3.0)])
def test_likelihoods_are_normalised(mean, std):
    bins = jnp.arange(256) * 2 / 255 - 1
    log_variance = jnp.full(256, 2 * np.log(std))
    p = np.exp(-process.binned_nll(bins, jnp.full(256, mean), log_variance))
    assert abs(p.sum() - 1) < 1e-5
    x = jnp.linspace(mean - 8 * std, mean + 8 * std, 2001)
    nll = process.density_nll(x, jnp.full_like(x, mean), jnp.full_like(x, 2 * np.log(std)))
    np.testing.assert_allclose(np.exp(-nll), stats.norm.pdf(x, mean, std), rtol=1e-3, atol=1e-6)


def test_vb_trains_the_variance_alone():
    p = Process(learn_sigma=True)
    x_0, noise, t = normal(0, (3, 4)), normal(1, (3, 4)), jnp.array([0, 10, 900])
    output = normal(2, (3, 8))
    for discretized in (False, True):
        x = jnp.clip(x_0, -1, 1) if discretized else x_0

        def total(output, name, x=x, discretized=discretized):
            return p.loss(output, x, noise, t, discretized=discretized)[name].sum()

        grad = jax.jit(jax.grad(total), static_argnums=1)
        vb, mse = grad(output, 'vb'), grad(output, 'mse')
        np.testing.assert_array_equal(vb[:, :4], 0)
        np.testing.assert_array_equal(mse[:, 4:], 0)
        np.testing.assert_allclose(mse[:, :4], (output[:, :4] - noise) / 2, rtol=1e-5)
        if not discretized:  # a bin far off has no gradient
            assert np.all(vb[:, 4:] != 0)


def test_loss_without_sigma_is_the_simple_one():
    losses = Process().loss(jnp.zeros((2, 3)), *normal(0, (2, 2, 3)), jnp.array([0, 7]))
    assert set(losses) == {'mse'}


def test_min_snr_weights():
    """Two steps of beta 0.2 and 0.9 have abar 0.8 and 0.08, snr 4 and 2/23."""
    t, zeros = jnp.array([0, 1]), jnp.zeros((2, 3))
    for prediction, gamma, weights in (
        ('epsilon', 1.0, (1 / 4, 1.0)),
        ('epsilon', 5.0, (1.0, 1.0)),
        ('v', 1.0, (1 / 5, 2 / 25)),
        ('v', 5.0, (4 / 5, 2 / 25)),
    ):
        p = Process(steps=2, beta_start=0.2, beta_end=0.9, prediction=prediction)
        plain = p.loss(zeros + 2, zeros, zeros, t)['mse']
        np.testing.assert_allclose(plain, 4, rtol=1e-6)
        weighted = p.loss(zeros + 2, zeros, zeros, t, min_snr=gamma)['mse']
        np.testing.assert_allclose(weighted / plain, weights, rtol=1e-5)


@pytest.mark.parametrize(
    'call, named',
    [
        (lambda: Process(schedule='cosin'), "schedule='cosin'"),
        (lambda: Process(prediction='x'), "prediction='x'"),
        (lambda: Process(steps=1), 'steps=1 '),
        (lambda: Process(beta_end=1.5), 'beta_end=1.5'),
        (lambda: Process(beta_start=0.0), 'beta_start=0.0'),
        (lambda: Process(schedule='cosine', beta_start=0.1), 'beta_start'),
    ],
)
def test_errors_name_the_value(call, named):
    with pytest.raises(UserError) as error:
        call()
    assert named in str(error.value) and '\n' not in str(error.value)
