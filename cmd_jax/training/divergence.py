"""What is left of a run that diverged: a dump from which its last step can be run again.

    python -m cmd_jax.training.divergence --dump=RUN/STAGE/diverged/STEP

reads the parameters and the batch of that step, computes loss and gradient anew, and prints the
norms of every layer's parameters and gradient beside those of the time when the run ended. The rest
is the run's: its config, its data and the stages before.

    diverged/STEP/params.safetensors  before the step; skipped updates have not changed them
    diverged/STEP/inputs.npz          the batch, and the statistics of the motion latent
    diverged/STEP/report.json         the step, its metrics, the norms by layer; written last
"""

import dataclasses
import json
import math
import shutil
import zipfile
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors
import safetensors.numpy
from absl import flags

from cmd_jax import atomic, cli
from cmd_jax.errors import UserError
from cmd_jax.parallel.distributed import barrier, is_main
from cmd_jax.parallel.mesh import batch_sharding, make_mesh, path_name, replicated
from cmd_jax.parallel.placement import fetch, put
from cmd_jax.training import config as configs
from cmd_jax.training import frozen, program, stages, trained

SHOWN = 3  # layers in an error message
DAMAGE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)


@dataclasses.dataclass(frozen=True)
class Dump:
    """A step that can be run again.

    Attributes:
      report: see `examine`.
      params: {path: array} before it.
      batch: {name: array}, of all processes.
      statistics: of the motion latent; empty but for the motion stage.
    """

    report: dict
    params: dict[str, np.ndarray]
    batch: dict[str, np.ndarray]
    statistics: dict[str, np.ndarray]


def dump(
    folder: Path,
    made: program.Program,
    params: dict,
    networks: dict,
    batch: dict,
    key: jax.Array,
    step: int,
) -> tuple[Path, dict]:
    """Writes the dump of a step that had a non-finite loss or gradient.

    To be called by all processes, with the mesh set.

    Args:
      folder: of the stage.
      made: its program.
      params: before the step.
      networks, batch, key: what the step read.
      step: number of the update, from 1.

    Returns:
      The folder of the dump, and the report, see `examine`.

    Raises:
      UserError: it cannot be written.
    """
    weights = {path_name(path): fetch(x) for path, x in jax.tree_util.tree_leaves_with_path(params)}
    inputs = {f'batch/{name}': fetch(x) for name, x in batch.items()}
    inputs |= {f'statistics/{k}': fetch(x) for k, x in networks.get('statistics', {}).items()}
    report = examine(made, params, networks, batch, key, step)
    where = folder / 'diverged' / str(step)
    if is_main():
        try:
            # Of an earlier attempt.
            shutil.rmtree(where, ignore_errors=True)
            where.mkdir(parents=True)
            contiguous = {name: np.ascontiguousarray(x) for name, x in weights.items()}
            safetensors.numpy.save_file(contiguous, where / 'params.safetensors')
            np.savez(where / 'inputs.npz', **inputs)
            atomic.write(where / 'report.json', json.dumps(report, indent=1) + '\n')
        except (OSError, UserError, safetensors.SafetensorError) as e:
            raise UserError(
                f'{made.stage.name} diverged at step {step} ({layers_told(report)}), and {where}, '
                f'from which it could be run again, cannot be written ({one_line(e)})'
            ) from e
    # A process that ended now would end this one while it writes.
    barrier('dump of a divergence written')
    return where, report


