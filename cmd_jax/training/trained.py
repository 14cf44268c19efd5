"""A stage that has been trained: what its folder holds, and the network from it.

RUN/STAGE/inputs.json says what the stage was trained on: the names of the classes, and for content
and motion the step of the autoencoder.
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
from cmd_jax.errors import UserError
from cmd_jax.models.rngs import make_rngs
from cmd_jax.parallel.mesh import abstract_params, path_name, replicated
from cmd_jax.parallel.placement import fetch
from cmd_jax.training import config as configs
from cmd_jax.training import integrity, metrics
from cmd_jax.training.checkpoint import Checkpoints
from cmd_jax.training.parts import make_network
from cmd_jax.training.stacks import Stacks


@dataclasses.dataclass(frozen=True)
class Trained:
    """One trained stage of a run.

    Attributes:
      network: with the averaged parameters.
      config: that it was trained with.
      step: updates of the checkpoint.
      sha256: of the checkpoint, see `integrity.fingerprint`.
      class_names: empty where the data has no classes.
      autoencoder_step: of the autoencoder that content or motion was trained on, else None.
      statistics: {'mean', 'std'} of the motion latent, [d] each; None but for the motion stage.
    """

    network: nnx.Module
    config: configs.Config
    step: int
    sha256: str
    class_names: list[str]
    autoencoder_step: int | None
    statistics: dict | None


def check_inputs(folder: Path, class_names: list[str], autoencoder_step: int | None):
    """Raises UserError where the run in the folder was trained on other classes or another
    autoencoder."""
    path = folder / 'inputs.json'
    if not path.exists():
        return
    given = {'class_names': class_names, 'autoencoder_step': autoencoder_step}
    for name, stored in json.loads(path.read_text()).items():
        if stored != given[name]:
            raise UserError(
                f'{folder} was trained with {name}={stored}, and now it is {given[name]}: '
                'use a new --workdir'
            )


def save_inputs(folder: Path, class_names: list[str], autoencoder_step: int | None):
    inputs = {'class_names': class_names, 'autoencoder_step': autoencoder_step}
    atomic.write(folder / 'inputs.json', json.dumps(inputs) + '\n')


def load(
    workdir: str | Path,
    stage: str,
    mesh: jax.sharding.Mesh,
    stable_diffusion: str | Path | None = None,
) -> Trained:
    """A stage of a run, its network placed on the mesh.

    Args:
      workdir, stage: where it is.
      mesh: where its parameters are placed.
      stable_diffusion: where the pretrained image model is now; None: where it was in training.

    Raises:
      UserError: if the stage is missing or not trained to its last step; names the command.
    """
    folder = Path(workdir) / stage
    command = f'python train.py --config=configs/NAME.py:{stage} --workdir={workdir}'
    if not (folder / 'inputs.json').exists():
        raise UserError(f'{workdir} has no trained {stage}: {command}')
    config = configs.load(folder / 'config.json')
    if stable_diffusion is not None:
        section = dataclasses.replace(config.stable_diffusion, source=str(stable_diffusion))
        config = dataclasses.replace(config, stable_diffusion=section)
    inputs = json.loads((folder / 'inputs.json').read_text())
    classes = len(inputs['class_names'])
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
        statistics=stored.get('statistics'),
        **inputs,
    )


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
