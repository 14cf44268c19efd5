"""From trained parts to video: the two draws, and the Generator that joins them.

    noise -> content frame -> (given it) motion latent -> autoencoder.decode -> video

Video i of a seed has a key of its own, so the same seed gives the same videos whatever the batch
size and the number of devices.
"""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from cmd_jax import video as videos
from cmd_jax.diffusion import Process, guide, sample
from cmd_jax.errors import UserError
from cmd_jax.models.autoencoder import VideoAutoencoder
from cmd_jax.models.content import ContentDiT
from cmd_jax.models.motion import MotionDiT
from cmd_jax.parallel.mesh import batch_sharding, make_mesh, param_sharding, replicated
from cmd_jax.training import config as configs
from cmd_jax.training.checkpoint import Checkpoints
from cmd_jax.training.losses import denormalize
from cmd_jax.training.parts import make_autoencoder, make_content, make_motion, make_process


def video_keys(seed: int, first: int, count: int) -> Array:
    """Keys of the videos first .. first + count - 1 of a seed, [count]."""
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(
        jnp.arange(first, first + count)
    )


def draw_content(
    model: ContentDiT,
    process: Process,
    keys: Array,
    labels: Int[Array, 'b'],
    *,
    sampler: str,
    steps: int,
    guidance: float,
) -> Float[Array, 'b h w c']:
    """Content frames in [-1, 1]; `keys` [b], one an example."""
    shape = (model.rows * model.patch, model.columns * model.patch, model.channels)
    noise, keys = start(keys, 0, shape)
    denoise = guide(
        lambda x, t, label: model(x, t, label),
        labels,
        jnp.full_like(labels, model.num_classes),
        guidance,
        learn_sigma=process.learn_sigma,
    )
    return sample(denoise, noise, process, sampler=sampler, steps=steps, clip=1.0, key=keys)


def draw_motion(
    model: MotionDiT,
    process: Process,
    keys: Array,
    content: Float[Array, 'b h w c'],
    labels: Int[Array, 'b'],
    statistics: dict,
    *,
    sampler: str,
    steps: int,
    guidance: float,
) -> Float[Array, 'b t s d']:
    """Motion latents of the content frames; guidance keeps the frame in both branches."""
    shape = (model.rows * model.patch, model.columns * model.patch, model.channels)
    noise, keys = start(keys, 1, shape)
    denoise = guide(
        lambda x, t, given: model(x, t, *given),
        (content, labels),
        (content, jnp.full_like(labels, model.num_classes)),
        guidance,
        learn_sigma=process.learn_sigma,
    )
    z = sample(denoise, noise, process, sampler=sampler, steps=steps, key=keys)
    return denormalize(z, statistics)


