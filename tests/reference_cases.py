"""What cmd_jax and diffusers are both given: settings, noise, a toy network and a tiny DiT.

Everything is drawn by numpy's RandomState, whose streams never change.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cmd_jax.diffusion import Process, sample
from cmd_jax.models.content import ContentDiT
from cmd_jax.models.dit import grid_positions

# Ours -> diffusers'.
SCHEDULES = {'linear': 'linear', 'scaled_linear': 'scaled_linear', 'cosine': 'squaredcos_cap_v2'}
TIMES = np.array([0, 1, 10, 100, 500, 900, 998])

# Schedule and options of `sample`. Stable Diffusion has scaled_linear, offset 1 and abar_0 last.
SPACINGS = [
    ('linear', dict(spacing='leading')),
    ('linear', dict(spacing='leading', offset=1)),
    ('scaled_linear', dict(spacing='leading', offset=1, final_alpha_one=False)),
    ('scaled_linear', dict(spacing='leading', final_alpha_one=False)),
    ('linear', dict(spacing='trailing')),
    ('cosine', dict(spacing='leading', clip=1.0)),
]
DDIM_CASES = [
    (Process(schedule=schedule, prediction=prediction), options | clip | dict(steps=steps))
    for (schedule, options), prediction, clip, steps in itertools.product(
        SPACINGS, ('epsilon', 'v'), (dict(), dict(clip=1.0)), (10, 50)
    )
    if 'clip' not in options or clip
]
MULTISTEP_CASES = [
    (Process(schedule=schedule, prediction=prediction), options | dict(sampler=sampler))
    for sampler, schedule, prediction, options in itertools.product(
        ('dpmpp_2m', 'unipc'),
        ('linear', 'scaled_linear', 'cosine'),
        ('epsilon', 'v'),
        [
            dict(steps=10),
            dict(steps=1),
            dict(steps=2, spacing='trailing'),
            dict(steps=15, spacing='leading', offset=1),
            dict(steps=25, spacing='trailing'),
        ],
    )
]
SHAPE = (3, 4, 4, 2)


def draw(shape, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def toy_network(x, t, xp, learn_sigma: bool = False):
    """A nonlinear network of numpy or jax.numpy (`xp`) arrays; x [b h w c], t [b]."""
    t = t.reshape(-1, 1, 1, 1) / 1000
    out = t * x + 0.3 * xp.sin(2 * x[..., ::-1] + 3 * t)
    return xp.concatenate([out, xp.cos(3 * x + t)], axis=-1) if learn_sigma else out


def toy_sample(process: Process, options: dict) -> np.ndarray:
    """Our sampler with the toy network."""
    denoise = functools.partial(toy_network, xp=jnp, learn_sigma=process.learn_sigma)
    return np.asarray(sample(denoise, jnp.asarray(draw(SHAPE)), process, **options))


def step_noise(keys, step: int) -> np.ndarray:
    """The noise that `sample` draws in a step."""
    keys = jax.vmap(lambda key: jax.random.fold_in(key, step))(keys)
    return np.array(jax.vmap(lambda key: jax.random.normal(key, SHAPE[1:]))(keys))


# ---- DiT -------------------------------------------------------------------------------------

DIT = dict(dim=64, depth=2, heads=4, patch=2, channels=4, num_classes=10)
SIZE = 16


def dit_inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, t and label; the last label is the null class."""
    return draw((3, SIZE, SIZE, 4)), np.array([0, 371, 999]), np.array([3, 9, 10])


def dit_params() -> dict:
    """Parameters of ContentDiT(**DIT), none of them zero, as nested dicts of numpy arrays."""
    random = np.random.RandomState(1)
    grid = 2 * [SIZE // DIT['patch']]

    def fill(path, leaf):
        name = path[-1].key
        if name == 'position':
            return grid_positions(*grid, leaf.shape[-1])
        scale = {'embedding': 0.5, 'bias': 0.1}.get(name) or leaf.shape[-2] ** -0.5
        return (scale * random.standard_normal(leaf.shape)).astype(np.float32)

    params = nnx.to_pure_dict(nnx.state(nnx.eval_shape(_dit)))
    return jax.tree_util.tree_map_with_path(fill, params)


def dit_output(params: dict) -> np.ndarray:
    """Our network's output, [3, 16, 16, 8]."""
    x, t, label = map(jnp.asarray, dit_inputs())
    graphdef = nnx.graphdef(nnx.eval_shape(_dit))
    model = nnx.merge(graphdef, jax.tree.map(jnp.asarray, params))
    return np.asarray(jax.jit(model)(x, t.astype(jnp.float32), label))


def _dit() -> ContentDiT:
    return ContentDiT(height=SIZE, width=SIZE, **DIT, rngs=nnx.Rngs(0))


# ---- what is recorded ------------------------------------------------------------------------

GOLDEN_CASES = {
    'epsilon_leading': (Process(), dict(steps=10, clip=1.0)),
    'v_trailing': (Process(prediction='v'), dict(steps=10, spacing='trailing')),
    'stable_diffusion': (
        Process(schedule='scaled_linear'),
        dict(steps=10, offset=1, final_alpha_one=False),
    ),
    'dpmpp_2m': (Process(), dict(sampler='dpmpp_2m', steps=10)),
    'unipc': (Process(prediction='v'), dict(sampler='unipc', steps=10, spacing='trailing')),
}
DIT_PART = np.s_[:, ::5, ::5]
