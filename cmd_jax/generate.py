"""From trained parts to video.

    noise -> content frame -> (given it) motion latent -> autoencoder.decode -> video

Video i of a seed has a key of its own, so the same seed gives the same videos whatever the batch
size and the number of devices.
"""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt8

from cmd_jax import sampling
from cmd_jax import video as videos
from cmd_jax.errors import UserError
from cmd_jax.parallel.mesh import batch_sharding, make_mesh
from cmd_jax.training import config as configs
from cmd_jax.training import trained
from cmd_jax.training.parts import make_process


class Generator:
    """The three trained parts of a run.

    Attributes:
      autoencoder, content, motion: the networks, with averaged parameters.
      config: {stage: the Config that it was trained with}.
      steps: {stage: updates of the checkpoint}.
      cost: {stage: {'seconds': of its training, 'memory_gb': most that its processes held}}; a
        stage without record has an empty one.
      class_names: names of the classes; empty for a run without classes.
      statistics: {'mean', 'std'} of the motion latent, [d] each.
    """

    def __init__(
        self,
        stages: dict[str, trained.Trained],
        cost: dict[str, dict[str, float]],
        mesh: jax.sharding.Mesh,
    ):
        self.autoencoder = stages['autoencoder'].network
        self.content, self.motion = stages['content'].network, stages['motion'].network
        self.statistics = stages['motion'].statistics
        self.config = {name: stage.config for name, stage in stages.items()}
        self.steps = {name: stage.step for name, stage in stages.items()}
        self.class_names = stages['content'].class_names
        self.cost, self.mesh = cost, mesh
        self.content_process = make_process(self.config['content'].content.process)
        self.motion_process = make_process(self.config['motion'].motion.process)

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
        options = self.options(
            steps=steps,
            guidance=guidance,
            motion_steps=motion_steps,
            motion_guidance=motion_guidance,
            sampler=sampler,
        )

        def run(keys, labels):
            content = sampling.content_program(
                self.content, self.content_process, keys, labels, **options['content']
            )
            return self._decode(content, keys, labels, options['motion'])

        return self._batched(run, batch_size, sampling.video_keys(seed, 0, len(labels)), labels)

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
        check_bytes('content', content)
        if label is None:
            labels = jnp.full(n, self.motion.num_classes, jnp.int32)
        else:
            labels = self.check_labels([label], n)
        if label is None and guidance is None:
            guidance = 1.0
        options = self.options(steps=steps, guidance=guidance, sampler=sampler)['motion']
        frames = jnp.broadcast_to(videos.to_float(jnp.asarray(content)), (n, *size))

        def run(keys, labels, frames):
            return self._decode(frames, keys, labels, options)

        return self._batched(run, batch_size, sampling.video_keys(seed, 0, n), labels, frames)

    def reconstruct(
        self, video: UInt8[np.ndarray, 'n t h w 3'], batch_size: int = 16
    ) -> UInt8[np.ndarray, 'n t h w 3']:
        """The autoencoder's reconstruction."""

        check_bytes('video', video)

        def run(video):
            return sampling.decode_program(
                self.autoencoder, *sampling.encode_program(self.autoencoder, video)
            )

        return self._batched(run, batch_size, video)

    def content_frames(
        self, video: UInt8[np.ndarray, 'n t h w 3'], batch_size: int = 16
    ) -> UInt8[np.ndarray, 'n h w 3']:
        """The content frames of real videos."""

        check_bytes('video', video)

        def run(video):
            return videos.to_uint8(sampling.encode_program(self.autoencoder, video)[0])

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

    def options(
        self,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        motion_steps: int | None = None,
        motion_guidance: float | None = None,
        sampler: str | None = None,
    ) -> dict[str, dict]:
        """{'content': …, 'motion': …}: how the two stages are sampled, defaults filled in."""
        if not self.class_names and {guidance, motion_guidance} - {None, 1.0}:
            raise UserError(
                f'guidance={guidance or motion_guidance}: this run has no classes, leave it out'
            )
        asked = {
            'content': (steps, guidance),
            'motion': (
                steps if motion_steps is None else motion_steps,
                guidance if motion_guidance is None else motion_guidance,
            ),
        }
        options = {}
        for stage, (steps, guidance) in asked.items():
            section = getattr(self.config[stage], stage)
            default = section.sampling
            if guidance is None:
                guidance = default.guidance if self.class_names else 1.0
            options[stage] = {
                'sampler': sampler or default.sampler,
                'steps': default.steps if steps is None else steps,
                'guidance': float(guidance),
            }
        options['motion']['content_noise'] = self.config['motion'].motion.content_noise
        return options

    def _decode(self, content, keys, labels, options):
        motion = sampling.motion_program(
            self.motion, self.motion_process, keys, content, labels, self.statistics, **options
        )
        return sampling.decode_program(self.autoencoder, content, motion)

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


def check_bytes(name: str, x: np.ndarray):
    """Floats in another range would pass as videos, and look like noise."""
    if np.asarray(x).dtype != np.uint8:
        raise UserError(f'{name} has the type {np.asarray(x).dtype}: give uint8 in 0..255')


def load(workdir: str | Path) -> Generator:
    """The Generator of a run directory.

    Raises:
      UserError: if a stage is missing or not trained to its last step (names the command), or
        content and motion were trained on another autoencoder than the one there.
    """
    mesh = make_mesh()
    stages = {stage: trained.load(workdir, stage, mesh) for stage in configs.STAGES}
    for stage in ('content', 'motion'):
        theirs, there = stages[stage].autoencoder_step, stages['autoencoder'].step
        if theirs != there:
            raise UserError(
                f'{workdir}: {stage} was trained on the autoencoder of step {theirs}, which is now '
                f'at step {there}: train {stage} again, in a new workdir'
            )
    cost = {stage: trained.training_cost(workdir, stage) for stage in configs.STAGES}
    return Generator(stages, cost, mesh)