def start(keys: Array, part: int, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Initial noise [b *shape] and the sampler's keys [b] of a part (0: content, 1: motion)."""
    keys = jax.vmap(lambda k: jax.random.split(jax.random.fold_in(k, part)))(keys)
    return jax.vmap(lambda k: jax.random.normal(k, shape))(keys[:, 0]), keys[:, 1]


# Networks are arguments, not constants, of the compiled programs.
OPTIONS = ('process', 'sampler', 'steps', 'guidance')
content_program = jax.jit(draw_content, static_argnames=OPTIONS)
motion_program = jax.jit(draw_motion, static_argnames=OPTIONS)
encode_program = jax.jit(lambda autoencoder, video: autoencoder.encode(videos.to_float(video)))
decode_program = jax.jit(lambda autoencoder, *z: videos.to_uint8(autoencoder.decode(*z)))


class Generator:
    """The three trained parts of a run.

    Attributes:
      autoencoder, content, motion: the networks, with averaged parameters.
      config: {stage: the Config that it was trained with}.
      steps: {stage: updates of the checkpoint}.
      seconds: {stage: wall-clock seconds of its training}.
      class_names: names of the classes; empty for a run without classes.
      statistics: {'mean', 'std'} of the motion latent, [d] each.
    """

    def __init__(
        self,
        autoencoder: VideoAutoencoder,
        content: ContentDiT,
        motion: MotionDiT,
        *,
        statistics: dict,
        config: dict[str, configs.Config],
        steps: dict[str, int],
        seconds: dict[str, float],
        class_names: list[str],
        mesh: jax.sharding.Mesh,
    ):
        self.autoencoder, self.content, self.motion = autoencoder, content, motion
        self.statistics, self.config, self.steps = statistics, config, steps
        self.seconds, self.class_names, self.mesh = seconds, class_names, mesh
        self.content_process = make_process(config['content'].content.process)
        self.motion_process = make_process(config['motion'].motion.process)

    def __call__(
        self,
        labels: list[int] | None = None,
        *,
        num_videos: int | None = None,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        motion_steps: int | None = None,
        motion_guidance: float | None = None,
        sampler: str | None = None,
        batch_size: int = 16,
    ) -> UInt8[np.ndarray, 'n t h w 3']:
        """New videos.

        Args:
          labels: a class for each video; shorter than `num_videos`, they repeat.
          num_videos: defaults to the number of labels, or 1.
          seed: of the videos.
          steps, guidance: network evaluations and guidance scale (1: none) of both stages; None
            takes those of the run's config.
          motion_steps, motion_guidance: the same of the motion stage alone.
          sampler: 'ddim' or 'ddpm'.
          batch_size: videos at a time; changes memory and speed, not the videos.

        Raises:
          UserError: for a label out of range, or labels where the run has no classes.
        """
        labels = self.check_labels(labels, num_videos)
        content_options = self._options('content', sampler, steps, guidance)
        motion_options = self._options(
            'motion',
            sampler,
            steps if motion_steps is None else motion_steps,
            guidance if motion_guidance is None else motion_guidance,
        )

        def run(keys, labels):
            content = content_program(
                self.content, self.content_process, keys, labels, **content_options
            )
            return self._decode(content, keys, labels, motion_options)

        return self._batched(run, batch_size, video_keys(seed, 0, len(labels)), labels)

    def animate(
        self,
        content: UInt8[np.ndarray, 'h w 3'],
        n: int = 4,
        *,
        label: int | None = None,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        batch_size: int = 16,
    ) -> UInt8[np.ndarray, 'n t h w 3']:
        """One content frame with `n` motions (paper, appendix F)."""
        size = (self.autoencoder.height, self.autoencoder.width, 3)
        if np.shape(content) != size:
            raise UserError(f'content has the shape {np.shape(content)}: this run needs {size}')
        if label is None:
            labels = jnp.full(n, self.motion.num_classes, jnp.int32)
        else:
            labels = self.check_labels([label], n)
        options = self._options('motion', sampler, steps, guidance if label is not None else 1.0)
        frames = jnp.broadcast_to(videos.to_float(jnp.asarray(content)), (n, *size))

        def run(keys, labels, frames):
            return self._decode(frames, keys, labels, options)

        return self._batched(run, batch_size, video_keys(seed, 0, n), labels, frames)

    def reconstruct(
        self, video: UInt8[np.ndarray, 'n t h w 3'], batch_size: int = 16
    ) -> UInt8[np.ndarray, 'n t h w 3']:
        """The autoencoder's reconstruction."""

        def run(video):
            return decode_program(self.autoencoder, *encode_program(self.autoencoder, video))

        return self._batched(run, batch_size, video)

    def content_frames(
        self, video: UInt8[np.ndarray, 'n t h w 3'], batch_size: int = 16
    ) -> UInt8[np.ndarray, 'n h w 3']:
        """The content frames of real videos."""

        def run(video):
            return videos.to_uint8(encode_program(self.autoencoder, video)[0])

        return self._batched(run, batch_size, video)

    def check_labels(self, labels: list[int] | None, num_videos: int | None) -> Int[Array, 'n']:
        """The labels of `num_videos` videos, checked; see `__call__`."""
        classes = self.content.num_classes
        if labels is not None and len(labels) == 0:
            raise UserError('labels is empty: name at least one class')
        if labels is None:
            labels = range(classes) if classes else [0]
            labels = [labels[i % len(labels)] for i in range(num_videos or 1)]
        elif not classes:
            raise UserError(f'labels={list(labels)}: this run has no classes; leave labels out')
        for label in labels:
            if classes and not 0 <= label < classes:
                raise UserError(f'label {label} is out of range: this run has 0..{classes - 1}')
        n = num_videos or len(labels)
        return jnp.asarray([labels[i % len(labels)] for i in range(n)], jnp.int32)

    def _options(self, stage, sampler, steps, guidance):
        default = getattr(self.config[stage], stage).sampling
        guidance = default.guidance if guidance is None else guidance
        if not self.content.num_classes:
            guidance = 1.0
        return dict(
            sampler=sampler or default.sampler,
            steps=default.steps if steps is None else steps,
            guidance=float(guidance),
        )

    def _decode(self, content, keys, labels, options):
        motion = motion_program(
            self.motion, self.motion_process, keys, content, labels, self.statistics, **options
        )
        return decode_program(self.autoencoder, content, motion)

    def _batched(self, run, batch_size, *arrays):
        """Runs over batches of one size (one compilation), the last padded by repetition."""
        n = len(arrays[0])
        devices = math.prod(self.mesh.devices.shape)
        size = -(-min(batch_size, n) // devices) * devices
        sharding = batch_sharding(self.mesh)
        out = []
        with jax.set_mesh(self.mesh):
            for first in range(0, n, size):
                index = np.minimum(np.arange(first, first + size), n - 1)
                batch = [jax.device_put(a[index], sharding) for a in arrays]
                out.append(np.asarray(run(*batch))[: n - first])
        return np.concatenate(out)


def load(workdir: str | Path) -> Generator:
    """The Generator of a run directory.

    Raises:
      UserError: if a stage has no checkpoint (names the command that trains it).
    """
    workdir = Path(workdir)
    mesh = make_mesh()
    config, steps, seconds, parts, names = {}, {}, {}, {}, []
    for stage in configs.STAGES:
        config[stage] = stage_config(workdir, stage)
        names = json.loads((workdir / stage / 'classes.json').read_text())
        parts[stage], statistics, steps[stage] = load_part(workdir, stage, mesh)
        lines = (workdir / stage / 'metrics.jsonl').read_text().splitlines()
        seconds[stage] = json.loads(lines[-1])['seconds']
    return Generator(
        **parts,
        statistics=statistics,
        config=config,
        steps=steps,
        seconds=seconds,
        class_names=names,
        mesh=mesh,
    )


def stage_config(workdir: Path, stage: str) -> configs.Config:
    """The stored config of a trained stage; UserError with the command where there is none."""
    folder = Path(workdir) / stage
    if not (folder / 'config.json').exists() or not any((folder / 'checkpoints').glob('[0-9]*')):
        raise UserError(
            f'{workdir} has no trained {stage}: '
            f'python train.py --config=configs/NAME.py:{stage} --workdir={workdir}'
        )
    return configs.load(folder / 'config.json')


def load_part(
    workdir: Path, stage: str, mesh: jax.sharding.Mesh
) -> tuple[nnx.Module, dict | None, int]:
    """A stage's network with averaged parameters, its statistics or None, and its step."""
    config = stage_config(workdir, stage)
    classes = len(json.loads((Path(workdir) / stage / 'classes.json').read_text()))
    make = {
        'autoencoder': lambda: make_autoencoder(config, nnx.Rngs(0)),
        'content': lambda: make_content(config, classes, nnx.Rngs(0)),
        'motion': lambda: make_motion(config, classes, nnx.Rngs(0)),
    }[stage]
    graphdef, params = nnx.split(nnx.eval_shape(make), nnx.Param)
    params = nnx.to_pure_dict(params)
    tree = {'ema': like(params, param_sharding(params, mesh))}
    if stage == 'motion':
        vector = jax.ShapeDtypeStruct(
            (config.autoencoder.model.motion_channels,), jnp.float32, sharding=replicated(mesh)
        )
        tree['statistics'] = {'mean': vector, 'std': vector}
    with Checkpoints(Path(workdir) / stage / 'checkpoints') as checkpoints:
        step = checkpoints.latest
        stored = checkpoints.restore_model(tree)
    return nnx.merge(graphdef, stored['ema']), stored.get('statistics'), step


def like(params, sharding):
    """ShapeDtypeStructs of the arrays, placed."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, sharding
    )
