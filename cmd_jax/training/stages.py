"""The three stages: what the one loop needs to know of each."""

import dataclasses
import functools
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cmd_jax import interop, sampling, stable_diffusion
from cmd_jax import video as videos
from cmd_jax.data import sources
from cmd_jax.data.clips import Skipped
from cmd_jax.data.latent_records import Latents
from cmd_jax.diffusion import timesteps
from cmd_jax.errors import UserError
from cmd_jax.evaluation.networks import lpips
from cmd_jax.interop.files import NAMES, read_state_dict
from cmd_jax.parallel.mesh import param_sharding, path_name, replicated
from cmd_jax.training import config as configs
from cmd_jax.training import latent_cache, losses, parts, texts, trained

PREVIEWS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of training.

    Attributes:
      name: 'autoencoder', 'content' or 'motion'.
      train: its optimisation section of the config.
      make_model: rngs -> network.
      start: () -> {path: array} of the parameters that do not begin at random.
      loss: see `losses`.
      frozen: networks and arrays that the loss reads and does not train.
      frozen_pass: (frozen, batch, keys) -> what the loss computes with them alone.
      inputs: a host's batch from the pipeline -> what of it the loss reads.
      autoencoder_step: of the frozen autoencoder, or None.
      preview: (network, frozen, batch of real clips) -> (videos uint8 [m t h w 3] to look at, or
        images as one-frame videos; how many of them belong together).
    """

    name: str
    train: configs.Train
    make_model: Callable[[nnx.Rngs], nnx.Module]
    start: Callable[[], dict]
    loss: Callable
    frozen: dict
    frozen_pass: Callable
    inputs: Callable[[dict], dict]
    autoencoder_step: int | None
    preview: Callable


@dataclasses.dataclass(frozen=True)
class Data:
    """What stages are trained on.

    Attributes:
      source: clips of the training split.
      class_names: empty where there are no classes, or captions are the condition.
      captions: all that either split can have, or None where they are not known or not asked for.
      clips: a batch of the test split, for previews.
    """

    source: typing.Any
    class_names: list[str]
    captions: list[str] | None
    clips: dict


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
    return Data(train, class_names, captions, preview_clips(test))


def check(name: str, config: configs.Config, classes: int):
    """Raises UserError for what the config of a stage cannot mean; costs nothing."""
    section = getattr(config, name)
    nnx.eval_shape(lambda: parts.make_network(name, config, classes, nnx.Rngs(0)))
    if name == 'autoencoder':
        return
    process, offset = parts.make_process(section.process), 0
    if name == 'content':
        offset = parts.content_sampling(config)['offset']
        if config.condition == 'text':
            parts.check_pretrained(config)
    timesteps(process, section.sampling.steps, 'leading', offset)


def make(
    name: str,
    config: configs.Config,
    workdir: Path,
    data: Data,
    mesh,
) -> Stage:
    """The stage of that name; the later two read the autoencoder of `workdir`."""
    section = getattr(config, name)
    at_once = config.stable_diffusion.frames_at_once
    frames = losses.Frames(sampled=config.stable_diffusion.posterior == 'sample', at_once=at_once)
    vae = parts.load_vae(config, mesh)
    frozen = {} if vae is None else {'vae': vae}
    classes = len(data.class_names)
    common = dict(
        name=name,
        train=section.train,
        make_model=lambda rngs: parts.make_network(name, config, classes, rngs),
    )
    if name == 'autoencoder':
        if section.loss.lpips_weight:
            frozen['lpips'] = jax.device_put(lpips.load('vgg'), replicated(mesh))
        return Stage(
            **common,
            start=dict,
            loss=losses.autoencoder_loss(section.loss, frames),
            frozen=frozen,
            frozen_pass=frames,
            inputs=labelled,
            autoencoder_step=None,
            preview=functools.partial(preview_autoencoder, at_once),
        )
    autoencoder = trained_autoencoder(config, workdir, mesh)
    frozen['autoencoder'] = autoencoder.network
    cached = isinstance(data.source, Latents)
    if cached:
        latent_cache.check(data.source, config, autoencoder)
    inputs, text = labelled, None
    if config.condition == 'text' and cached:
        text = texts.given(data.source.empty_prompt(), pooled=name == 'motion', mesh=mesh)
    elif config.condition == 'text':
        encoder = parts.load_frozen(parts.text_source(config, name), ('text_encoder',), mesh)
        dtype = parts.compute_dtype(section.train.precision)
        text = texts.make(encoder, data.captions, pooled=name == 'motion', dtype=dtype, mesh=mesh)
    if text is not None:
        frozen['text'] = text.frozen
        inputs = functools.partial(captioned, text.lookup)
    process = parts.make_process(section.process)
    options = dataclasses.asdict(section.sampling)
    if not classes and text is None:
        options['guidance'] = 1.0
    if name == 'content':
        options |= parts.content_sampling(config)
        preview = preview_content
        loss = losses.content_loss(process, section.loss, frames)
    else:
        options['content_noise'] = section.content_noise
        preview = preview_motion
        loss = losses.motion_loss(process, section.loss, frames, section.content_noise)
    return Stage(
        **common,
        start=functools.partial(start, name, config, classes, mesh),
        loss=loss,
        frozen=frozen,
        frozen_pass=functools.partial(losses.given, frames=frames),
        inputs=inputs,
        autoencoder_step=autoencoder.step,
        preview=functools.partial(preview, process, options, at_once),
    )


# What of a batch the losses read besides the condition: clips, or what a cache has of them.
READ = ('video', 'content', 'motion')


def labelled(batch: dict) -> dict:
    """What of a batch the losses read, with labels."""
    return {name: batch[name] for name in (*READ, 'label') if name in batch}


def captioned(lookup: Callable[[dict], np.ndarray], batch: dict) -> dict:
    """What of a batch the losses read, with text."""
    return {name: batch[name] for name in READ if name in batch} | {'text': lookup(batch)}


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
    height, width, _ = parts.frame_shape(config)
    sizes = dict(height=height, width=width, num_classes=classes, heads=config.content.model.heads)
    weights = interop.dit_start(read_state_dict(config.content.start, NAMES[name]), **sizes)
    interop.check_start(
        weights, nnx.eval_shape(lambda: parts.make_network(name, config, classes, nnx.Rngs(0)))
    )
    return jax.device_put(weights, param_sharding(weights, mesh))


def trained_autoencoder(config: configs.Config, workdir: Path, mesh) -> trained.Trained:
    """The autoencoder of the run, if it is the one that this config describes."""
    found = trained.load(workdir, 'autoencoder', mesh)
    stored, given = configs.flatten(found.config), configs.flatten(config)
    fields = (
        *('autoencoder.model.', 'data.frames', 'data.height', 'data.width'),
        'stable_diffusion.source',
    )
    wrong = [
        f'{k}: {stored[k]!r} -> {given[k]!r}'
        for k in given
        if k.startswith(fields) and stored[k] != given[k]
    ]
    if wrong:
        raise UserError(
            f'the autoencoder in {workdir} was trained with another config '
            f'(stored -> given: {"; ".join(wrong)}): use its config or another workdir'
        )
    return found


def abstract_statistics(channels: int, mesh) -> dict:
    """The shapes of `measure_statistics`."""
    vector = jax.ShapeDtypeStruct((channels,), jnp.float32, sharding=replicated(mesh))
    return {'mean': vector, 'std': vector}


def measure_statistics(frozen: dict, batches: Iterator[dict], clips: int, at_once: int) -> dict:
    """Mean and standard deviation per channel of the motion latents of the first `clips` clips.

    Returns {'mean': [d], 'std': [d]} in float32; sums are taken in float64.
    """
    count = total = squares = 0
    seen = 0
    while seen < clips:
        motion = np.asarray(encode(frozen, next(batches), at_once)[1], np.float64)
        seen += len(motion)
        flat = motion.reshape(-1, motion.shape[-1])
        count, total, squares = count + len(flat), total + flat.sum(0), squares + (flat**2).sum(0)
    mean = total / count
    # A channel that never moves would otherwise be divided by zero.
    std = np.sqrt(np.maximum(squares / count - mean**2, 1e-6))
    return {'mean': jnp.asarray(mean, jnp.float32), 'std': jnp.asarray(std, jnp.float32)}


def encode(frozen: dict, batch: dict, at_once: int):
    """Content frames and motion latents of a batch, by the frozen autoencoder or from a cache."""
    if 'content' in batch:
        return jnp.asarray(batch['content']), jnp.asarray(batch['motion'])
    return sampling.encode_program(
        frozen['autoencoder'], frozen.get('vae'), jnp.asarray(batch['video']), at_once=at_once
    )


def conditions(model, frozen: dict, batch: dict):
    """(condition, null) of a preview's clips."""
    batch = {name: jnp.asarray(x) for name, x in batch.items() if name not in READ}
    condition = losses.condition_of(frozen, batch)
    return condition, losses.null_condition(model, frozen, condition)


