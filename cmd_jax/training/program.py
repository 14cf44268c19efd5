"""The update of a stage as a program: its shapes and layouts, before any array exists.

What runs, and what `compile_for` compiles for machines that are not here, is made here.
"""

import dataclasses
import functools
import typing
from collections.abc import Callable

import jax
from flax import nnx

from cmd_jax.models import flops
from cmd_jax.parallel.mesh import batch_sharding, replicated
from cmd_jax.training import state as states
from cmd_jax.training.stacks import Stacks
from cmd_jax.training.stages import Stage


@dataclasses.dataclass(frozen=True)
class Program:
    """The update of a stage.

    Attributes:
      stage: see `stages`.
      stacks: the form of the network's parameters in the state.
      abstract: shapes and layouts of the train state.
      init: (key, start) -> initial state.
      gradient: (params, frozen, batch, key, step) -> (gradient, metrics), of stacks.
      step: jitted (state, frozen, batch, key) -> (state, metrics); the state is donated.
    """

    stage: Stage
    stacks: Stacks
    abstract: states.TrainState
    init: Callable
    gradient: Callable
    step: typing.Any

    def flops(self, frozen: dict, batch: dict) -> float:
        """Model FLOPs of an update: the trained network's forward pass three times, what the frozen
        ones do once. LPIPS counts as part of the network; recomputation is not counted."""

        def keys(batch):
            return states.example_keys(jax.random.key(0), batch)

        def forward(params, frozen, batch):
            model = nnx.merge(self.stacks.graphdef, params)
            return self.stage.loss(model, frozen, batch, keys(batch))[0]

        def frozen_pass(frozen, batch):
            return self.stage.frozen_pass(frozen, batch, keys(batch))

        whole = flops.count(forward, self.stacks.params, frozen, batch).flops
        fixed = flops.count(frozen_pass, frozen, batch).flops
        return 3.0 * whole - 2.0 * fixed


def make(stage: Stage) -> Program:
    """The program of a stage; to be called with its mesh set."""
    settings, tx = stage.train, states.optimizer(stage.train)
    stacks, abstract, init = states.prepare(stage.make_model, tx, stage.mesh)
    about = dict(loss=stage.loss, accumulation=stage.accumulation)
    update = dict(stacks=stacks, tx=tx, ema_decay=settings.ema_decay)
    step = jax.jit(
        functools.partial(states.train_step, **update, **about),
        donate_argnames='state',
        out_shardings=(jax.tree.map(lambda x: x.sharding, abstract), replicated(stage.mesh)),
        compiler_options=compiler_options(stage.mesh),
    )
    gradient = functools.partial(states.gradient, stacks=stacks, **about)
    return Program(stage, stacks, abstract, init, gradient, step)


def compiler_options(mesh) -> dict[str, str]:
    """Of steps for the devices of a mesh."""
    if mesh.devices.flat[0].platform != 'tpu':
        return {}
    # Or the TPU compiler would multiply with one chip's part of a kernel at a time while the next
    # one is on its way, and go through the whole activation with each.
    return {'xla_jf_spmd_threshold_for_windowed_einsum_mib': '1000000'}


def abstract_batch(shapes: dict, mesh) -> dict:
    """ShapeDtypeStructs of a batch, from {name: (shape, dtype)}."""
    sharding = batch_sharding(mesh)
    return {k: jax.ShapeDtypeStruct(*x, sharding=sharding) for k, x in shapes.items()}


def abstract_key(mesh) -> jax.ShapeDtypeStruct:
    """The run's key."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct((), key.dtype, sharding=replicated(mesh))