def examine(made: program.Program, params, networks, batch, key, step: int) -> dict:
    """Computes a step's loss and gradient, and tells of them.

    Returns:
      {'step': int, 'devices': what computed it, 'metrics': {name: number}, 'layers': {name:
      {'parameters': norm, 'gradient': norm}}} of six digits; a number that is not finite is a word.
      Stacked blocks are layers of their own, 'encoder/blocks/0/...'.
    """

    def compute(params, networks, batch, key, step):
        stacked, metrics = made.gradient(made.stacks.stack(params), networks, batch, key, step)
        grads = made.stacks.unstack(stacked)
        # What the update was skipped for: its squares may overflow where no entry does.
        return norms(params), norms(grads), metrics | {'grad_norm': optax.tree.norm(grads)}

    compute = jax.jit(compute, out_shardings=replicated(made.stage.mesh))
    *found, metrics = jax.device_get(compute(params, networks, batch, key, step - 1))
    layers = {}
    for kind, tree in zip(('parameters', 'gradient'), found, strict=True):
        for path, x in jax.tree_util.tree_leaves_with_path(tree):
            layer = path_name(path).rpartition('/')[0]
            names = [layer.replace('blocks', f'blocks/{i}', 1) for i in range(x.size)]
            for name, value in zip(names if x.ndim else [layer], x.flat, strict=True):
                layers.setdefault(name, {}).setdefault(kind, []).append(float(value))
    return {
        'step': step,
        'devices': f'{made.stage.mesh.size} x {jax.devices()[0].device_kind}',
        'metrics': {name: plain(float(x)) for name, x in metrics.items()},
        'layers': {
            name: {kind: plain(math.hypot(*x)) for kind, x in kinds.items()}
            for name, kinds in layers.items()
        },
    }


def norms(tree: dict) -> dict:
    """The l2 norms of arrays; of stacked blocks, one for each."""

    def one(path, x):
        axes = tuple(range('blocks' in path_name(path).split('/'), x.ndim))
        # The squares of what has diverged would overflow.
        largest = jnp.abs(x).max(axes, keepdims=True)
        scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1.0)
        return jnp.squeeze(scale, axes) * jnp.sqrt(((x / scale) ** 2).sum(axes))

    return jax.tree_util.tree_map_with_path(one, tree)


def plain(x: float) -> float | str:
    """A number as JSON has it: those that are not finite by name."""
    return float(f'{x:.6g}') if math.isfinite(x) else str(x)


def message(name: str, settings: configs.Train, where: Path, report: dict) -> str:
    """A dump in a line."""
    return (
        f'{name} diverged: {settings.max_nonfinite} updates in a row up to step {report["step"]} '
        f'had a non-finite loss or gradient and were skipped ({layers_told(report)}); '
        f'python -m cmd_jax.training.divergence --dump={where} runs that step again: lower '
        f'{name}.train.learning_rate={settings.learning_rate} or '
        f'{name}.train.clip_norm={settings.clip_norm} (0: none)'
    )


def layers_told(report: dict) -> str:
    """Loss, gradient and the layers that are at fault; where no entry is infinite, the largest."""

    def badness(item):
        words = [isinstance(norm, str) for norm in item[1].values()]
        return words, [math.inf if isinstance(norm, str) else norm for norm in item[1].values()]

    layers, metrics = report['layers'], report['metrics']
    worst = sorted(layers.items(), key=badness, reverse=True)
    bad = [x for x in worst if any(isinstance(norm, str) for norm in x[1].values())]
    shown = (bad or worst)[:SHOWN]
    told = ', '.join(f'{layer} ({x["parameters"]}, {x["gradient"]})' for layer, x in shown)
    more = f' and {len(bad) - SHOWN} more' if len(bad) > SHOWN else ''
    numbers = f'loss {metrics["loss"]}, gradient norm {metrics["grad_norm"]}'
    if not bad and all(isinstance(metrics[k], float) for k in ('loss', 'grad_norm')):
        numbers += ', finite when computed anew'
    head = 'layers not finite' if bad else 'largest layers'
    return f'{numbers}, {head}, with norms of parameters and gradient: {told}{more}'


