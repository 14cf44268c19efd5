"""The diffusion process: schedules, targets and losses, all in float32.

With abar_t the cumulative product of 1 - beta_t, t = 0 .. steps - 1:

    alpha_t = sqrt(abar_t),  sigma_t = sqrt(1 - abar_t)                                          (1)
    x_t = alpha_t x_0 + sigma_t noise                          (DDPM, Ho et al. 2020, eq. 4)     (2)
    v_t = alpha_t noise - sigma_t x_0                          (Salimans and Ho 2022, app. D)    (3)
    x_0 = alpha_t x_t - sigma_t v_t                                                              (4)
    noise = sigma_t x_t + alpha_t v_t                                                            (5)
    q(x_{t-1} | x_t, x_0) = N(a_t x_0 + b_t x_t, betatilde_t)  (DDPM, eq. 6 and 7)               (6)
      a_t = sqrt(abar_{t-1}) beta_t / (1 - abar_t)
      b_t = sqrt(1 - beta_t) (1 - abar_{t-1}) / (1 - abar_t)
      betatilde_t = beta_t (1 - abar_{t-1}) / (1 - abar_t)
    log sigma^2 = u log beta_t + (1 - u) log betatilde_t      (Nichol and Dhariwal 2021, eq. 15) (7)
      with u = (s + 1) / 2 for the network's variance output s
    L_hybrid = L_simple + steps / 1000 * L_vb                  (same, eq. 16: lambda = 0.001)    (8)
      with L_vb the mean over timesteps and dimensions, in bits
    min-SNR weight: min(snr, gamma) / snr for epsilon, / (snr + 1) for v (Hang et al. 2023)      (9)
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cmd_jax.errors import UserError

SCHEDULES = ('linear', 'scaled_linear', 'cosine')
PREDICTIONS = ('epsilon', 'v')
# (first beta, last beta); None: the schedule has no such parameters.
BETAS = {'linear': (1e-4, 0.02), 'scaled_linear': (0.00085, 0.012), 'cosine': (None, None)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Process:
    """A discrete diffusion process and what its network predicts.

    Attributes:
      schedule: 'linear' (DDPM), 'scaled_linear' (linear in sqrt(beta): Stable Diffusion) or
        'cosine' (Nichol and Dhariwal 2021).
      prediction: 'epsilon' or 'v'.
      learn_sigma: whether the network's last axis holds variance channels behind the prediction.
      steps: number of training timesteps.
      beta_start, beta_end: None takes the schedule's usual values (BETAS).
    """

    schedule: str = 'linear'
    prediction: str = 'epsilon'
    learn_sigma: bool = False
    steps: int = 1000
    beta_start: float | None = None
    beta_end: float | None = None

    def __post_init__(self):
        for name, value, known in (
            ('schedule', self.schedule, SCHEDULES),
            ('prediction', self.prediction, PREDICTIONS),
        ):
            if value not in known:
                raise UserError(f'{name}={value!r} is unknown: choose one of {", ".join(known)}')
        if self.steps < 2:
            raise UserError(f'steps={self.steps} is out of range: choose 2 or more')
        for name, beta in (('beta_start', self.beta_start), ('beta_end', self.beta_end)):
            if beta is not None and not 0 < beta < 1:
                raise UserError(f'{name}={beta} is out of range: choose one between 0 and 1')
        if self.schedule == 'cosine' and (self.beta_start, self.beta_end) != (None, None):
            raise UserError('beta_start and beta_end have no meaning with schedule=cosine')

    @functools.cached_property
    def betas(self) -> np.ndarray:
        """[steps], float64."""
        first, last = BETAS[self.schedule]
        first = first if self.beta_start is None else self.beta_start
        last = last if self.beta_end is None else self.beta_end
        if self.schedule == 'linear':
            return np.linspace(first, last, self.steps)
        if self.schedule == 'scaled_linear':
            return np.linspace(first**0.5, last**0.5, self.steps) ** 2
        abar = np.cos((np.arange(self.steps + 1) / self.steps + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - abar[1:] / abar[:-1], 0.999)

    @functools.cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """abar_t, [steps], float64."""
        return np.cumprod(1 - self.betas)

    def alpha_sigma(self, t: Int[Array, 'b'], ndim: int) -> tuple[Array, Array]:
        """alpha_t and sigma_t (1), with trailing axes to broadcast against `ndim` dimensions."""
        alpha = at(np.sqrt(self.alphas_cumprod), t, ndim)
        return alpha, at(np.sqrt(1 - self.alphas_cumprod), t, ndim)

    def add_noise(
        self, x_0: Float[Array, 'b *s'], noise: Float[Array, 'b *s'], t: Int[Array, 'b']
    ) -> Float[Array, 'b *s']:
        """x_t (2)."""
        alpha, sigma = self.alpha_sigma(t, x_0.ndim)
        return alpha * x_0 + sigma * noise

    def target(self, x_0: Array, noise: Array, t: Int[Array, 'b']) -> Array:
        """What the network should predict: the noise, or v (3)."""
        if self.prediction == 'epsilon':
            return noise
        alpha, sigma = self.alpha_sigma(t, x_0.ndim)
        return alpha * noise - sigma * x_0

    def split(self, output: Array) -> tuple[Array, Array | None]:
        """The network's output as (prediction, variance channels or None)."""
        return tuple(jnp.split(output, 2, axis=-1)) if self.learn_sigma else (output, None)

    def to_x_0(self, prediction: Array, x_t: Array, t: Int[Array, 'b']) -> Array:
        """x_0 from the prediction: (2) solved for x_0, or (4)."""
        alpha, sigma = self.alpha_sigma(t, x_t.ndim)
        if self.prediction == 'epsilon':
            return (x_t - sigma * prediction) / alpha
        return alpha * x_t - sigma * prediction

    def to_noise(self, prediction: Array, x_t: Array, t: Int[Array, 'b']) -> Array:
        """The noise from the prediction: itself, or (5)."""
        if self.prediction == 'epsilon':
            return prediction
        alpha, sigma = self.alpha_sigma(t, x_t.ndim)
        return sigma * x_t + alpha * prediction

    def posterior(self, x_0: Array, x_t: Array, t: Int[Array, 'b']) -> tuple[Array, Array]:
        """Mean and log variance of q(x_{t-1} | x_t, x_0) (6). At t = 0 the variance is 0; its log
        is taken from t = 1, as the learned range (7) needs a finite end."""
        a, b, log_variance = self._posterior_tables
        mean = at(a, t, x_0.ndim) * x_0 + at(b, t, x_0.ndim) * x_t
        return mean, at(log_variance, t, x_0.ndim)

    def log_variance(self, variance: Array, t: Int[Array, 'b']) -> Array:
        """The learned log variance (7)."""
        u = (variance + 1) / 2
        low = at(self._posterior_tables[2], t, variance.ndim)
        return u * at(np.log(self.betas), t, variance.ndim) + (1 - u) * low

    @functools.cached_property
    def _posterior_tables(self):
        abar = self.alphas_cumprod
        before = np.append(1.0, abar[:-1])
        a = np.sqrt(before) * self.betas / (1 - abar)
        b = np.sqrt(1 - self.betas) * (1 - before) / (1 - abar)
        variance = self.betas * (1 - before) / (1 - abar)
        return a, b, np.log(np.append(variance[1:2], variance[1:]))

    def loss(
        self,
        output: Float[Array, 'b *out'],
        x_0: Float[Array, 'b *s'],
        noise: Float[Array, 'b *s'],
        t: Int[Array, 'b'],
        *,
        min_snr: float | None = None,
        discretized: bool = False,
    ) -> dict[str, Float[Array, 'b']]:
        """Losses per example: {'mse'} and, with learned sigma, {'vb'}; their sum is the hybrid (8).

        Args:
          output: what the network returned for x_t = add_noise(x_0, noise, t).
          min_snr: gamma of the min-SNR weighting (9) of 'mse'; None means no weighting.
          discretized: whether x_0 are images of 8 bits in [-1, 1], whose likelihood at t = 0 is
            that of a bin. Otherwise it is the density.
        """
        x_t = self.add_noise(x_0, noise, t)
        prediction, variance = self.split(output)
        mse = mean_of_rest((prediction - self.target(x_0, noise, t)) ** 2)
        if min_snr is not None:
            snr = self.alphas_cumprod / (1 - self.alphas_cumprod)
            norm = snr + 1 if self.prediction == 'v' else snr
            mse = mse * at(np.minimum(snr, min_snr) / norm, t, 1)
        losses = {'mse': mse}
        if self.learn_sigma:
            # The bound trains the variance alone: the mean belongs to the simple loss.
            x_0_hat = self.to_x_0(jax.lax.stop_gradient(prediction), x_t, t)
            mean, log_variance = self.posterior(x_0_hat, x_t, t)[0], self.log_variance(variance, t)
            true_mean, true_log_variance = self.posterior(x_0, x_t, t)
            kl = gaussian_kl(true_mean, true_log_variance, mean, log_variance)
            first = binned_nll if discretized else density_nll
            nll = first(x_0, mean, log_variance)
            vb = jnp.where(t == 0, mean_of_rest(nll), mean_of_rest(kl)) / np.log(2.0)
            losses['vb'] = vb * (self.steps / 1000)
        return losses


