"""A stage that has been trained: what its folder holds, and the network from it.

RUN/STAGE/inputs.json says what the stage was trained on, see `Inputs`.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cmd_jax import atomic
from cmd_jax.errors import UserError, parse_json
from cmd_jax.models.rngs import make_rngs
from cmd_jax.parallel.mesh import abstract_params, path_name, replicated
from cmd_jax.parallel.placement import fetch
from cmd_jax.training import config as configs
from cmd_jax.training import integrity, metrics
from cmd_jax.training.checkpoint import Checkpoints
from cmd_jax.training.parts import make_network
from cmd_jax.training.stacks import Stacks


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a stage was trained on.

    Attributes:
      class_names: empty where the data has no classes.
      autoencoder_step: of the autoencoder that content or motion was trained on, else None.
      autoencoder: its `fingerprint`; None also where it is not known, as of an older run.
    """

    class_names: list[str]
    autoencoder_step: int | None = None
    autoencoder: str | None = None


@dataclasses.dataclass(frozen=True)
class Trained:
    """One trained stage of a run.

    Attributes:
      network: with the averaged parameters.
      config: that it was trained with.
      step: updates of the checkpoint.
      sha256: of the checkpoint, see `integrity.fingerprint`.
      inputs: what it was trained on.
      statistics: {'mean', 'std'} of the motion latent, [d] each; None but for the motion stage.
    """

    network: nnx.Module
    config: configs.Config
    step: int
    sha256: str
    inputs: Inputs
    statistics: dict | None


def inputs_on(class_names: list[str], autoencoder: Trained) -> Inputs:
    """Of a stage that is trained on that autoencoder."""
    return Inputs(class_names, autoencoder.step, fingerprint(autoencoder.network))


def read_inputs(folder: Path) -> Inputs:
    """Of the stage in a folder."""
    path = folder / 'inputs.json'
    tree = parse_json(path, path.read_bytes())
    try:
        found = Inputs(**tree)
    except TypeError as e:
        raise UserError(f'{path} has other fields than those of a stage ({e}): restore it') from e
    if not isinstance(found.class_names, list):
        raise UserError(f'{path}: class_names={found.class_names!r} is no list: restore it')
    return found


def save_inputs(folder: Path, inputs: Inputs):
    atomic.write(folder / 'inputs.json', json.dumps(dataclasses.asdict(inputs)) + '\n')


def check_inputs(folder: Path, given: Inputs):
    """Raises UserError where the stage in the folder was trained on other classes or another
    autoencoder, or the run's other diffusion stage on other classes."""
    if (folder / 'inputs.json').exists():
        stored = read_inputs(folder)
        wrong = other_autoencoder(stored, given)
        if differ := other_classes(stored.class_names, given.class_names):
            wrong = f'other classes than the data has now ({differ})'
        if wrong:
            raise UserError(f'{folder} was trained on {wrong}: use a new --workdir')
    other = {'content': 'motion', 'motion': 'content'}.get(folder.name)
    if other and (folder.parent / other / 'inputs.json').exists():
        names = {
            folder.name: given.class_names,
            other: read_inputs(folder.parent / other).class_names,
        }
        check_classes(folder.parent, names)


def check_classes(workdir: str | Path, names: dict[str, list[str]]):
    """Raises UserError where the motion of a run takes other classes than its content. It may take
    none: so an imported one does.

    `names`: {'content': its classes, 'motion': its classes}.
    """
    differ = other_classes(names['content'], names['motion'])
    if names['motion'] and differ:
        raise UserError(
            f'{workdir}: content and motion have other classes ({differ}): train one of them '
            'again, in a new workdir, on the data of the other'
        )


def other_classes(stored: list[str], given: list[str]) -> str:
    """How they differ, or ''."""
    if len(stored) != len(given):
        return f'{len(stored)} and {len(given)}'
    pairs = enumerate(zip(stored, given))
    return next((f'class {i}: {a!r} and {b!r}' for i, (a, b) in pairs if a != b), '')


