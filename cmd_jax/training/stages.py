"""The three stages: what the one loop needs to know of each."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cmd_jax import sampling
from cmd_jax import video as videos
from cmd_jax.diffusion import timesteps
from cmd_jax.errors import UserError
from cmd_jax.evaluation.networks import lpips
from cmd_jax.parallel.mesh import replicated
from cmd_jax.training import config as configs
from cmd_jax.training import losses, trained
from cmd_jax.training.parts import make_network, make_process

PREVIEWS = 8


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of training.

    Attributes:
      name: 'autoencoder', 'content' or 'motion'.
      train: its optimisation section of the config.
      make_model: rngs -> network.
      loss: see `losses`.
      frozen: networks that the loss reads and does not train.
      autoencoder_step: of the frozen autoencoder, or None.
      preview: (network, frozen, real clips uint8 [n t h w 3], labels [n]) -> (videos uint8
        [m t h w 3] to look at, or images as one-frame videos; how many of them belong together).
    """

    name: str
    train: configs.Train
    make_model: Callable[[nnx.Rngs], nnx.Module]
    loss: Callable
    frozen: dict[str, nnx.Module]
    autoencoder_step: int | None
    preview: Callable


def check(name: str, config: configs.Config, classes: int):
    """Raises UserError for what the config of a stage cannot mean; costs nothing."""
    section = getattr(config, name)
    nnx.eval_shape(lambda: make_network(name, config, classes, nnx.Rngs(0)))
    if name != 'autoencoder':
        timesteps(make_process(section.process), section.sampling.steps, 'leading')


def make(name: str, config: configs.Config, workdir: Path, class_names: list[str], mesh) -> Stage:
    """The stage of that name; the later two read the autoencoder of `workdir`."""
    section = getattr(config, name)
    if name == 'autoencoder':
        frozen = {}
        if section.loss.lpips_weight:
            frozen['lpips'] = jax.device_put(lpips.load('vgg'), replicated(mesh))
        return Stage(
            name=name,
            train=section.train,
            make_model=lambda rngs: make_network(name, config, 0, rngs),
            loss=losses.autoencoder_loss(section.loss),
            frozen=frozen,
            autoencoder_step=None,
            preview=preview_autoencoder,
        )
    autoencoder = trained_autoencoder(config, workdir, mesh)
    process, classes = make_process(section.process), len(class_names)
    options = dataclasses.asdict(section.sampling)
    if not classes:
        options['guidance'] = 1.0
    if name == 'content':
        preview = preview_content
        loss = losses.content_loss(process, section.loss)
    else:
        preview = preview_motion
        loss = losses.motion_loss(process, section.loss, section.content_noise)
        options['content_noise'] = section.content_noise
    return Stage(
        name=name,
        train=section.train,
        make_model=lambda rngs: make_network(name, config, classes, rngs),
        loss=loss,
        frozen={'autoencoder': autoencoder.network},
        autoencoder_step=autoencoder.step,
        preview=functools.partial(preview, process, options),
    )


def trained_autoencoder(config: configs.Config, workdir: Path, mesh) -> trained.Trained:
    """The autoencoder of the run, if it is the one that this config describes."""
    found = trained.load(workdir, 'autoencoder', mesh)
    stored, given = configs.flatten(found.config), configs.flatten(config)
    fields = ('autoencoder.model.', 'data.frames', 'data.height', 'data.width')
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


def measure_statistics(autoencoder: nnx.Module, batches: Iterator[dict], clips: int) -> dict:
    """Mean and standard deviation per channel of the motion latents of the first `clips` clips.

    Returns {'mean': [d], 'std': [d]} in float32; sums are taken in float64.
    """
    count = total = squares = 0
    seen = 0
    while seen < clips:
        batch = next(batches)
        motion = np.asarray(sampling.encode_program(autoencoder, batch['video'])[1], np.float64)
        seen += len(motion)
        flat = motion.reshape(-1, motion.shape[-1])
        count, total, squares = count + len(flat), total + flat.sum(0), squares + (flat**2).sum(0)
    mean = total / count
    # A channel that never moves would otherwise be divided by zero.
    std = np.sqrt(np.maximum(squares / count - mean**2, 1e-6))
    return {'mean': jnp.asarray(mean, jnp.float32), 'std': jnp.asarray(std, jnp.float32)}


def preview_autoencoder(model, frozen, real, labels):
    """Real clips, their content frames (held) and their reconstructions."""
    content, motion = sampling.encode_program(model, real)
    frame = np.repeat(np.asarray(videos.to_uint8(content))[:, None], real.shape[1], 1)
    out = np.asarray(sampling.decode_program(model, content, motion))
    return interleave(real, frame, out), 3


def preview_content(process, options, model, frozen, real, labels):
    """Content frames of real clips, and generated ones of the same classes."""
    true = sampling.encode_program(frozen['autoencoder'], real)[0]
    keys = sampling.video_keys(0, 0, len(real))
    out = sampling.content_program(model, process, keys, jnp.asarray(labels), **options)
    return interleave(*(np.asarray(videos.to_uint8(x))[:, None] for x in (true, out))), 2


def preview_motion(process, options, model, frozen, real, labels):
    """Real clips, and their content frames with generated motion."""
    autoencoder = frozen['autoencoder']
    content = sampling.encode_program(autoencoder, real)[0]
    keys = sampling.video_keys(0, 0, len(real))
    motion = sampling.motion_program(
        model, process, keys, content, jnp.asarray(labels), frozen['statistics'], **options
    )
    return interleave(real, np.asarray(sampling.decode_program(autoencoder, content, motion))), 2


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


def preview_clips(source) -> tuple[np.ndarray, np.ndarray]:
    """The first clips and labels of a source: always the same."""
    clips = [clip for i in range(min(PREVIEWS, len(source))) if (clip := source[i]) is not None]
    if not clips:
        raise UserError('no clip of the test split can be decoded')
    return (
        np.stack([clip['video'] for clip in clips]),
        np.asarray([clip['label'] for clip in clips], np.int32),
    )