def preview_autoencoder(at_once, model, frozen, batch):
    """Real clips, their content frames (held) and their reconstructions."""
    real, vae = batch['video'], frozen.get('vae')
    content, motion = encode(frozen | {'autoencoder': model}, batch, at_once)
    frame = np.asarray(sampling.video_program(vae, content[:, None], at_once=1))
    frame = np.repeat(frame, real.shape[1], 1)
    out = sampling.decode_program(model, vae, content, motion, at_once=at_once)
    return interleave(real, frame, np.asarray(out)), 3


def preview_content(process, options, at_once, model, frozen, batch):
    """Content frames of real clips, and generated ones of the same condition."""
    true = encode(frozen, batch, at_once)[0]
    keys = sampling.video_keys(0, 0, len(true))
    out = sampling.content_program(
        model, process, keys, *conditions(model, frozen, batch), true.shape[1:], **options
    )
    shown = [sampling.video_program(frozen.get('vae'), x[:, None], at_once=1) for x in (true, out)]
    return interleave(*map(np.asarray, shown)), 2


def preview_motion(process, options, at_once, model, frozen, batch):
    """Real clips (of a cache, their reconstructions), and their content frames with generated
    motion."""
    content, true = encode(frozen, batch, at_once)
    real = batch.get('video')
    if real is None:
        real = sampling.decode_program(
            frozen['autoencoder'], frozen.get('vae'), content, true, at_once=at_once
        )
    keys = sampling.video_keys(0, 0, len(content))
    motion = sampling.motion_program(
        *(model, process, keys, content),
        *conditions(model, frozen, batch),
        frozen['statistics'],
        **options,
    )
    out = sampling.decode_program(
        frozen['autoencoder'], frozen.get('vae'), content, motion, at_once=at_once
    )
    return interleave(np.asarray(real), np.asarray(out)), 2


