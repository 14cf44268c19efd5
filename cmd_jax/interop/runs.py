"""Other people's networks as a run, which sample.py samples from and train.py goes on with."""

import contextlib
import copy
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx

from cmd_jax.errors import UserError, writable
from cmd_jax.interop import torch_dicts
from cmd_jax.interop.files import NAMES, read_state_dict
from cmd_jax.models.rngs import make_rngs
from cmd_jax.parallel.mesh import make_mesh, replicated
from cmd_jax.training import config as configs
from cmd_jax.training import state as states
from cmd_jax.training import trained
from cmd_jax.training.checkpoint import Checkpoints
from cmd_jax.training.parts import make_network

STEP = 1  # of an imported network's checkpoint
# Embeddings of a condition, which the authors' motion network does not have.
CONDITIONS = ('label_embed', 'text_embed')


def import_run(
    workdir: str | Path,
    tree: dict,
    *,
    autoencoder: str | Path | None = None,
    content: str | Path | None = None,
    motion: str | Path | None = None,
    class_names: str | Path | None = None,
) -> configs.Config:
    """Writes the stages whose files are given into a run, as trained at step 1.

    Everything is read and checked before anything is written.

    Args:
      workdir: the run; may hold other stages already.
      tree: the config as a nested dict; the networks' own sizes replace its.
      autoencoder, motion: files of the authors' networks, see `files.read_state_dict`.
      content: a file of the authors' content network, or of facebookresearch/DiT.
      class_names: a text file with the name of a class in each line.

    Returns:
      The config of the imported stages.

    Raises:
      UserError: for unreadable files, networks that do not fit together or the config, and stages
        that are there already.
    """
    workdir, mesh = Path(workdir), make_mesh()
    files = dict(zip(configs.STAGES, (autoencoder, content, motion)))
    files = {stage: file for stage, file in files.items() if file}
    if not files:
        raise UserError('nothing to import: give --autoencoder, --content or --motion')
    if content and tree['condition'] == 'text':
        raise UserError(
            f"content={content}: with condition='text' the content network is the U-Net of "
            'stable_diffusion.source; leave it out, or give the config of a run on classes'
        )
    present = find_present(workdir, files)
    if 'autoencoder' not in files | present:
        raise UserError(
            f'{workdir} has no autoencoder, which {" and ".join(files)} must be of: '
            'give --autoencoder, too'
        )
    found = None if 'autoencoder' in files else trained.load(workdir, 'autoencoder', mesh)
    dicts = {stage: read_state_dict(file, NAMES[stage]) for stage, file in files.items()}
    count = None
    tree = with_present(tree, present)
    for stage, state_dict in dicts.items():
        with told(files[stage]):
            write_sizes(stage, tree[stage], state_dict)
            if stage == 'content':
                count = torch_dicts.classes(state_dict)
    config = configs.parse(tree)
    names = make_class_names(workdir, count, class_names)
    params = {}
    for stage, state_dict in dicts.items():
        with told(files[stage]):
            params[stage] = read_params(stage, config, len(names), state_dict)
    for stage in files:
        folder = writable('workdir', workdir / stage)
        save(stage, config, folder, params.pop(stage), len(names), mesh)
        configs.save(config, folder / 'config.json')
        if stage == 'autoencoder':  # the first
            trained.save_inputs(folder, trained.Inputs(names))
            found = trained.load(workdir, 'autoencoder', mesh)
        else:
            trained.save_inputs(folder, trained.inputs_on(names, found))
        logging.info('%s: imported into %s', stage, folder)
    return config


def find_present(workdir: Path, files: dict) -> dict[str, configs.Config]:
    """The configs of the run's other stages.

    Raises:
      UserError: where a stage to import is there already, or others are of another autoencoder.
    """
    present = {}
    for stage in configs.STAGES:
        folder = workdir / stage
        if stage in files and folder.is_dir() and any(folder.iterdir()):
            raise UserError(f'{folder} exists already: use another --workdir, or remove it')
        if (folder / 'config.json').exists():
            present[stage] = configs.load(folder / 'config.json')
    if present and 'autoencoder' in files:
        raise UserError(
            f'{workdir} holds {" and ".join(present)} of another autoencoder: '
            'use another --workdir for --autoencoder'
        )
    return present


