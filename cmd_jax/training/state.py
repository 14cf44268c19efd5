"""The train state and the one update of all stages, pure functions of plain nested dicts."""

import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct

from cmd_jax.models.rngs import make_rngs
from cmd_jax.parallel.mesh import abstract_params, path_name
from cmd_jax.training.config import Train
from cmd_jax.training.stacks import Stacks, is_kernel

Leaf = typing.Any  # jax.Array, jax.ShapeDtypeStruct or jax.sharding.Sharding


@struct.dataclass
class TrainState:
    """What a checkpoint holds; or, of the same form, the shapes or the shardings of it.

    Attributes:
      step: updates tried so far, int32.
      nonfinite: skipped updates since the last good one, int32.
      skipped: skipped updates in all, int32.
      params, ema: nested dicts of float32, stacked (see `stacks`).
      opt_state: optax state of the same form.
    """

    step: Leaf
    nonfinite: Leaf
    skipped: Leaf
    params: dict
    ema: dict
    opt_state: optax.OptState


def learning_rate(config: Train) -> optax.Schedule:
    """Linear warm-up from 0, then constant, or a cosine that ends at 0 with the last step."""
    rest = max(config.steps - config.warmup_steps, 1)
    if config.schedule == 'cosine':
        main = optax.cosine_decay_schedule(config.learning_rate, rest)
    else:
        main = optax.constant_schedule(config.learning_rate)
    if not config.warmup_steps:
        return main
    warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    return optax.join_schedules([warmup, main], [config.warmup_steps])


def optimizer(config: Train) -> optax.GradientTransformation:
    """AdamW (Adam where weight_decay is 0); only kernels decay: of linear layers, convolutions."""

    def kernels(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: is_kernel(path_name(path)), params)

    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    # The warm-up starts with the first step at a rate above 0.
    schedule = learning_rate(config)
    adam = optax.adamw(
        lambda step: schedule(step + 1),
        b1=config.b1,
        b2=config.b2,
        weight_decay=config.weight_decay,
        mask=kernels,
    )
    return optax.chain(*clip, adam)


def prepare(
    make_model: Callable[[nnx.Rngs], nnx.Module],
    tx: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
) -> tuple[Stacks, TrainState, Callable[[jax.Array, dict], TrainState]]:
    """(form of the parameters, the state's shapes and shardings, initial state).

    Nothing is allocated: a run that goes on restores into the shapes. The initial state is made of
    a key and of {path: array}, parameters that do not begin at random. It is made where it will
    lie: no device ever holds the whole of a sharded model.
    """
    stacks = Stacks(nnx.eval_shape(lambda: make_model(make_rngs(0))), mesh)

    def begin(params):
        zero, params = jnp.int32(0), stacks.stack(params)
        return TrainState(zero, zero, zero, params, params, tx.init(params))

    def init(key, start):
        params = nnx.to_pure_dict(nnx.state(make_model(make_rngs(key)), nnx.Param))
        params = jax.tree_util.tree_map_with_path(
            lambda path, x: start.get(path_name(path), x).astype(x.dtype), params
        )
        return begin(params)

    # By their paths: every slot of the optimizer lies like the parameter that it mirrors.
    abstract = abstract_params(jax.eval_shape(begin, stacks.params), mesh)
    sharding = jax.tree.map(lambda x: x.sharding, abstract)
    return stacks, abstract, jax.jit(init, out_shardings=sharding)


def example_keys(key: jax.Array, batch: dict) -> jax.Array:
    """A key for each example, by its place in the batch."""
    return jax.random.split(key, len(batch['place']))[batch['place']]


def gradient(
    params: dict,
    frozen: dict,
    batch: dict,
    key: jax.Array,
    step: jax.Array,
    *,
    stacks: Stacks,
    loss: Callable,
    accumulation: int,
) -> tuple[dict, dict]:
    """(gradient, metrics) of a step. `loss(model, frozen, batch, keys)` -> (scalar, metrics), with
    a key an example. Parameters and gradient are stacks.

    Randomness depends on the run's key, the step and the example's place in the batch alone, not on
    how the batch is split over hosts, devices or accumulation steps.
    """
    keys = example_keys(jax.random.fold_in(key, step), batch)

    def compute(params, batch, keys):
        return loss(nnx.merge(stacks.graphdef, params), frozen, batch, keys)

    def grad(params, batch, keys):
        # Of parameters, then stacked: the gradient of `unstack` would be a sum of sparse stacks.
        of_params = jax.value_and_grad(compute, has_aux=True)
        value, grads = of_params(stacks.unstack(params), batch, keys)
        return value, stacks.stack(grads)

    if accumulation == 1:
        (_, metrics), grads = grad(params, batch, keys)
        return grads, metrics
    # A strided split: every device keeps its own examples, nothing is communicated.
    parts = jax.tree.map(
        lambda x: x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1), (batch, keys)
    )

    def add(total, part):
        (_, metrics), grads = grad(params, *part)
        return jax.tree.map(jnp.add, total, grads), metrics

    zeros = jax.tree.map(jnp.zeros_like, params)
    grads, metrics = jax.lax.scan(add, zeros, parts)
    return jax.tree.map(lambda g: g / accumulation, grads), jax.tree.map(jnp.mean, metrics)


def train_step(
    state: TrainState,
    frozen: dict,
    batch: dict,
    key: jax.Array,
    *,
    stacks: Stacks,
    tx: optax.GradientTransformation,
    ema_decay: float,
    **about,
) -> tuple[TrainState, dict]:
    """One update; `about`: loss and accumulation, see `gradient`. One with a non-finite loss or
    gradient is skipped, and counted."""
    grads, metrics = gradient(state.params, frozen, batch, key, state.step, stacks=stacks, **about)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(metrics['loss']) & jnp.isfinite(grad_norm)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)

    def kept(new, old):
        return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

    params = kept(optax.apply_updates(state.params, updates), state.params)
    opt_state = kept(opt_state, state.opt_state)
    # The average follows fast at first: the first thousand steps would otherwise be noise.
    decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
    # Of the parameters that are kept, or a TPU would write the others, too.
    ema = kept(optax.incremental_update(params, state.ema, 1 - decay), state.ema)
    bad = 1 - finite.astype(jnp.int32)
    state = TrainState(
        state.step + 1, (state.nonfinite + 1) * bad, state.skipped + bad, params, ema, opt_state
    )
    return state, metrics | {
        'grad_norm': grad_norm,
        'nonfinite': state.nonfinite,
        'skipped': state.skipped,
    }
