"""The one training loop of all stages."""

import contextlib
import time
from pathlib import Path

import jax
import numpy as np
from absl import logging
from clu import parameter_overview

from cmd_jax import atomic
from cmd_jax.data import pipeline
from cmd_jax.errors import UserError, writable
from cmd_jax.parallel.distributed import barrier, check_shared, is_main
from cmd_jax.parallel.mesh import batch_ways, make_mesh
from cmd_jax.parallel.placement import batch_share, put_batch
from cmd_jax.parallel.preemption import Deferred
from cmd_jax.training import config as configs
from cmd_jax.training import divergence, frozen, previews, program, stages, trained
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

    Everything that can be wrong with the config, the data and the run is looked for first. Of
    several processes, each reads its share of the batches, and the first one writes.

    Args:
      config: of all stages.
      workdir: the run; a folder that all processes see.
      force_config: go on with a run whose config differs.
      profile: write a profiler trace of five steps of the first process to STAGE/profile.
      dump_hlo: write the compiled step to STAGE/step.hlo.txt.

    Raises:
      UserError: for what the user can mend.
      Interrupted: after Ctrl-C, SIGTERM or a notice of preemption, the state being saved.
    """
    writable('workdir', workdir)
    workdir = Path(workdir)
    names = configs.STAGES if config.stage == 'all' else (config.stage,)
    meshes = {}
    for name in names:
        batch = getattr(config, name).train.batch_size
        meshes[name] = make_mesh(**vars(config.mesh), batch=batch)
        batch_share(meshes[name])
        check_config(name, config, workdir / name, force_config)
    check_shared('workdir', workdir)
    data = stages.load_data(config)
    for name in names:
        stages.check(name, config, len(data.class_names), meshes[name])
        if not (workdir / name / 'inputs.json').exists():
            stages.check_start(name, config, len(data.class_names))
    # Or say now that there are too few.
    counts = {name: getattr(config, name).train.test_clips for name in names}
    clips = previews.clips(data.test, counts)
    with Deferred() as deferred:
        for name in names:
            with jax.set_mesh(meshes[name]):
                train_stage(
                    *(name, config, workdir, meshes[name], data, clips),
                    *(deferred, profile, dump_hlo),
                )
            barrier(f'{name} saved')


def train_stage(
    name: str,
    config: configs.Config,
    workdir: Path,
    mesh,
    data: stages.Data,
    clips: dict,
    deferred: Deferred,
    profile: bool,
    dump_hlo: bool,
):
    """Trains one stage to its last step; resumes from its newest checkpoint, bit for bit.

    `clips`: those of the test split that previews are made of.
    """
    started = time.time()
    folder, main = workdir / name, is_main()
    with contextlib.ExitStack() as stack:
        # Until there is more to save than was read, a request to stop ends it at once.
        with deferred.at_once():
            given = frozen.load(name, config, workdir, data, mesh)
            trained.check_inputs(folder, given.trained_on)
            stage = stages.make(name, config, len(data.class_names), mesh)
            settings, made = stage.train, program.make(stage)
            checkpoints = stack.enter_context(
                Checkpoints(folder / 'checkpoints', settings.keep_checkpoints, settings.keep_every)
            )
            batches = stack.enter_context(contextlib.closing(read(config, stage, data)))
            key, init_key = jax.random.split(jax.random.key(config.seed))
            statistics = frozen.abstract_statistics(config, mesh) if name == 'motion' else None
            if checkpoints.latest is not None:
                state, statistics, position = checkpoints.restore(made.abstract, statistics)
                if position is None:
                    logging.info('%s: no position in the data: from its beginning', folder)
                else:
                    batches.seek(position)
                logging.info('%s: going on from step %d', name, int(state.step))
            else:
                state = made.init(init_key, stage.start())
                if name == 'motion':
                    with contextlib.closing(read(config, stage, data)) as sample:
                        statistics = frozen.measure_statistics(
                            given.networks,
                            sample,
                            config.motion.statistics_clips,
                            config.stable_diffusion.frames_at_once,
                            mesh,
                        )
            if main:
                # From here on the folder is this run's, with what killed processes left in it.
                for place in (folder, folder / 'previews'):
                    atomic.clear(place)
                configs.save(config, folder / 'config.json')
                trained.save_inputs(folder, given.trained_on)
            networks = given.networks | ({'statistics': statistics} if statistics else {})
            step = int(state.step)

            def preview(step, state):
                model, count = made.stacks.network(state.ema), settings.test_clips
                some = {k: x[: max(count, previews.PREVIEWS)] for k, x in clips.items()}
                some = given.inputs(some)
                out, together = previews.make(stage.preview, model, networks, some, mesh)
                if main:
                    where = folder / 'previews'
                    if count:
                        ends = (out[i::together][:count] for i in (0, together - 1))
                        previews.measure(where, step, *ends)
                    # Last: what is looked for is the picture.
                    previews.write(where, step, out[: together * previews.PREVIEWS], together)

            # The process before may have ended between the step's saving and its preview.
            if previews.due(step, settings) and previews.missing(folder / 'previews', step):
                preview(step, state)
            if step >= settings.steps:
                checkpoints.tidy()
                logging.info('%s: trained already (%d steps)', name, step)
                return
            batch = put_batch(given.inputs(next(batches)), mesh)
            counted = made.flops(networks, batch)
            compiled = compile_step(made, state, networks, batch, key, counted)
        if main:
            if dump_hlo:
                atomic.write(folder / 'step.hlo.txt', compiled.as_text())
            metrics = Metrics(folder, step, config.tensorboard, started)
            stack.enter_context(contextlib.closing(metrics))
            progress = Progress(name, step, settings.steps, settings.batch_size, counted)
            stack.enter_context(contextlib.closing(progress))
        if main and profile:
            trace = stack.enter_context(Trace(folder / 'profile', step))

        def settle(step, scalars, batch):
            """Looks at a finished step; gives the updates skipped in a row up to it."""
            nonfinite = int(jax.device_get(scalars['nonfinite']))
            if nonfinite >= settings.max_nonfinite:
                with jax.transfer_guard('allow'):
                    params = made.stacks.unstacked(state.params)
                    found = divergence.dump(folder, made, params, networks, batch, key, step)
                raise UserError(divergence.message(name, settings, *found))
            due = step == 1 or step % settings.log_every == 0 or step == settings.steps
            if main and due:
                told = {k: float(v) for k, v in jax.device_get(scalars).items()}
                progress.update(step)
                # The optimizer does not count what is skipped.
                told['learning_rate'] = float(rates[step - int(told['skipped'])])
                told |= progress.speed(step)
                progress.show(told)
                metrics.write(step, told)
            return nonfinite

        # Ahead: on the devices it would wait behind the step that they work on.
        rates = states.learning_rate(settings)(np.arange(settings.steps + 1))
        rates = np.broadcast_to(rates, settings.steps + 1)
        before, nonfinite = None, int(state.nonfinite)
        # In the loop nothing moves between host and devices but batches and metrics.
        stack.enter_context(jax.transfer_guard('disallow'))
        while step < settings.steps:
            state, scalars = compiled(state, networks, batch, key)
            step += 1
            if main and profile:
                trace.update(step, scalars)
            # The device works on this step while the host looks at the one before.
            if before is not None:
                nonfinite = settle(*before)
            before = step, scalars, batch
            checkpoints.check()
            last, stop = step == settings.steps, deferred.reached()
            look = previews.due(step, settings)
            # What is saved may be left at once, and a preview takes its time.
            save = step % settings.save_every == 0 or last or stop or look
            # What the metrics tell is never behind what is saved; and after what may be the last
            # skipped update allowed, no other one changes the parameters that a dump needs.
            if save or nonfinite + 1 >= settings.max_nonfinite:
                nonfinite = settle(*before)
                before = None
            with jax.transfer_guard('allow'):
                if save:
                    checkpoints.save(state, statistics, batches.position)
                if look or stop:
                    # Who leaves earlier would take the others along.
                    checkpoints.wait()
                    barrier(f'{name} saved at step {step}')
                if look and not stop:
                    # The same command makes the preview that is left.
                    with deferred.at_once():
                        preview(step, state)
            if stop:
                raise deferred.interrupted(f'{name} saved at step {step}')
            if not last:
                batch = put_batch(given.inputs(next(batches)), mesh)


def read(config: configs.Config, stage: stages.Stage, data: stages.Data) -> pipeline.Batches:
    """The shares of the training batches that this process has."""
    index, count = batch_share(stage.mesh)
    return pipeline.Batches(
        data.source,
        stage.train.batch_size,
        seed=config.seed,
        shuffle=True,
        repeat=True,
        workers=config.data.workers,
        process_index=index,
        process_count=count,
        max_bad=config.data.max_bad,
    )


def compile_step(made: program.Program, state, networks: dict, batch: dict, key, counted: float):
    """The step, compiled ahead: what does not fit is told before the first step, and nothing
    compiles a second time. Logs what it costs.

    Raises:
      UserError: it does not fit into the devices' memory.
    """
    name, mesh, started = made.stage.name, made.stage.mesh, time.time()
    try:
        compiled = made.step.lower(state, networks, batch, key).compile()
    except jax.errors.JaxRuntimeError as e:
        if 'RESOURCE_EXHAUSTED' not in str(e):
            raise
        train = made.stage.train
        there = train.batch_size // batch_ways(mesh) // made.stage.accumulation
        remedy = 'take more devices, or a smaller model'
        if there > 1:
            remedy = f'set {name}.train.device_batch={there // 2}, or take more devices'
        raise UserError(
            f'{name}: the step does not fit into the memory of the devices, with {there} examples '
            f'at a time on each ({str(e).splitlines()[0][:200]}): {remedy}'
        ) from e
    table = parameter_overview.get_parameter_overview(made.stacks.params, include_stats='sharding')
    logging.info('%s on %s\n%s', name, dict(mesh.shape), table)
    memory = compiled.memory_analysis()
    logging.info(
        '%s: %.3g model TFLOP a step; %.2f GB of state and batch and %.2f GB of work space on a '
        'device; compiled in %.1f s',
        *(name, counted / 1e12),
        *(memory.argument_size_in_bytes / 1e9, memory.temp_size_in_bytes / 1e9),
        time.time() - started,
    )
    return compiled


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