@contextlib.contextmanager
def told(file: str | Path):
    """Errors say which file they are about."""
    try:
        yield
    except UserError as e:
        raise UserError(f'{file}: {e}') from e


def with_present(tree: dict, present: dict[str, configs.Config]) -> dict:
    """The config's tree with the sections that the run's other stages have."""
    tree = copy.deepcopy(tree)
    for stage, config in present.items():
        for field in ('frames', 'height', 'width'):
            stored, given = getattr(config.data, field), tree['data'][field]
            if stored != given:
                raise UserError(
                    f'data.{field}={given}, but the {stage} of this run has {stored}: give the '
                    '--config that it was trained with'
                )
        tree[stage] = dataclasses.asdict(config)[stage]
    return tree


def write_sizes(stage: str, section: dict, state_dict: torch_dicts.StateDict):
    """Makes a stage's section of the config describe the file's network, trained in one step."""
    section['train']['steps'] = STEP
    if stage == 'autoencoder':
        sizes = torch_dicts.autoencoder_settings(state_dict)
        # Pixels are bounded, latents of an image autoencoder are not.
        sizes['output'] = 'sigmoid' if sizes['channels'] == 3 else 'linear'
        sizes |= dict(position='none', content_frame='weighted')
        if sizes['head_dim'] * sizes['heads'] == sizes['dim']:
            sizes['head_dim'] = 0
    else:
        sizes = torch_dicts.dit_settings(state_dict, heads(stage, section, state_dict))
        sizes['rotary'] = False
        section['process'].update(
            schedule='linear', prediction='epsilon', learn_sigma=sizes['learn_sigma']
        )
    if stage == 'motion':
        name = 'keyframe_embedder.proj.weight'
        sizes['content_patch'] = torch_dicts.shape(state_dict, name, 4)[-1]
        section['content_noise'] = 0.0
        # Without a condition guidance changes nothing, and costs as much as the network.
        section['sampling']['guidance'] = 1.0
    section['model'].update((k, v) for k, v in sizes.items() if k in section['model'])


def heads(stage: str, section: dict, state_dict: torch_dicts.StateDict) -> int:
    """Those of the usual size of the width, else those of the config for this width."""
    dim = torch_dicts.shape(state_dict, 'x_embedder.proj.weight', 4)[0]
    usual = torch_dicts.usual_heads(dim)
    if usual is None and section['model']['dim'] != dim:
        raise UserError(
            f'the {stage} network has a width of {dim}, which is no usual size: give its heads as '
            f'--config.{stage}.model.heads, with --config.{stage}.model.dim={dim}'
        )
    return usual or section['model']['heads']


def make_class_names(workdir: Path, count: int | None, file: str | Path | None) -> list[str]:
    """The names of the classes: those given, or of the run, or 'class 0', 'class 1', …

    Args:
      workdir: the run.
      count: of the content network's classes; None if that is not imported.
      file: with a name in each line.
    """
    there = {}
    for stage in configs.STAGES:
        if (workdir / stage / 'inputs.json').exists():
            there[stage] = trained.read_inputs(workdir / stage).class_names
    run = there.get('content') or there.get('motion') or []
    names = read_names(Path(file)) if file else run
    if run and names != run:
        raise UserError(f'class_names={file} differs from the class_names in {workdir}: use those')
    if count is not None and names and len(names) != count:
        raise UserError(
            f'class_names={file or workdir} has {len(names)} names, but the content network '
            f'{count} classes'
        )
    if not names and count in (None, len(there.get('autoencoder', []))):
        names = there.get('autoencoder', [])
    if not names and count:
        names = [f'class {i}' for i in range(count)]
        logging.warning(
            'no names of the %d classes: to train on, give them as --class_names, in the order of '
            "the data's class folders",
            count,
        )
    return names


def read_names(path: Path) -> list[str]:
    try:
        names = path.read_text().split('\n')
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f'class_names={path} cannot be read ({e})') from e
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise UserError(f'class_names={path} is empty: write the name of a class in each line')
    return names