def interleave(*rows: np.ndarray) -> np.ndarray:
    """Videos a0, b0, a1, b1, …: each real one beside what was made of it."""
    return np.stack(rows, axis=1).reshape(-1, *rows[0].shape[1:])


def write_preview(folder: Path, step: int, out: np.ndarray, together: int):
    """FOLDER/STEP.png (a row a video, a column a frame) and, for videos, STEP.mp4 (a grid)."""
    scale = max(1, 128 // out.shape[2])
    if out.shape[1] == 1:
        image = videos.grid(out, columns=2 * together)[0]
        videos.write_image(folder / f'{step:07d}.png', image, scale=scale)
        return
    videos.write_image(folder / f'{step:07d}.png', videos.filmstrip(out), scale=scale)
    videos.write(folder / f'{step:07d}.mp4', videos.grid(out, columns=2 * together), scale=scale)


def preview_clips(source) -> dict[str, np.ndarray]:
    """The first clips of a source as a batch: always the same."""
    found = [source[i] for i in range(min(PREVIEWS, len(source)))]
    good = [clip for clip in found if not isinstance(clip, Skipped)]
    if not good:
        raise UserError(f'{source.name}: no clip of the test split can be had: {found[0]}')
    return {name: np.stack([clip[name] for clip in good]) for name in good[0]}