def other_autoencoder(stored: Inputs, given: Inputs) -> str:
    """How they differ, or ''."""
    if stored.autoencoder_step != given.autoencoder_step:
        return (
            f'the autoencoder of step {stored.autoencoder_step}, which is now at step '
            f'{given.autoencoder_step}'
        )
    if stored.autoencoder and stored.autoencoder != given.autoencoder:
        return 'another autoencoder than is there now, of as many steps'
    return ''


def load(
    workdir: str | Path,
    stage: str,
    mesh: jax.sharding.Mesh,
    stable_diffusion: str | Path | None = None,
    text_encoder: str | Path | None = None,
) -> Trained:
    """A stage of a run, its network placed on the mesh.

    Args:
      workdir, stage: where it is.
      mesh: where its parameters are placed.
      stable_diffusion, text_encoder: where the pretrained image model, and the motion stage's own
        text encoder, are now; None: where they were in training.

    Raises:
      UserError: if the stage is missing or not trained to its last step (names the command), or has
        no such part.
    """
    folder = Path(workdir) / stage
    command = f'python train.py --config=configs/NAME.py:{stage} --workdir={workdir}'
    if not (folder / 'inputs.json').exists():
        raise UserError(f'{workdir} has no trained {stage}: {command}')
    config = configs.load(folder / 'config.json')
    if stable_diffusion is not None and not config.stable_diffusion.source:
        raise UserError(f'stable_diffusion={stable_diffusion}: this run is on pixels, leave it out')
    if stable_diffusion is not None:
        section = dataclasses.replace(config.stable_diffusion, source=str(stable_diffusion))
        config = dataclasses.replace(config, stable_diffusion=section)
    if text_encoder is not None and stage == 'motion':
        config = with_text_encoder(config, text_encoder)
    inputs = read_inputs(folder)
    classes = len(inputs.class_names)
    abstract = nnx.eval_shape(lambda: make_network(stage, config, classes, make_rngs(0)))
    stacks = Stacks(abstract, mesh)
    tree = {'ema': abstract_params(jax.eval_shape(stacks.stack, stacks.params), mesh)}
    if stage == 'motion':
        size = (config.autoencoder.model.motion_channels,)
        vector = jax.ShapeDtypeStruct(size, jnp.float32, sharding=replicated(mesh))
        tree['statistics'] = dict.fromkeys(('mean', 'std'), vector)
    with Checkpoints(folder / 'checkpoints', model_only=True) as checkpoints:
        step, steps = checkpoints.latest, getattr(config, stage).train.steps
        if step is None or step < steps:
            raise UserError(
                f'{workdir} has no trained {stage} ({step or 0} of {steps} steps done): {command}'
            )
        stored = checkpoints.restore_model(tree)
        sha256 = integrity.fingerprint(checkpoints.folder / str(step))
    return Trained(
        network=stacks.network(stored['ema']),
        config=config,
        step=step,
        sha256=sha256,
        inputs=inputs,
        statistics=stored.get('statistics'),
    )


def with_text_encoder(config: configs.Config, where: str | Path) -> configs.Config:
    """The config of a run whose motion stage's own text encoder has moved.

    Raises:
      UserError: it has none.
    """
    if not config.motion.text_encoder:
        raise UserError(
            f'text_encoder={where}: the motion stage of this run has no text encoder of its own, '
            'leave it out'
        )
    section = dataclasses.replace(config.motion, text_encoder=str(where))
    return dataclasses.replace(config, motion=section)


def fingerprint(network: nnx.Module) -> str:
    """A hash of a network's parameters and their names; all processes that hold them call it."""
    digest = hashlib.sha256()
    params = nnx.to_pure_dict(nnx.state(network, nnx.Param))
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        digest.update(path_name(path).encode())
        digest.update(np.ascontiguousarray(fetch(x)).tobytes())
    return digest.hexdigest()


def training_cost(workdir: str | Path, stage: str) -> dict[str, float]:
    """{'seconds': wall-clock time of a stage's training over all its processes, 'memory_gb': most
    memory of one of them}; empty if not recorded."""
    records = metrics.read(Path(workdir) / stage / 'metrics.jsonl')
    if not records:
        return {}
    return {
        'seconds': records[-1]['seconds'],
        'memory_gb': max(record['memory_gb'] for record in records),
    }
