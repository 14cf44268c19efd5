"""Samplers: from noise to data in one `lax.scan`.

With the notation of process.py, s < t two timesteps that follow each other and eta in [0, 1]:

    beta = 1 - abar_t / abar_s,  betatilde = beta (1 - abar_s) / (1 - abar_t)                    (1)
    DDIM (Song et al. 2021, arXiv 2010.02502, eq. 12 and 16)
      x_s = alpha_s x_0 + sqrt(1 - abar_s - std^2) noise + std z,  std = eta sqrt(betatilde)     (2)
    DDPM on a subsequence (Nichol and Dhariwal 2021, section 4)
      x_s = a x_0 + b x_t + std z                                                                (3)
      a = alpha_s beta / (1 - abar_t), b = sqrt(1 - beta) (1 - abar_s) / (1 - abar_t)
      std^2: betatilde, or learned: u log beta + (1 - u) log betatilde (process.py, 7)

The last step draws no z. s is the next timestep that is visited. So it is in diffusers'
DDPMScheduler; its DDIMScheduler takes t - floor(steps of training / steps), which is the same for
'leading', and for 'trailing' where steps divides the steps of training.

DPM-Solver++ and UniPC (multistep.py) are of second order, and need fewer steps (docs/speed.md has
what was measured). Their last step always ends at the data, as in diffusers.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cmd_jax.diffusion import multistep
from cmd_jax.diffusion.process import Process
from cmd_jax.errors import UserError

SAMPLERS = ('ddim', 'ddpm', *multistep.MULTISTEP)
SPACINGS = ('leading', 'trailing', 'linspace')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a network is sampled.

    Attributes:
      sampler: of SAMPLERS.
      steps: network evaluations; with guidance of both branches at once.
      spacing: of SPACINGS; '': the sampler's own, see `timesteps`.
      guidance: scale, see `guide`; 1: none.
      guidance_rescale: how much of the contrast that guidance adds is taken away, 0..1.
      guidance_start, guidance_end: the part of the way from noise (0) to data (1) that is guided.
    """

    sampler: str
    steps: int
    spacing: str = ''
    guidance: float = 1.0
    guidance_rescale: float = 0.0
    guidance_start: float = 0.0
    guidance_end: float = 1.0

    def __post_init__(self):
        if not 0 <= self.guidance < math.inf:
            raise UserError(f'guidance={self.guidance}: choose a number from 0 on; 1 is none')
        if not 0 <= self.guidance_rescale <= 1:
            raise UserError(f'guidance_rescale={self.guidance_rescale}: choose a number in 0..1')
        if not 0 <= self.guidance_start <= self.guidance_end <= 1:
            raise UserError(
                f'guidance_start={self.guidance_start}, guidance_end={self.guidance_end}: choose '
                'two numbers in 0..1, the first not larger'
            )

    def interval(self, process: Process) -> tuple[float, float] | None:
        """The timesteps that are guided, as `guide` takes them."""
        if (self.guidance_start, self.guidance_end) == (0, 1):
            return None
        return tuple((1 - x) * process.steps for x in (self.guidance_end, self.guidance_start))


def timesteps(
    process: Process, steps: int, spacing: str = '', offset: int = 0, sampler: str = 'ddim'
) -> Int[np.ndarray, 'steps']:
    """The `steps` timesteps that a sampler visits, from noisy to clean.

    'leading': multiples of floor(process.steps / steps), plus `offset` (Stable Diffusion: 1), which
    the other spacings do not have; 'trailing': ends at the last training step; 'linspace': both
    ends, evenly. The multistep samplers go from the data's side: 'leading' and 'linspace' are those
    of one step more, the cleanest of which is not visited. '': as in diffusers, 'linspace' for
    these, 'leading' for DDIM and DDPM.
    """
    spare = int(sampler in multistep.MULTISTEP)
    spacing = spacing or ('linspace' if spare else 'leading')
    if not 1 <= steps <= process.steps - spare:
        raise UserError(f'steps={steps} is out of range: choose one in 1..{process.steps - spare}')
    if spacing == 'leading':
        ratio = process.steps // (steps + spare)
        ts = (np.arange(spare, steps + spare) * ratio)[::-1] + offset
        if offset < 0 or ts[0] >= process.steps:
            raise UserError(
                f"steps={steps}, spacing='leading', offset={offset} leave the timesteps "
                f'0..{process.steps - 1}: take fewer steps, or another spacing'
            )
        return ts
    if spacing == 'trailing':
        # [:steps] as rounding may make arange longer by one.
        ts = np.arange(process.steps, 0, -process.steps / steps)[:steps]
        return np.round(ts).astype(int) - 1
    if spacing == 'linspace':
        ts = np.round(np.linspace(0, process.steps - 1, steps + spare))[::-1].astype(int)
        return ts[:steps]
    raise UserError(f'spacing={spacing!r} is unknown: choose one of {", ".join(SPACINGS)}')