def read(where: Path) -> Dump:
    """The dump in a folder.

    Raises:
      UserError: it is not there, or damaged.
    """
    if where.parent.name != 'diverged' or where.parent.parent.name not in configs.STAGES:
        raise UserError(f'--dump={where}: give RUN/STAGE/diverged/STEP')
    for name in ('report.json', 'params.safetensors', 'inputs.npz'):
        if not (where / name).exists():
            raise UserError(f'--dump={where}: {name} is missing: give RUN/STAGE/diverged/STEP')
    try:
        name = 'report.json'
        report = json.loads((where / name).read_text())
        int(report['step']), layers_told(report)
        name = 'params.safetensors'
        params = safetensors.numpy.load_file(where / name)
        name, inputs = 'inputs.npz', {'batch': {}, 'statistics': {}}
        with np.load(where / name) as stored:
            for path in stored:
                kind, _, field = path.partition('/')
                inputs[kind][field] = stored[path]
        return Dump(report, params, **inputs)
    except (*DAMAGE, TypeError, AttributeError, safetensors.SafetensorError) as e:
        raise UserError(
            f'--dump={where}: {name} is damaged ({one_line(e)}): start the run again, which comes '
            'to the same step from its checkpoint'
        ) from e


def one_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def replay(where: Path, stored: Dump) -> dict:
    """Runs the step of a dump again, with the config, data and earlier stages of its run.

    Returns:
      The report of it, see `examine`.

    Raises:
      UserError: the run is no longer there, or is not the one that the dump is of.
    """
    folder, name = where.parent.parent, where.parent.parent.name
    for path in (folder / 'config.json', folder / 'inputs.json'):
        if not path.exists():
            raise UserError(f'--dump={where}: {path} is missing: leave the dump in its run')
    config = configs.load(folder / 'config.json')
    mesh = make_mesh(**vars(config.mesh), batch=getattr(config, name).train.batch_size)
    data = stages.load_data(config)
    stages.check(name, config, len(data.class_names), mesh)
    with jax.set_mesh(mesh):
        given = frozen.load(name, config, folder.parent, data, mesh)
        trained.check_inputs(folder, given.trained_on)
        made, networks = program.make(stages.make(name, config, len(data.class_names), mesh)), {}
        if name == 'motion':
            networks = {'statistics': put(stored.statistics, replicated(mesh))}

        def place(path, x):
            found = stored.params.get(path_name(path))
            if found is None or (found.shape, found.dtype) != (x.shape, x.dtype):
                found = 'missing' if found is None else f'{found.dtype} {list(found.shape)}'
                raise UserError(
                    f'--dump={where}: {path_name(path)} is {found}, not {x.dtype} {list(x.shape)} '
                    f'as {folder / "config.json"} says: the run has got another config since'
                )
            return put(found, x.sharding)

        params = jax.tree_util.tree_map_with_path(place, made.stacks.params)
        # Each row where it lay, so that sums are taken in the same order.
        batch = put(stored.batch, batch_sharding(mesh))
        key, _ = jax.random.split(jax.random.key(config.seed))
        step = stored.report['step']
        return examine(made, params, given.networks | networks, batch, key, step)


def main():
    """Prints the report of a dump, and what it was when the run ended."""
    where = Path(flags.FLAGS.dump).resolve()
    stored = read(where)
    now, then = replay(where, stored), stored.report
    if not is_main():
        return
    width = max(map(len, now['layers']))
    kinds = ('parameters', 'gradient')
    print(' ' * width, *(f'{kind:>12}' for kind in kinds), *(f'{"then":>12}' for _ in kinds))
    for layer, x in now['layers'].items():
        before = then['layers'].get(layer, {})
        cells = [x[kind] for kind in kinds] + [before.get(kind, '-') for kind in kinds]
        print(f'{layer:{width}}', *(f'{cell!s:>12}' for cell in cells))
    print(f'{"":{width}} {"now":>12} {"then":>12}')
    for metric, x in now['metrics'].items():
        print(f'{metric:{width}} {x!s:>12} {then["metrics"].get(metric, "-")!s:>12}')
    told = 'the same as' if now == then else 'not the same as'
    # Other numbers of devices add in other orders.
    print(f'step {now["step"]} on {now["devices"]}: {told} on {then.get("devices")} in the run')


if __name__ == '__main__':
    flags.DEFINE_string('dump', None, 'RUN/STAGE/diverged/STEP', required=True)
    cli.distributed_flags()
    cli.run(main)
