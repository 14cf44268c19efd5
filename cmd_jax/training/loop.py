"""The one training loop of all stages."""

import contextlib
import functools
import signal
import time
from pathlib import Path

import jax
from absl import logging
from clu import parameter_overview
from flax import nnx

from cmd_jax.data import pipeline
from cmd_jax.errors import Interrupted, UserError, writable
from cmd_jax.models import flops
from cmd_jax.parallel.mesh import batch_sharding, make_mesh, replicated
from cmd_jax.training import config as configs
from cmd_jax.training import stages, trained
from cmd_jax.training import state as states
from cmd_jax.training.checkpoint import Checkpoints
from cmd_jax.training.metrics import Metrics, Progress, Trace


def train(
    config: configs.Config,
    workdir: str | Path,
    *,
    force_config: bool = False,
    profile: bool = False,
    dump_hlo: bool = False,
):
    """Trains the stages of `config.stage`, one after the other, each from where it stopped.

    Everything that can be wrong with the config, the data and the run is looked for first.

    Args:
      config: of all stages.
      workdir: the run.
      force_config: go on with a run whose config differs.
      profile: write a profiler trace of five steps to STAGE/profile.
      dump_hlo: write the compiled step to STAGE/step.hlo.txt.

    Raises:
      UserError: for what the user can mend.
      Interrupted: after Ctrl-C or SIGTERM, the state being saved.
    """
    if jax.process_count() > 1:
        raise UserError(f'{jax.process_count()} processes: only one is supported so far')
    workdir = Path(workdir)
    names = configs.STAGES if config.stage == 'all' else (config.stage,)
    mesh = make_mesh(**vars(config.mesh))
    for name in names:
        states.check_batch(name, getattr(config, name).train, mesh)
        check_config(name, config, workdir / name, force_config)
    data = stages.load_data(config)
    for name in names:
        stages.check(name, config, len(data.class_names))
    for name in names:
        with jax.set_mesh(mesh):
            train_stage(name, config, workdir, mesh, data, profile, dump_hlo)


def train_stage(
    name: str, config: configs.Config, workdir: Path, mesh, data: stages.Data, profile, dump_hlo
):
    """Trains one stage to its last step; resumes from its newest checkpoint, bit for bit."""
    started = time.time()
    folder = workdir / name
    stage = stages.make(name, config, workdir, data, mesh)
    trained.check_inputs(folder, data.class_names, stage.autoencoder_step)
    settings = stage.train
    read = functools.partial(
        pipeline.Batches,
        data.source,
        settings.batch_size // jax.process_count(),
        seed=config.seed,
        shuffle=True,
        repeat=True,
        workers=config.data.workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        max_bad=config.data.max_bad,
    )
    tx = states.optimizer(settings)
    key, init_key = jax.random.split(jax.random.key(config.seed))
    graphdef, abstract, init = states.prepare(stage.make_model, tx, mesh)
    step_fn = jax.jit(
        functools.partial(
            states.train_step,
            graphdef=graphdef,
            loss=stage.loss,
            tx=tx,
            ema_decay=settings.ema_decay,
            accumulation=settings.accumulation,
        ),
        donate_argnames='state',
        out_shardings=(
            jax.tree.map(lambda x: x.sharding, abstract),
            replicated(mesh),
        ),
    )

    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(
            Checkpoints(folder / 'checkpoints', settings.keep_checkpoints)
        )
        batches = stack.enter_context(contextlib.closing(read()))
        frozen, statistics = stage.frozen, None
        if name == 'motion':
            channels = config.autoencoder.model.motion_channels
            statistics = stages.abstract_statistics(channels, mesh)
        if checkpoints.latest is not None:
            state, statistics = checkpoints.restore(abstract, statistics, batches)
            logging.info('%s: going on from step %d', name, int(state.step))
        else:
            state = init(init_key, stage.start())
            if name == 'motion':
                with contextlib.closing(read()) as sample:
                    statistics = stages.measure_statistics(
                        frozen,
                        sample,
                        config.motion.statistics_clips,
                        config.stable_diffusion.frames_at_once,
                    )
                statistics = jax.device_put(statistics, replicated(mesh))
        # From here on the folder is this run's.
        configs.save(config, folder / 'config.json')
        trained.save_inputs(folder, data.class_names, stage.autoencoder_step)
        if statistics:
            frozen = frozen | {'statistics': statistics}
        step = int(state.step)
        if step >= settings.steps:
            logging.info('%s: trained already (%d steps)', name, step)
            return
        batch = to_device(stage.inputs(next(batches)), mesh)
        counted = count_flops(graphdef, stage, state, frozen, batch)
        # Compiled ahead: what does not fit is told before the first step, and nothing compiles
        # a second time.
        compile_started = time.time()
        compiled = step_fn.lower(state, frozen, batch, key).compile()
        describe(name, state, mesh, counted, compiled, time.time() - compile_started)
        if dump_hlo:
            (folder / 'step.hlo.txt').write_text(compiled.as_text())
        metrics = stack.enter_context(
            contextlib.closing(Metrics(folder, step, config.tensorboard, started))
        )
        progress = stack.enter_context(
            contextlib.closing(Progress(name, step, settings.steps, settings.batch_size, counted))
        )
        signals = stack.enter_context(Signals())
        if profile:
            trace = stack.enter_context(Trace(folder / 'profile', step))

        before = None
        while step < settings.steps:
            state, scalars = compiled(state, frozen, batch, key)
            step += 1
            if profile:
                trace.update(step, scalars)
            # The device works on this step while the host looks at the one before.
            if before is not None:
                check_finite(name, settings, step - 1, before)
            before = scalars
            last = step == settings.steps
            if step == 1 or step % settings.log_every == 0 or last:
                scalars = {k: float(v) for k, v in scalars.items()}
                progress.update(step)
                scalars['learning_rate'] = float(states.learning_rate(settings)(step))
                scalars |= progress.speed(step)
                progress.show(scalars)
                metrics.write(step, scalars)
            stop = signals.received
            if step % settings.save_every == 0 or last or stop:
                checkpoints.save(state, statistics, batches)
            if last or (settings.preview_every and step % settings.preview_every == 0 and not stop):
                model = nnx.merge(graphdef, state.ema)
                out = stage.preview(model, frozen, stage.inputs(data.clips))
                stages.write_preview(folder / 'previews', step, *out)
            if stop or (last and signals.received):
                raise Interrupted(f'{name} saved at step {step}')
            if not last:
                batch = to_device(stage.inputs(next(batches)), mesh)
        check_finite(name, settings, step, before)


