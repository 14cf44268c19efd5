"""The one training loop of all stages."""

import functools
import json
import signal
import time
from pathlib import Path

import jax
import numpy as np
from absl import logging
from clu import parameter_overview
from flax import nnx

from cmd_jax.cli import Interrupted
from cmd_jax.data import pipeline, sources
from cmd_jax.errors import UserError
from cmd_jax.models import flops
from cmd_jax.parallel.mesh import batch_sharding, make_mesh, replicated
from cmd_jax.training import config as configs
from cmd_jax.training import stages
from cmd_jax.training import state as states
from cmd_jax.training.checkpoint import Checkpoints
from cmd_jax.training.metrics import Metrics, Progress


def train(config: configs.Config, workdir: Path, force_config: bool = False):
    """Trains the stages of `config.stage`, one after the other, each from where it stopped."""
    names = configs.STAGES if config.stage == 'all' else (config.stage,)
    mesh = make_mesh(**vars(config.mesh))
    for name in names:
        states.check_batch(name, getattr(config, name).train, mesh)
    for name in names:
        with jax.set_mesh(mesh):
            train_stage(name, config, Path(workdir), mesh, force_config)


def train_stage(name: str, config: configs.Config, workdir: Path, mesh, force_config: bool):
    """Trains one stage to its last step; resumes from its newest checkpoint, bit for bit."""
    started = time.time()
    folder = workdir / name
    settle_config(name, config, folder, force_config)
    source = make_source(config, 'train')
    class_names = list(source.class_names)
    (folder / 'classes.json').write_text(json.dumps(class_names) + '\n')
    stage = stages.make(name, config, workdir, class_names, mesh)
    settings = stage.train

    dataset = pipeline.make_dataset(
        source,
        settings.batch_size // jax.process_count(),
        seed=config.seed,
        shuffle=True,
        repeat=True,
        workers=config.data.workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    batches = iter(dataset)
    tx = states.optimizer(settings)
    key, init_key = jax.random.split(jax.random.key(config.seed))
    graphdef, state, sharding = states.create(stage.make_model, tx, mesh, init_key)
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
        out_shardings=(sharding, replicated(mesh)),
    )

    with Checkpoints(folder / 'checkpoints', settings.keep_checkpoints) as checkpoints:
        frozen, statistics = stage.frozen, None
        if name == 'motion':
            if checkpoints.latest is None:
                statistics = stages.measure_statistics(
                    frozen['autoencoder'], iter(dataset), config.motion.statistics_clips
                )
            else:
                zero = np.zeros(config.autoencoder.model.motion_channels, np.float32)
                statistics = {'mean': zero, 'std': zero}
            statistics = jax.device_put(statistics, replicated(mesh))
        if checkpoints.latest is not None:
            state, statistics = checkpoints.restore(state, statistics, batches)
            logging.info('%s: going on from step %d', name, int(state.step))
        if statistics:
            frozen = frozen | {'statistics': statistics}
        step = int(state.step)
        if step >= settings.steps:
            logging.info('%s: trained already (%d steps)', name, step)
            return
        describe(name, state, mesh)
        batch = to_device(next(batches), mesh)
        counted = count_flops(graphdef, stage, state, frozen, batch)
        metrics = Metrics(folder, step, config.tensorboard, started)
        progress = Progress(name, step, settings.steps, settings.batch_size, counted)
        preview = functools.partial(write_preview, stage, config, graphdef, folder)

        with Signals() as signals:
            before = None
            while step < settings.steps:
                state, scalars = step_fn(state, frozen, batch, key)
                step += 1
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
                if step % settings.save_every == 0 or last or signals.received:
                    checkpoints.save(state, statistics, batches)
                if signals.received:
                    progress.close()
                    metrics.close()
                    raise Interrupted(f'{name} saved at step {step}')
                if last or (settings.preview_every and step % settings.preview_every == 0):
                    preview(state, frozen, step)
                if not last:
                    batch = to_device(next(batches), mesh)
            check_finite(name, settings, step, before)
        progress.close()
        metrics.close()


def settle_config(name: str, config: configs.Config, folder: Path, force: bool):
    """Stores the config with the run, or compares it with the one stored there."""
    path = folder / 'config.json'
    if path.exists() and not force:
        wrong = configs.differences(name, configs.load(path), config)
        if wrong:
            raise UserError(
                f'{folder} holds a run with another config (stored -> given: {"; ".join(wrong)}): '
                'use another --workdir, or --force_config to go on with the new one'
            )
    try:
        configs.save(config, path)
    except OSError as e:
        raise UserError(f'workdir {folder} cannot be written: {e.strerror}') from e


def make_source(config: configs.Config, split: str):
    """The clips of a split as config.data describes them."""
    options = vars(config.data) | {'split': split, 'seed': config.seed}
    name = options.pop('source')
    options.pop('workers')
    if name != 'folder':
        # Files alone can be short or few.
        options.pop('short'), options.pop('test_fraction')
    return sources.make_source(name, **options)


def to_device(batch: dict, mesh) -> dict:
    """The arrays of a host's batch that losses read, as global arrays over the mesh."""
    sharding = batch_sharding(mesh)
    return {
        k: jax.make_array_from_process_local_data(sharding, batch[k]) for k in ('video', 'label')
    }


def count_flops(graphdef, stage: stages.Stage, state, frozen, batch) -> float:
    """Model FLOPs of an update: the forward pass times three, recomputation not counted."""
    keys = jax.random.split(jax.random.key(0), batch['label'].shape[0])

    def forward(params):
        return stage.loss(nnx.merge(graphdef, params), frozen, batch, keys)[0]

    return 3.0 * flops.count(forward, state.params).flops


def describe(name: str, state, mesh):
    """Logs the parameters with their shardings."""
    table = parameter_overview.get_parameter_overview(state.params, include_stats='sharding')
    logging.info('%s on %s\n%s', name, dict(mesh.shape), table)


def check_finite(name: str, settings: configs.Train, step: int, scalars: dict):
    """Stops a run that has diverged."""
    if int(scalars['nonfinite']) >= settings.max_nonfinite:
        raise UserError(
            f'{name} diverged: {settings.max_nonfinite} updates in a row up to step {step} had a '
            'non-finite loss or gradient and were skipped: lower '
            f'{name}.train.learning_rate={settings.learning_rate} or set {name}.train.clip_norm'
        )


def write_preview(stage: stages.Stage, config, graphdef, folder: Path, state, frozen, step: int):
    """Looks at fixed test clips with the averaged parameters."""
    real, labels = stages.preview_clips(make_source(config, 'test'))
    out = stage.preview(nnx.merge(graphdef, state.ema), frozen, real, labels)
    stages.write_preview(folder / 'previews', step, out)


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