def sample(
    denoise: Callable[[Float[Array, 'b *s'], Float[Array, 'b']], Array],
    x_T: Float[Array, 'b *s'],
    process: Process,
    *,
    sampler: str = 'ddim',
    steps: int = 50,
    spacing: str = '',
    offset: int = 0,
    eta: float = 0.0,
    clip: float | None = None,
    final_alpha_one: bool = True,
    key: Array | None = None,
) -> Float[Array, 'b *s']:
    """Draws x_0 from noise x_T.

    Args:
      denoise: (x, t [b] float32) -> network output, with variance channels last where the process
        learns sigma.
      x_T: standard normal noise.
      sampler: 'ddim', 'ddpm', 'dpmpp_2m' or 'unipc'.
      steps: number of network evaluations.
      spacing, offset: see `timesteps`.
      eta: noise of DDIM in [0, 1]; 0 is deterministic, 1 has the variance of DDPM.
      clip: bound of |x_0| at every step (1 for pixels), or None. DDIM's noise follows the bounded
        x_0 (diffusers' `use_clipped_model_output=True`).
      final_alpha_one: whether abar is 1 behind the last timestep of DDIM, else it is abar_0
        (diffusers' `set_alpha_to_one=False`, which Stable Diffusion has). Of DDPM it is 1.
      key: typed PRNG keys [b], one an example, so that an example's noise does not depend on the
        batch it is in; or one key. Needed by 'ddpm' and by eta > 0.

    Raises:
      UserError: for an unknown sampler or spacing, steps, offset or eta out of range, or a
        missing key.
    """
    if sampler not in SAMPLERS:
        raise UserError(f'sampler={sampler!r} is unknown: choose one of {", ".join(SAMPLERS)}')
    many = sampler in multistep.MULTISTEP
    if not 0 <= eta <= (0 if many else 1):
        raise UserError(f'eta={eta} is out of range for {sampler}: choose 0{"" if many else "..1"}')
    noisy = sampler == 'ddpm' or eta > 0
    if noisy and key is None:
        raise UserError(f'key is missing: sampler={sampler!r} with eta={eta} draws noise')
    if noisy and key.ndim == 0:
        key = jax.random.split(key, x_T.shape[0])

    ts = timesteps(process, steps, spacing, offset, sampler)
    # In float64: 1 - abar and beta are small differences.
    abar = process.alphas_cumprod
    x_T = x_T.astype(jnp.float32)

    def bounded(x_0):
        return x_0 if clip is None else jnp.clip(x_0, -clip, clip)

    if many:

        def predict(x, t):
            t = jnp.full(x.shape[:1], t)
            prediction = process.split(denoise(x, t.astype(jnp.float32)))[0]
            return bounded(process.to_x_0(prediction, x, t))

        return multistep.solve(predict, x_T, ts, abar[ts], corrected=sampler == 'unipc')

    last = 1.0 if final_alpha_one or sampler == 'ddpm' else abar[0]
    abar_t, abar_s = abar[ts], np.append(abar[ts[1:]], last)
    beta = 1 - abar_t / abar_s
    tilde = beta * (1 - abar_s) / (1 - abar_t)
    rows = dict(
        alpha_s=np.sqrt(abar_s),
        direction=np.sqrt(np.maximum(1 - abar_s - eta**2 * tilde, 0)),
        a=np.sqrt(abar_s) * beta / (1 - abar_t),
        b=np.sqrt(1 - beta) * (1 - abar_s) / (1 - abar_t),
        std=np.sqrt(tilde) * (eta if sampler == 'ddim' else 1),
        log_beta=np.log(np.maximum(beta, 1e-20)),
        log_tilde=np.log(np.maximum(tilde, 1e-20)),
    )
    rows = {name: jnp.asarray(row, jnp.float32) for name, row in rows.items()}
    rows |= dict(t=jnp.asarray(ts, jnp.int32), step=jnp.arange(steps))

    def draw(step):
        keys = jax.vmap(lambda k: jax.random.fold_in(k, step))(key)
        return jax.vmap(lambda k: jax.random.normal(k, x_T.shape[1:]))(keys)

    def body(x, row):
        t = jnp.full(x.shape[:1], row['t'])
        prediction, variance = process.split(denoise(x, t.astype(jnp.float32)))
        x_0, noise = process.to_x_0(prediction, x, t), process.to_noise(prediction, x, t)
        if clip is not None:
            x_0 = bounded(x_0)
            alpha, sigma = process.alpha_sigma(t, x.ndim)
            noise = (x - alpha * x_0) / sigma
        std = row['std']
        if sampler == 'ddim':
            mean = row['alpha_s'] * x_0 + row['direction'] * noise
        else:
            mean = row['a'] * x_0 + row['b'] * x
            if variance is not None:
                u = (variance + 1) / 2
                std = jnp.exp(0.5 * (u * row['log_beta'] + (1 - u) * row['log_tilde']))
        if not noisy:
            return mean, None
        return mean + jnp.where(row['step'] < steps - 1, std, 0) * draw(row['step']), None

    return jax.lax.scan(body, x_T, rows)[0]
