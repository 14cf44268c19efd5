"""The three stages: what the one loop needs to know of each."""

import dataclasses
import functools
import typing
from collections.abc import Callable

import jax
from flax import nnx

from cmd_jax import interop, stable_diffusion
from cmd_jax.data import sources
from cmd_jax.errors import UserError
from cmd_jax.interop.files import NAMES, read_state_dict
from cmd_jax.models.rngs import make_rngs
from cmd_jax.parallel.mesh import accumulation, check_batch, param_sharding, path_name
from cmd_jax.parallel.placement import put
from cmd_jax.training import config as configs
from cmd_jax.training import losses, parts, previews


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of training, on a mesh.

    Attributes:
      name: 'autoencoder', 'content' or 'motion'.
      train: its optimisation section of the config.
      accumulation: parts of a batch, which go through the networks one after the other.
      mesh: of devices.
      make_model: rngs -> network.
      start: () -> {path: array} of the parameters that do not begin at random.
      loss: see `losses`.
      frozen_pass: (frozen, batch, keys) -> what the loss computes with frozen networks alone.
      preview: see `previews`.
    """

    name: str
    train: configs.Train
    accumulation: int
    mesh: jax.sharding.Mesh
    make_model: Callable[[nnx.Rngs], nnx.Module]
    start: Callable[[], dict]
    loss: Callable
    frozen_pass: Callable
    preview: Callable


@dataclasses.dataclass(frozen=True)
class Data:
    """What stages are trained on.

    Attributes:
      source: clips of the training split.
      class_names: empty where there are no classes, or captions are the condition.
      captions: all that either split can have, or None where they are not known or not asked for.
      test: clips of the test split.
    """

    source: typing.Any
    class_names: list[str]
    captions: list[str] | None
    test: typing.Any


def load_data(config: configs.Config) -> Data:
    """The data that config.data describes.

    Raises:
      UserError: it cannot be read, or is not what the stages need.
    """
    if sources.parse(config.data.source)[0] == 'latents' and config.stage in ('autoencoder', 'all'):
        raise UserError(
            f'data.source={config.data.source!r} is for the content and motion stages: the '
            'autoencoder is trained on videos'
        )
    train, test = (parts.make_source(config, split) for split in sources.SPLITS)
    class_names, captions = list(train.class_names), None
    if config.condition == 'text':
        class_names = []
        if train.captions is not None and test.captions is not None:
            captions = sorted({*train.captions, *test.captions})
        if captions == ['']:
            raise UserError(
                f"data.source={config.data.source!r} has no captions, which condition='text' needs"
            )
    return Data(train, class_names, captions, test)


def check(name: str, config: configs.Config, classes: int, mesh):
    """Raises UserError for what the config of a stage cannot mean, or does not split over a mesh;
    costs nothing."""
    section = getattr(config, name)
    check_batch(name, section.train.batch_size, mesh)
    if name == 'autoencoder':
        units, what = [config.data.frames], 'frames'
    elif name == 'content' and config.condition == 'text':
        units = stable_diffusion.arguments(config.stable_diffusion.source, 'unet')['heads']
        what = 'heads'
    else:
        units, what = [section.model.heads], 'heads'
    if any(unit % mesh.shape['tensor'] for unit in units):
        raise UserError(
            f'{name}.train.batch_size={section.train.batch_size} on {mesh.size} devices: the mesh '
            f'is {dict(mesh.shape)}, and its tensor axis does not divide {what} of {units}: choose '
            'a batch that splits over more devices, or set config.mesh'
        )
    nnx.eval_shape(lambda: parts.make_network(name, config, classes, make_rngs(0)))
    if name == 'autoencoder':
        return
    offset = 0
    if name == 'content':
        offset = parts.content_sampling(config)['offset']
        if config.condition == 'text':
            parts.check_pretrained(config)
    parts.check_steps(section.process, section.sampling, offset)


def make(name: str, config: configs.Config, classes: int, mesh) -> Stage:
    """The stage of that name; nothing is loaded. `classes`: 0 where captions are the condition."""
    section = getattr(config, name)
    at_once = config.stable_diffusion.frames_at_once
    frames = losses.Frames(sampled=config.stable_diffusion.posterior == 'sample', at_once=at_once)
    common = dict(
        name=name,
        train=section.train,
        accumulation=accumulation(section.train.batch_size, section.train.device_batch, mesh),
        mesh=mesh,
        make_model=lambda rngs: parts.make_network(name, config, classes, rngs),
    )
    if name == 'autoencoder':
        return Stage(
            **common,
            start=dict,
            loss=losses.autoencoder_loss(section.loss, frames),
            frozen_pass=frames,
            preview=functools.partial(previews.autoencoder, at_once),
        )
    process = parts.make_process(section.process)
    sampling = section.sampling
    if not classes and config.condition != 'text':
        sampling = dataclasses.replace(sampling, guidance=1.0)
    options = {'sampling': sampling}
    if name == 'content':
        options |= parts.content_sampling(config)
        preview, loss = previews.content, losses.content_loss(process, section.loss, frames)
    else:
        options['content_noise'] = section.content_noise
        preview = previews.motion
        loss = losses.motion_loss(process, section.loss, frames, section.content_noise)
    return Stage(
        **common,
        start=functools.partial(start, name, config, classes, mesh),
        loss=loss,
        frozen_pass=functools.partial(losses.given, frames=frames),
        preview=functools.partial(preview, process, options, at_once),
    )


def start(name: str, config: configs.Config, classes: int, mesh) -> dict:
    """{path: array} of a diffusion network's parameters that do not begin at random."""
    if name == 'motion':
        return {}
    if config.condition == 'text':
        unet = stable_diffusion.load(config.stable_diffusion.source, parts=('unet',), mesh=mesh)
        params = nnx.to_pure_dict(nnx.state(unet.unet, nnx.Param))
        return {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
    if not config.content.start:
        return {}
    weights = read_start(config, classes)
    return put(weights, param_sharding(weights, mesh))


def check_start(name: str, config: configs.Config, classes: int):
    """Raises UserError where the weights that a new stage begins with cannot be read or do not
    fit."""
    if name == 'content' and config.content.start:
        read_start(config, classes)


def read_start(config: configs.Config, classes: int) -> dict:
    """{path: array} of the DiT that `content.start` names, on the host.

    Raises:
      UserError: it cannot be read, or is of another network than the config's.
    """
    height, width, _ = parts.frame_shape(config)
    sizes = dict(height=height, width=width, num_classes=classes, heads=config.content.model.heads)
    weights = interop.dit_start(read_state_dict(config.content.start, NAMES['content']), **sizes)
    interop.check_start(
        weights, nnx.eval_shape(lambda: parts.make_content(config, classes, make_rngs(0)))
    )
    return weights
