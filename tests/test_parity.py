"""cmd_jax against diffusers and torch, which are imported when the first of these tests runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax.diffusion import Process, guide, timesteps
from cmd_jax.models.dit import grid_positions
from tests import reference_cases as cases

pytestmark = pytest.mark.parity


@pytest.fixture(scope='module')
def reference():
    from tests import make_goldens

    return make_goldens


def check(ours, theirs, tolerance, scale=None):
    """The largest difference, relative to the largest value; `pytest -m parity -s` shows it."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    error = np.abs(ours - theirs).max() / (scale or np.abs(theirs).max())
    print(f' error {error:.1e}', end='')
    assert error < tolerance


@pytest.mark.parametrize('schedule', cases.SCHEDULES)
def test_schedule(reference, schedule):
    process = Process(schedule=schedule)
    theirs = reference.scheduler(reference.diffusers.DDIMScheduler, process, {})
    for name in ('betas', 'alphas_cumprod'):
        check(getattr(process, name), getattr(theirs, name), 1e-6, scale=1)


@pytest.mark.parametrize('spacing', ['leading', 'trailing', 'linspace'])
def test_timesteps(reference, spacing):
    process = Process()
    for steps in range(1, 1001):
        options = dict(spacing=spacing, offset=int(spacing == 'leading' and steps <= 500))
        theirs = reference.scheduler(reference.diffusers.DDIMScheduler, process, options)
        theirs.set_timesteps(steps)
        # diffusers' trailing timesteps sometimes have one too many, -1 (61 steps).
        theirs = theirs.timesteps[:steps]
        np.testing.assert_array_equal(timesteps(process, steps, **options), theirs)


@pytest.mark.parametrize('process, options', cases.DDIM_CASES)
def test_ddim(reference, process, options):
    ours, theirs = cases.toy_sample(process, options), reference.ddim(process, options)
    check(ours, theirs, 1e-4)


@pytest.mark.parametrize('process, options', cases.MULTISTEP_CASES)
def test_multistep(reference, process, options):
    ours, theirs = cases.toy_sample(process, options), reference.multistep(process, options)
    check(ours, theirs, 1e-4)


@pytest.mark.parametrize('spacing', ['leading', 'trailing', 'linspace'])
@pytest.mark.parametrize('sampler', ['dpmpp_2m', 'unipc'])
def test_timesteps_of_multistep(reference, sampler, spacing):
    process = Process()
    for steps in range(1, 500):
        options = dict(spacing=spacing, offset=int(spacing == 'leading'), steps=steps)
        theirs = reference.multistep_timesteps(process, options | {'sampler': sampler})
        del options['steps']
        ours = timesteps(process, steps, **options, sampler=sampler)
        np.testing.assert_array_equal(ours, theirs[:steps])


@pytest.mark.parametrize('rescale', [0.3, 0.7, 1.0])
def test_guidance_rescale(reference, rescale):
    conditional, null = cases.draw((2, 4, 4, 3)), cases.draw((2, 4, 4, 3), 1)
    denoise = guide(
        lambda x, t, which: jnp.where(which[:, None, None, None], conditional[0], null[0]),
        *(jnp.array([True]), jnp.array([False]), 5.0),
        learn_sigma=False,
        rescale=rescale,
    )
    ours = denoise(jnp.zeros((1, 4, 4, 3)), jnp.zeros(1))
    check(ours, reference.rescaled(conditional[:1], null[:1], 5.0, rescale), 1e-5)


@pytest.mark.parametrize('eta', [0.5, 1.0])
def test_ddim_with_noise(reference, eta):
    keys = jax.random.split(jax.random.key(0), cases.SHAPE[0])
    process, options = Process(), dict(steps=20, eta=eta)
    ours = cases.toy_sample(process, options | dict(key=keys))
    theirs = reference.ddim(process, options, keys)
    check(ours, theirs, 1e-4)


@pytest.mark.parametrize(
    'learn_sigma, options',
    [
        (False, dict()),
        (False, dict(spacing='trailing')),
        (False, dict(spacing='linspace', clip=1.0)),
        # With learned sigma diffusers adds noise to the result where the last timestep is not 0.
        (True, dict()),
        (True, dict(spacing='linspace')),
        (True, dict(clip=1.0, steps=23)),
    ],
)
def test_ddpm(reference, learn_sigma, options):
    keys = jax.random.split(jax.random.key(0), cases.SHAPE[0])
    process, options = Process(learn_sigma=learn_sigma), dict(steps=20) | options
    ours = cases.toy_sample(process, options | dict(sampler='ddpm', key=keys))
    theirs = reference.ddpm(process, options, keys)
    check(ours, theirs, 1e-4)


@pytest.mark.parametrize('variance', ['fixed_small', 'learned_range'])
@pytest.mark.parametrize('schedule', cases.SCHEDULES)
def test_posterior(reference, schedule, variance):
    """Mean and variance of one training step of DDPM."""
    torch = reference.torch
    process = Process(schedule=schedule)
    theirs = reference.scheduler(
        reference.diffusers.DDPMScheduler, process, {}, variance_type=variance
    )
    x_t, prediction, s = cases.draw((3, 5, 2))
    for t in (1, 2, 50, 500, 998):
        # Where its noise is 0 the step returns the mean, where it is 1 the deviation too.
        ts = jnp.full(5, t)
        output = torch.from_numpy(np.concatenate([prediction, s], 1))
        output = output if variance == 'learned_range' else output[:, :2]
        out = []
        for value in (0.0, 1.0):
            noise = torch.full((5, 2), value)
            with reference.mock.patch.object(
                reference.scheduling_ddpm, 'randn_tensor', lambda *_, n=noise, **__: n
            ):
                out.append(theirs.step(output, t, torch.from_numpy(x_t)).prev_sample.numpy())
        x_0 = process.to_x_0(jnp.asarray(prediction), jnp.asarray(x_t), ts)
        mean, log_variance = process.posterior(x_0, jnp.asarray(x_t), ts)
        if variance == 'learned_range':
            log_variance = process.log_variance(jnp.asarray(s), ts)
        std = np.broadcast_to(np.exp(0.5 * log_variance), s.shape)
        check(mean, out[0], 1e-4)
        check(std, out[1] - out[0], 1e-3)


def test_positions(reference):
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    theirs = get_2d_sincos_pos_embed(64, 8, base_size=8, output_type='pt').numpy()
    check(grid_positions(8, 8, 64), theirs, 1e-6)


def test_content_dit(reference):
    params = cases.dit_params()
    ours, theirs = cases.dit_output(params), reference.dit(params)
    check(ours, theirs, 1e-4)
    # The copied weights matter: each example and each half of the channels has its own values.
    assert theirs.std((1, 2)).min() > 0.01