def check_config(name: str, config: configs.Config, folder: Path, force: bool):
    """Compares the config with the one that the folder's run has, if there is one."""
    path = folder / 'config.json'
    if path.exists() and not force:
        wrong = configs.differences(name, configs.load(path), config)
        if wrong:
            raise UserError(
                f'{folder} holds a run with another config (stored -> given: {"; ".join(wrong)}): '
                'use another --workdir, or --force_config to go on with the new one'
            )
    writable('workdir', folder)


def to_device(batch: dict, mesh) -> dict:
    """What a host's batch holds for the step, as global arrays over the mesh."""
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, x) for k, x in batch.items()}


def count_flops(graphdef, stage: stages.Stage, state, frozen, batch) -> float:
    """Model FLOPs of an update: the trained network's forward pass three times, what the frozen
    ones do once. LPIPS counts as part of the network; recomputation is not counted."""
    keys = jax.random.split(jax.random.key(0), jax.tree.leaves(batch)[0].shape[0])

    def forward(params):
        return stage.loss(nnx.merge(graphdef, params), frozen, batch, keys)[0]

    whole = flops.count(forward, state.params).flops
    fixed = flops.count(stage.frozen_pass, frozen, batch, keys).flops
    return 3.0 * whole - 2.0 * fixed


def describe(name: str, state, mesh, counted: float, compiled, seconds: float):
    """Logs the parameters with their shardings, and what a step costs."""
    table = parameter_overview.get_parameter_overview(state.params, include_stats='sharding')
    logging.info('%s on %s\n%s', name, dict(mesh.shape), table)
    memory = compiled.memory_analysis()
    logging.info(
        '%s: %.3g model TFLOP a step; %.2f GB of state and batch and %.2f GB of work space on a '
        'device; compiled in %.1f s',
        *(name, counted / 1e12),
        *(memory.argument_size_in_bytes / 1e9, memory.temp_size_in_bytes / 1e9, seconds),
    )


def check_finite(name: str, settings: configs.Train, step: int, scalars: dict):
    """Stops a run that has diverged."""
    if int(scalars['nonfinite']) >= settings.max_nonfinite:
        raise UserError(
            f'{name} diverged: {settings.max_nonfinite} updates in a row up to step {step} had a '
            'non-finite loss or gradient and were skipped: lower '
            f'{name}.train.learning_rate={settings.learning_rate} or set {name}.train.clip_norm'
        )


class Signals:
    """The first Ctrl-C or SIGTERM is noted, the second one acts as usual."""

    def __enter__(self):
        self.received = False
        self.old = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number, frame):
        self.received = True
        logging.warning('stopping: the state is saved after this step (again: stop at once)')
        signal.signal(number, self.old[number])

    def __exit__(self, *_):
        for number, handler in self.old.items():
            signal.signal(number, handler)