def at(table: np.ndarray, t: Int[Array, 'b'], ndim: int) -> Array:
    """table[t] in float32 with trailing axes up to `ndim` dimensions."""
    return jnp.asarray(table, jnp.float32)[t].reshape(t.shape + (1,) * (ndim - 1))


def mean_of_rest(x: Float[Array, 'b *s']) -> Float[Array, 'b']:
    return x.reshape(x.shape[0], -1).mean(-1)


def gaussian_kl(mean1: Array, log_var1: Array, mean2: Array, log_var2: Array) -> Array:
    """KL(N(mean1, var1) || N(mean2, var2)) element by element, in nats."""
    ratio = jnp.exp(log_var1 - log_var2)
    return 0.5 * (log_var2 - log_var1 - 1 + ratio + (mean1 - mean2) ** 2 * jnp.exp(-log_var2))


def density_nll(x: Array, mean: Array, log_var: Array) -> Array:
    """-log N(x; mean, var), in nats."""
    return 0.5 * (np.log(2 * np.pi) + log_var + (x - mean) ** 2 * jnp.exp(-log_var))


def binned_nll(x: Array, mean: Array, log_var: Array) -> Array:
    """-log of the probability of x's bin of width 2/255; the outer bins reach to infinity (DDPM,
    eq. 13)."""
    std = jnp.exp(0.5 * log_var)
    upper = jnp.where(x > 0.999, 1.0, jax.scipy.stats.norm.cdf((x + 1 / 255 - mean) / std))
    lower = jnp.where(x < -0.999, 0.0, jax.scipy.stats.norm.cdf((x - 1 / 255 - mean) / std))
    return -jnp.log(jnp.maximum(upper - lower, 1e-12))