def read_params(
    stage: str, config: configs.Config, classes: int, state_dict: torch_dicts.StateDict
) -> dict:
    """The arrays of the run's network of a stage, on the host."""
    network = nnx.eval_shape(lambda: make_network(stage, config, classes, make_rngs(0)))
    check_fit(stage, config, network, state_dict)
    model = getattr(config, stage).model
    if stage == 'autoencoder':
        table = torch_dicts.autoencoder_table(model.patch)
    elif stage == 'content':
        table = torch_dicts.content_table(model.heads)
    else:
        table = torch_dicts.motion_table(model.heads)
    params = nnx.to_pure_dict(nnx.state(network, nnx.Param))
    # Embeddings of zeros: the same function, and training on can learn them.
    conditions = {}
    if stage == 'motion':
        conditions = {name: params.pop(name) for name in CONDITIONS if name in params}
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), conditions)
    return torch_dicts.fill(params, state_dict, table, f'{stage} network of this config') | zeros


def check_fit(
    stage: str, config: configs.Config, network: nnx.Module, state_dict: torch_dicts.StateDict
):
    """Raises UserError where the file's network is for data of another size or kind."""
    weight = 'to_logit.1.weight' if stage == 'autoencoder' else 'x_embedder.proj.weight'
    channels = torch_dicts.shape(state_dict, weight, 4)[1]
    if channels != network.channels:
        what = 'autoencoder.model.motion_channels=' if stage == 'motion' else 'frames with '
        raise UserError(
            f'the {stage} network has {channels} channels, but this run {what}{network.channels}'
        )
    tables = []
    if stage == 'motion':
        tables.append(('keyframe_pos_embed', network.content_positions, ('height', 'width')))
        tables.append(('pos_embed', network.positions, ('frames', 'height', 'width')))
    if stage == 'content':
        tables.append(('pos_embed', network.positions, ('height', 'width')))
    for name, table, fields in tables:
        wanted, count = table.position.shape[0], torch_dicts.shape(state_dict, name, 3)[1]
        if wanted != count:
            given = ', '.join(f'data.{field}={getattr(config.data, field)}' for field in fields)
            raise UserError(
                f'{given} is {wanted} patches for the {stage} network, but it was made for {count} '
                f'({name}): set the size that it was made for'
            )


def of_stage(argument: str, stage: str) -> str:
    """A config file's argument with another stage: 'sd21,all' -> 'sd21,content'."""
    words = [word for word in argument.split(',') if word]
    known = (*configs.STAGES, 'all')
    if not set(words) & set(known):
        return ','.join([stage, *words])
    return ','.join(stage if word in known else word for word in words)


def changes(stage: str, tree: dict, config: configs.Config) -> dict:
    """{field: value} that training a stage on needs besides the config it was imported with.

    The number of steps and how the stage is sampled are the user's to choose.
    """
    free = (f'{stage}.train.steps', f'{stage}.sampling.')
    old, new = configs.flatten(configs.parse(tree)), configs.flatten(config)
    return {
        field: value
        for field, value in new.items()
        if field.startswith(configs.RELEVANT[stage])
        and not field.startswith(free)
        and old[field] != value
    }


def save(
    stage: str,
    config: configs.Config,
    folder: Path,
    params: dict,
    classes: int,
    mesh: jax.sharding.Mesh,
):
    """Writes the checkpoint of step 1, with an optimizer that has not begun."""
    tx = states.optimizer(getattr(config, stage).train)
    stacks, abstract, _ = states.prepare(
        lambda rngs: make_network(stage, config, classes, rngs), tx, mesh
    )
    sharding = jax.tree.map(lambda x: x.sharding, abstract)
    params = jax.device_put(params, jax.tree.map(lambda x: x.sharding, stacks.params))
    params = jax.jit(stacks.stack, out_shardings=sharding.params)(params)
    state = states.TrainState(
        **jax.device_put(
            {'step': np.int32(STEP), 'nonfinite': np.int32(0), 'skipped': np.int32(0)},
            replicated(mesh),
        ),
        params=params,
        ema=params,
        opt_state=jax.jit(tx.init, out_shardings=sharding.opt_state)(params),
    )
    statistics = None
    if stage == 'motion':
        # The authors diffuse motion latents as they are.
        channels = config.autoencoder.model.motion_channels
        statistics = {'mean': jnp.zeros(channels), 'std': jnp.ones(channels)}
        statistics = jax.device_put(statistics, replicated(mesh))
    with Checkpoints(folder / 'checkpoints') as checkpoints:
        checkpoints.save(state, statistics, None)
