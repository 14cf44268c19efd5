import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax.diffusion import Process, Sampling, sample, timesteps
from cmd_jax.errors import UserError

MEAN = np.array([0.5, -0.3, 0.2])
COVARIANCE = np.array([[1.0, 0.6, 0.0], [0.6, 0.8, -0.2], [0.0, -0.2, 0.5]])


def normal(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def gaussian_denoiser(p):
    """The exact epsilon or v network of data from N(MEAN, COVARIANCE):

    E[noise | x_t] = sigma_t (alpha_t^2 C + sigma_t^2 1)^-1 (x_t - alpha_t m).
    """
    abar = p.alphas_cumprod[:, None, None]
    gain = np.sqrt(1 - abar) * np.linalg.inv(abar * COVARIANCE + (1 - abar) * np.eye(3))
    gain, alpha = jnp.asarray(gain, jnp.float32), jnp.asarray(np.sqrt(abar[:, 0]), jnp.float32)
    sigma = jnp.asarray(np.sqrt(1 - abar[:, 0]), jnp.float32)

    def denoise(x, t):
        t = t.astype(jnp.int32)
        noise = jnp.einsum('bij,bj->bi', gain[t], x - alpha[t] * MEAN)
        return noise if p.prediction == 'epsilon' else (noise - sigma[t] * x) / alpha[t]

    return denoise


# ---- timesteps -------------------------------------------------------------------------------


def test_timesteps():
    p = Process()
    stable_diffusion = [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]
    assert timesteps(p, 10, 'leading', 1).tolist() == stable_diffusion
    assert timesteps(p, 4, 'leading').tolist() == [750, 500, 250, 0]
    assert timesteps(p, 3, 'leading').tolist() == [666, 333, 0]
    assert timesteps(p, 4, 'trailing').tolist() == [999, 749, 499, 249]
    assert timesteps(p, 3, 'trailing').tolist() == [999, 666, 332]
    assert timesteps(p, 4, 'linspace').tolist() == [999, 666, 333, 0]
    for spacing in ('leading', 'trailing', 'linspace'):
        assert timesteps(p, 1000, spacing).tolist() == list(range(999, -1, -1))
        for steps in (7, 400, 999):
            ts = timesteps(p, steps, spacing)
            assert len(ts) == steps and np.all(np.diff(ts) < 0) and ts[-1] >= 0 and ts[0] <= 999


def test_steps_end_at_the_next_timestep():
    """With noise 0 predicted x_s = x_t alpha_s / alpha_t, and the product telescopes."""
    p = Process()
    abar = p.alphas_cumprod
    for spacing, first in (('leading', 666), ('trailing', 999), ('linspace', 999)):
        for one, last in ((True, 1.0), (False, abar[0])):
            out = sample(
                lambda x, t: jnp.zeros_like(x),
                jnp.ones((2, 1)),
                p,
                steps=3,
                spacing=spacing,
                final_alpha_one=one,
            )
            np.testing.assert_allclose(out, np.sqrt(last / abar[first]), rtol=1e-5)


@pytest.mark.parametrize('spacing, offset', [('leading', 1), ('trailing', 0), ('linspace', 0)])
def test_network_is_given_the_timesteps(spacing, offset):
    p = Process(prediction='v')
    seen = []

    def denoise(x, t):
        jax.debug.callback(lambda t: seen.append(np.asarray(t).tolist()), t, ordered=True)
        return x

    sample(denoise, jnp.ones((2, 1)), p, steps=10, spacing=spacing, offset=offset)
    jax.effects_barrier()
    assert seen == [[t, t] for t in timesteps(p, 10, spacing, offset)]


# ---- samplers --------------------------------------------------------------------------------


def moments_of_affine(run):
    """Mean and covariance of run(x_T) for x_T ~ N(0, 1), where run is affine: no sampling error."""
    out = np.asarray(run(jnp.concatenate([jnp.zeros((1, 3)), jnp.eye(3)])), np.float64)
    matrix = (out[1:] - out[0]).T
    return out[0], matrix @ matrix.T


@pytest.mark.parametrize('spacing', ['leading', 'trailing', 'linspace'])
@pytest.mark.parametrize('prediction', ['epsilon', 'v'])
def test_ddim_recovers_a_gaussian(prediction, spacing):
    """DDIM maps N(0, 1) to the data's Gaussian up to its discretisation, of first order.

    So the error halves with twice the steps, and extrapolation to none leaves what is of second
    order. The mean keeps the shift of x_T, whose mean is 0 and not alpha_T m: below 0.007 |m|.
    """
    p = Process(prediction=prediction)
    denoise = gaussian_denoiser(p)
    (_, rough), (mean, fine) = (
        moments_of_affine(lambda x, n=n: sample(denoise, x, p, steps=n, spacing=spacing))
        for n in (100, 200)
    )
    np.testing.assert_allclose(mean, MEAN, atol=0.007 * np.linalg.norm(MEAN))
    np.testing.assert_allclose(fine, COVARIANCE, atol=4 / 200)
    np.testing.assert_allclose(2 * fine - rough, COVARIANCE, atol=1e-3)


@pytest.mark.parametrize('spacing', ['trailing', 'linspace'])
@pytest.mark.parametrize('prediction', ['epsilon', 'v'])
def test_multistep_samplers_recover_a_gaussian_in_few_steps(prediction, spacing):
    """DDIM's error with as many steps is ten times as large. Of second order: with four times the
    steps a sixteenth is left of UniPC's error; DPM-Solver++ has its last step's as well."""
    p = Process(prediction=prediction)
    denoise = gaussian_denoiser(p)

    def error(sampler, steps):
        options = dict(sampler=sampler, steps=steps, spacing=spacing)
        _, covariance = moments_of_affine(lambda x: sample(denoise, x, p, **options))
        return np.abs(covariance - COVARIANCE).max()

    few = {sampler: error(sampler, 20) for sampler in ('ddim', 'dpmpp_2m', 'unipc')}
    assert few['dpmpp_2m'] < few['ddim'] / 9 and few['unipc'] < few['ddim'] / 9
    assert error('unipc', 80) < few['unipc'] / 16
    assert error('dpmpp_2m', 80) < few['dpmpp_2m'] / 5


@pytest.mark.parametrize('sampler', ['dpmpp_2m', 'unipc'])
def test_multistep_samplers_keep_a_point(sampler):
    """Where the network knows the one datum, every way leads there."""
    p, point = Process(), jnp.array([0.7, -0.4, 0.1])

    def denoise(x, t):
        alpha, sigma = p.alpha_sigma(t.astype(int), x.ndim)
        return (x - alpha * point) / sigma

    for options in (dict(steps=1), dict(steps=7, spacing='leading', offset=1), dict(steps=30)):
        out = sample(denoise, normal(0, (2, 3)), p, sampler=sampler, **options)
        np.testing.assert_allclose(out, [point, point], atol=1e-4)
    # Bounded predictions end within the bounds.
    out = sample(denoise, normal(0, (2, 3)), p, sampler=sampler, steps=9, clip=0.5)
    np.testing.assert_allclose(out, [[0.5, -0.4, 0.1]] * 2, atol=1e-4)


@pytest.mark.parametrize('options', [dict(sampler='ddpm'), dict(eta=0.5)])
def test_noisy_samplers_recover_a_gaussian(options):
    """Within four standard errors of n samples, and 8 / steps for the discretisation."""
    p, n, steps = Process(), 2**15, 200
    key = jax.random.key(0)
    x = sample(gaussian_denoiser(p), normal(0, (n, 3)), p, steps=steps, key=key, **options)
    x = np.asarray(x, np.float64)
    variance = np.diag(COVARIANCE)
    mean_error = np.sqrt(variance / n)
    covariance_error = np.sqrt((np.outer(variance, variance) + COVARIANCE**2) / n)
    shift = 0.007 * np.linalg.norm(MEAN)
    assert np.all(np.abs(x.mean(0) - MEAN) < 4 * mean_error + shift)
    assert np.all(np.abs(np.cov(x.T) - COVARIANCE) < 4 * covariance_error + 8 / steps)


def test_ddim_with_eta_1_is_ddpm():
    """And so recovers a Gaussian as DDPM does."""
    p, x, key = Process(), normal(0, (8, 3)), jax.random.key(1)
    ddpm, ddim, ddim_half = (
        sample(gaussian_denoiser(p), x, p, steps=20, key=key, **options)
        for options in (dict(sampler='ddpm'), dict(eta=1.0), dict(eta=0.5))
    )
    np.testing.assert_allclose(ddim, ddpm, atol=1e-5)
    assert np.abs(ddim_half - ddpm).max() > 0.1


def test_learned_variance_makes_ddpm_exact():
    """With the true variance of x_s given x_t, ten steps of DDPM are exact for a Gaussian.

    Of data N(0, c): Var[x_s | x_t] = betatilde + a^2 c sigma_t^2 / (alpha_t^2 c + sigma_t^2).
    """
    c, n, steps = 0.25, 2**15, 10
    p = Process(learn_sigma=True)
    ts = timesteps(p, steps, 'leading')
    abar, before = p.alphas_cumprod[ts], np.append(p.alphas_cumprod[ts[1:]], 1 - 1e-9)
    beta = 1 - abar / before
    tilde = beta * (1 - before) / (1 - abar)
    a = np.sqrt(before) * beta / (1 - abar)
    variance = tilde + a**2 * c * (1 - abar) / (abar * c + 1 - abar)
    s = 2 * (np.log(variance) - np.log(tilde)) / (np.log(beta) - np.log(tilde)) - 1
    gain = np.sqrt(1 - abar) / (abar * c + 1 - abar)
    rows = [np.zeros(p.steps, np.float32) for _ in range(2)]
    rows[0][ts], rows[1][ts] = gain, s
    gain, s = jnp.asarray(rows)

    def denoise(x, t):
        t = t.astype(jnp.int32)[:, None]
        return jnp.concatenate([gain[t] * x, jnp.broadcast_to(s[t], x.shape)], -1)

    options = dict(sampler='ddpm', steps=steps, key=jax.random.key(0))
    learned = sample(denoise, normal(0, (n, 1)), p, **options)
    assert abs(learned.var() / c - 1) < 4 * np.sqrt(2 / n)
    plain = dataclasses.replace(p, learn_sigma=False)
    fixed = sample(lambda x, t: denoise(x, t)[..., :1], normal(0, (n, 1)), plain, **options)
    assert fixed.var() / c < 0.8


@pytest.mark.parametrize('options', [dict(), dict(sampler='ddpm', clip=1.0)])
def test_v_and_epsilon_give_the_same_trajectory(options):
    epsilon, v = (
        sample(gaussian_denoiser(p), normal(0, (4, 3)), p, key=jax.random.key(2), **options)
        for p in (Process(), Process(prediction='v'))
    )
    np.testing.assert_allclose(epsilon, v, atol=2e-5)


def test_clip():
    """Every step's x_0, and so the result, is bounded; the noise follows the bounded x_0."""
    p = Process()
    x_T = normal(0, (64, 3))
    free, clipped = (sample(gaussian_denoiser(p), x_T, p, clip=clip) for clip in (None, 0.5))
    assert np.abs(free).max() > 1 and np.abs(clipped).max() == 0.5
    inside = sample(gaussian_denoiser(p), x_T, p, clip=100.0)
    np.testing.assert_allclose(inside, free, atol=1e-4)
    # One step from t to the end of abar_0, with x_0 = 3 predicted and 1 allowed.
    alpha, sigma = np.sqrt(p.alphas_cumprod[-1]), np.sqrt(1 - p.alphas_cumprod[-1])
    out = sample(
        lambda x, t: (x - alpha * 3) / sigma,
        jnp.full((1, 1), 0.8),
        p,
        steps=1,
        spacing='trailing',
        clip=1.0,
        final_alpha_one=False,
    )
    noise = (0.8 - alpha) / sigma
    expected = np.sqrt(p.alphas_cumprod[0]) + np.sqrt(1 - p.alphas_cumprod[0]) * noise
    np.testing.assert_allclose(out, expected, rtol=1e-5)


@pytest.mark.parametrize('options', [dict(sampler='ddpm'), dict(eta=0.7)])
def test_examples_have_their_own_noise(options):
    """A batch of four equals four batches of one, and each example's noise differs."""
    p, keys, x_T = Process(), jax.random.split(jax.random.key(0), 4), normal(0, (4, 2, 3))

    @jax.jit
    def run(x, keys):
        return sample(lambda x, t: 0.9 * jnp.sin(x), x, p, steps=10, key=keys, **options)

    together = run(x_T, keys)
    alone = jnp.concatenate([run(x_T[i : i + 1], keys[i : i + 1]) for i in range(4)])
    np.testing.assert_array_equal(together, alone)
    same_start = run(jnp.broadcast_to(x_T[:1], x_T.shape), keys)
    assert len(np.unique(np.asarray(same_start[:, 0, 0]))) == 4
    np.testing.assert_array_equal(run(x_T, jax.random.key(0)), together)


def test_noise_differs_between_steps():
    """Predicting x_0 = 0 with eta 1, the first step's noise must not be drawn a second time."""
    p = Process(prediction='v')
    n = 2**12

    def denoise(x, t):  # v of x_0 = 0
        alpha, sigma = p.alpha_sigma(t.astype(jnp.int32), 2)
        return alpha / sigma * x

    x = sample(
        denoise,
        jnp.zeros((n, 1)),
        p,
        steps=500,
        eta=1.0,
        final_alpha_one=False,
        offset=1,
        key=jax.random.key(0),
    )
    # From x_T = 0: x_s = sqrt(1 - abar_s - std^2) / sigma_t x_t + std z, so variances add.
    abar = p.alphas_cumprod
    variance = 0.0
    ts = timesteps(p, 500, 'leading', 1)
    for t, s in zip(ts, np.append(ts[1:], 0)):
        var = (1 - abar[s]) / (1 - abar[t]) * (1 - abar[t] / abar[s])
        variance = (1 - abar[s] - var) / (1 - abar[t]) * variance + var * (t != ts[-1])
    assert abs(x.var() / variance - 1) < 4 * np.sqrt(2 / n)


def test_ddpm_ends_at_the_data():
    """Whatever abar is behind the last step of DDIM, as in diffusers."""
    p = Process(schedule='scaled_linear')
    noise = jax.random.normal(jax.random.key(0), (1000, 1))

    def exact(x, t):
        alpha, sigma = p.alpha_sigma(t.astype(int), x.ndim)
        return (x - alpha * 0.7) / sigma

    options = dict(sampler='ddpm', steps=50, offset=1, final_alpha_one=False)
    x = sample(exact, noise, p, **options, key=jax.random.key(1))
    np.testing.assert_allclose(x, 0.7, atol=1e-5)


# ---- errors ----------------------------------------------------------------------------------


def draw(**options):
    return sample(lambda x, t: x, jnp.zeros((1, 1)), Process(), **options)


@pytest.mark.parametrize(
    'call, named',
    [
        (lambda: draw(sampler='euler'), "sampler='euler'"),
        (lambda: draw(spacing='middle'), "spacing='middle'"),
        (lambda: draw(steps=0), 'steps=0 '),
        (lambda: draw(steps=1001), 'steps=1001 '),
        (lambda: draw(steps=1000, offset=1), 'offset=1 '),
        (lambda: draw(offset=-1), 'offset=-1 '),
        (lambda: draw(eta=-0.1), 'eta=-0.1'),
        (lambda: draw(eta=1.1), 'eta=1.1'),
        (lambda: draw(sampler='ddpm'), "sampler='ddpm'"),
        (lambda: draw(eta=0.5), 'eta=0.5'),
    ],
)
def test_errors_name_the_value(call, named):
    with pytest.raises(UserError) as error:
        call()
    assert named in str(error.value) and '\n' not in str(error.value)


def test_sampling_that_has_no_meaning():
    p = Process()
    with pytest.raises(UserError, match='guidance_start=0.6, guidance_end=0.5'):
        Sampling(sampler='ddim', steps=5, guidance_start=0.6, guidance_end=0.5)
    half = Sampling(sampler='unipc', steps=5, guidance_start=0.1, guidance_end=0.5)
    assert half.interval(p) == (500.0, 900.0)
    assert Sampling(sampler='unipc', steps=5).interval(p) is None
    for options, said in (
        (dict(guidance=-1.0), 'guidance=-1.0: '),
        (dict(guidance=float('nan')), 'guidance=nan: '),
        (dict(guidance_rescale=7.0), 'guidance_rescale=7.0: choose a number in 0..1'),
    ):
        with pytest.raises(UserError, match=said):
            Sampling(sampler='ddim', steps=5, **options)
    for options, said in (
        (dict(sampler='unipc', eta=0.5), 'eta=0.5 is out of range for unipc: choose 0$'),
        (dict(sampler='dpmpp_2m', steps=1000), r'choose one in 1\.\.999'),
        (dict(sampler='dpmpp'), "did you mean 'dpmpp_2m'|is unknown"),
        (dict(spacing='karras'), "spacing='karras' is unknown"),
    ):
        with pytest.raises(UserError, match=said):
            sample(lambda x, t: x, jnp.ones((1, 3)), p, **options)
