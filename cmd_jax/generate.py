"""From trained parts to video.

    noise -> content frame -> (given it) motion latent -> autoencoder.decode -> (VAE) -> video

Video i of a seed has a key of its own, so the same seed gives the same videos whatever the batch
size and the number of devices.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jaxtyping import Array, Int, UInt8

from cmd_jax import conditions, sampling
from cmd_jax.conditions import Conditions
from cmd_jax.errors import UserError
from cmd_jax.parallel import batches
from cmd_jax.stable_diffusion import StableDiffusion, save
from cmd_jax.training import parts, trained


class Generator:
    """The three trained parts of a run.

    Attributes:
      autoencoder, content, motion: the networks, with averaged parameters; None where the stage was
        not loaded.
      stable_diffusion: the pretrained VAE, text encoder and tokenizer, the run's content network in
        the place of the U-Net; None for a run on pixels.
      config: {stage: the Config that it was trained with}.
      steps: {stage: updates of the checkpoint}.
      sha256: {stage: hash of the checkpoint}.
      cost: {stage: {'seconds': of its training, 'memory_gb': most that its processes held}}; a
        stage without record has an empty one.
      class_names: names of the classes; empty for a run without classes.
      text: whether the run is conditioned on prompts.
      statistics: {'mean', 'std'} of the motion latent, [d] each.
    """

    def __init__(
        self,
        stages: dict[str, trained.Trained],
        cost: dict[str, dict[str, float]],
        mesh: jax.sharding.Mesh,
        stable_diffusion: StableDiffusion | None,
        motion_text: StableDiffusion | None,
    ):
        """`loading.load` makes one of a run; motion_text: text encoder of the motion stage."""
        self.config = {name: stage.config for name, stage in stages.items()}
        self.steps = {name: stage.step for name, stage in stages.items()}
        self.sha256 = {name: stage.sha256 for name, stage in stages.items()}
        self.cost, self.mesh = cost, mesh
        self.autoencoder = stages['autoencoder'].network
        self._at_once = self.config['autoencoder'].stable_diffusion.frames_at_once
        self.content = self.motion = self.statistics = None
        if 'content' in stages:
            self.content = stages['content'].network
            self.content_process = parts.make_process(self.config['content'].content.process)
        if 'motion' in stages:
            self.motion, self.statistics = stages['motion'].network, stages['motion'].statistics
            self.motion_process = parts.make_process(self.config['motion'].motion.process)
        # An imported motion network may take no classes where the content network does.
        first = next(stage for stage in ('content', 'motion', 'autoencoder') if stage in stages)
        self.class_names = stages[first].inputs.class_names
        self.text = first != 'autoencoder' and self.config[first].condition == 'text'
        self.stable_diffusion, self._motion_text = stable_diffusion, motion_text

    def _need(self, *stages: str):
        """Raises UserError where a stage was not loaded."""
        for stage in stages:
            if stage not in self.config:
                raise UserError(f'the {stage} stage was not loaded: load the run with all stages')

    def _need_labels(self, labels: Sequence[int] | None):
        """Raises UserError where a class would be nobody's choice."""
        if labels is None and self.class_names:
            raise UserError(f'a class is missing: name one of 0..{len(self.class_names) - 1}')

    @property
    def _vae(self):
        return self.stable_diffusion and self.stable_diffusion.vae

    def __call__(
        self,
        labels: Sequence[int] | None = None,
        *,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str = '',
        num_videos: int | None = None,
        seed: int = 0,
        batch_size: int = 16,
        **options,
    ) -> UInt8[np.ndarray, 'n t h w 3']:
        """New videos.

        Args:
          labels: a class for each video; shorter than `num_videos`, they repeat.
          prompt: the same for a run on text: one prompt, or one for each video.
          negative_prompt: what guidance leads away from; '': from no text at all.
          num_videos: defaults to the number of labels or prompts, or 1.
          seed: of the videos.
          batch_size: videos at a time; changes memory and speed, not the videos.
          options: steps, guidance, sampler and others, see `parts.sampling_options`.

        Raises:
          UserError: for a label out of range, labels where the run has no classes, prompts where it
            is not conditioned on text, or an unknown sampler.
        """
        videos = self.stream(
            labels,
            prompt=prompt,
            negative_prompt=negative_prompt,
            num_videos=num_videos,
            seed=seed,
            batch_size=batch_size,
            **options,
        )
        return batches.collect(videos)

    def stream(
        self,
        labels: Sequence[int] | None = None,
        *,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str = '',
        num_videos: int | None = None,
        batch_size: int = 16,
        seed: int = 0,
        first: int = 0,
        **options,
    ) -> Iterator[tuple[UInt8[Array, 'b t h w 3'], int]]:
        """The videos of `__call__` batch by batch, on the devices: (videos, how many of them count;
        the rest fills the last batch up). The next batch is under way when one is given out, so
        what is computed of it on the devices does not keep them waiting. With first=k they are
        the videos k, k + 1, ... of the seed."""
        self._need('content', 'motion')
        asked = self.conditions(labels, prompt, negative_prompt, num_videos)
        options = self.options(**options)
        _tell_of_negative(negative_prompt, options)
        arrays = dataclasses.astuple(asked)
        keys = sampling.video_keys(seed, first, len(arrays[0]))
        return self._sampled(options, batch_size, arrays, keys)

    def interpolate(
        self,
        n: int = 8,
        *,
        seeds: tuple[int, int] = (0, 1),
        label: int | None = None,
        prompt: str | None = None,
        negative_prompt: str = '',
        batch_size: int = 16,
        **options,
    ) -> UInt8[np.ndarray, 'n t h w 3']:
        """Videos on the way from the first video of one seed to that of another: their noise turns
        from the one's to the other's.

        Args:
          n: of them, both ends included.
          seeds: of the ends.
          label, prompt: of all of them; not left out where the run is conditioned.
          negative_prompt, batch_size, options: see `__call__`; the sampler is DDIM.

        Raises:
          UserError: without a condition where the run has one, or for a sampler that adds noise.
        """
        self._need('content', 'motion')
        labels = None if label is None else [label]
        self._need_labels(labels)
        asked = self.conditions(labels, prompt, negative_prompt, n)
        options = self.options(**{'sampler': 'ddim'} | options)
        if options['motion']['sampling'].sampler == 'ddpm':
            raise UserError('interpolate: ddpm adds noise at every step, take another sampler')
        there, back = (jnp.repeat(sampling.video_keys(seed, 0, 1), n) for seed in seeds)
        places = jnp.linspace(0, 1, n)
        arrays = dataclasses.astuple(asked)
        return batches.collect(self._sampled(options, batch_size, arrays, there, back, places))

    def animate(
        self,
        content: UInt8[np.ndarray, 'h w 3'] | None = None,
        n: int = 4,
        *,
        image: UInt8[np.ndarray, 'h2 w2 3'] | None = None,
        label: int | None = None,
        prompt: str | None = None,
        negative_prompt: str = '',
        seed: int = 0,
        batch_size: int = 16,
        **options,
    ) -> UInt8[np.ndarray, 'n t h w 3']:
        """One content frame with `n` motions (paper, appendix F).

        Args:
          content: a content frame of the run's size, as `content_frames` gives them.
          n: number of videos.
          image: any picture instead. One of another size is scaled and its middle cut out, with a
            warning.
          label, prompt: what should happen in it; without, motions are drawn without a condition
            and without guidance.
          negative_prompt, seed, batch_size, options: see `__call__`.

        Raises:
          UserError: unless exactly one of content and image is given, as uint8 of that shape.
        """
        self._need('motion')
        if (content is None) == (image is None):
            raise UserError('animate needs content or image, one of them')
        data = self.config['autoencoder'].data
        size = (data.height, data.width, 3)
        if image is not None:
            content = conditions.fit_image(image, data.height, data.width)
        if np.shape(content) != size:
            raise UserError(f'content has the shape {np.shape(content)}: this run needs {size}')
        conditions.check_bytes('content', content)
        labels = None if label is None else [label]
        free = labels is None and prompt is None
        given = '' if free and self.text else prompt
        asked = self.conditions(labels, given, negative_prompt, n)
        condition = self.motion.null_condition(asked.motion) if free else asked.motion
        options = self.animation_options(not free, **options)
        _tell_of_negative(negative_prompt, options)
        frame = sampling.frames_program(self._vae, jnp.asarray(content)[None, None], at_once=1)[0]

        def program(keys, condition, null, frame):
            return self._animated(frame, keys, condition, null, options['motion'])

        keys = sampling.video_keys(seed, 0, n)
        frames = jnp.broadcast_to(frame, (n, *self._frame_shape))
        return self._batched(program, batch_size, keys, condition, asked.motion_null, frames)

    def reconstruct(
        self, video: UInt8[np.ndarray, 'n t h w 3'], batch_size: int = 16
    ) -> UInt8[np.ndarray, 'n t h w 3']:
        """The autoencoder's reconstruction."""

        conditions.check_bytes('video', video)

        def program(video):
            frame, motion = self._encode(video)
            return self._decode(frame, motion)

        return self._batched(program, batch_size, video)

    def predict_motion(
        self,
        video: UInt8[np.ndarray, 'n t h w 3'],
        labels: Sequence[int] | None = None,
        *,
        prompt: Sequence[str] | None = None,
        seed: int = 0,
        first: int = 0,
        batch_size: int = 16,
        **options,
    ) -> UInt8[np.ndarray, 'n t h w 3']:
        """Real videos whose motion is drawn anew: their own content frames, generated motion.

        What the motion stage alone costs in quality (paper, table 4a).

        Args:
          video: real clips.
          labels, prompt: one of each, as the run is conditioned.
          first: the number of the first video of the seed.
          seed, batch_size, options: see `__call__`; of the motion stage.

        Raises:
          UserError: no video, or not a condition for each where the run has one.
        """
        self._need('motion')
        conditions.check_bytes('video', video)
        self._need_labels(labels)
        given = prompt if labels is None else labels
        if given is not None and len(given) != len(video):
            raise UserError(f'{len(video)} videos and {len(given)} conditions: give one for each')
        asked = self.conditions(labels, prompt, '', len(video))
        options = self.options(**options)['motion']

        def program(video, keys, condition, null):
            frame = self._encode(video)[0]
            return self._animated(frame, keys, condition, null, options)

        keys = sampling.video_keys(seed, first, len(video))
        return self._batched(program, batch_size, video, keys, asked.motion, asked.motion_null)

    def content_frames(
        self, video: UInt8[np.ndarray, 'n t h w 3'], batch_size: int = 16
    ) -> UInt8[np.ndarray, 'n h w 3']:
        """The content frames of real videos, as pictures."""

        conditions.check_bytes('video', video)

        def program(video):
            frame = self._encode(video)[0]
            return sampling.video_program(self._vae, frame[:, None], at_once=1)[:, 0]

        return self._batched(program, batch_size, video)

    def export(self, folder: str | Path):
        """Writes the content stage as a Stable Diffusion folder that diffusers loads.

        Raises:
          UserError: where the content network is not Stable Diffusion's, or was rounded.
        """
        if not self.text:
            raise UserError('only the content stage of a run on text is a Stable Diffusion model')
        self._need('content')
        kinds = {str(x.dtype) for x in jax.tree.leaves(nnx.state(self.content, nnx.Param))}
        if kinds != {'float32'}:
            raise UserError(
                'export: the parameters were rounded, load(…, full_precision=True) first'
            )
        # The frozen parts are copied, file by file: here they may be in a lower precision.
        pipeline = dataclasses.replace(self.stable_diffusion, vae=None, text_encoder=None)
        save(pipeline, folder)

    def conditions(
        self,
        labels: Sequence[int] | None,
        prompt: str | Sequence[str] | None,
        negative_prompt: str,
        num_videos: int | None,
    ) -> Conditions:
        """The conditions of `num_videos` videos, checked; see `__call__`."""
        if not self.text:
            if prompt is not None or negative_prompt:
                raise UserError(
                    f'prompt={prompt!r}: this run is not conditioned on text; leave prompts out'
                )
            labels = self.check_labels(labels, num_videos)
            return conditions.of_labels(self.content or self.motion, self.motion, labels)
        if labels is not None:
            raise UserError(f'labels={list(labels)}: this run takes a prompt instead')
        prompts = conditions.check_prompts(prompt, num_videos)
        encoders = self.stable_diffusion, self._motion_text
        return conditions.of_prompts(*encoders, self.motion, prompts, negative_prompt)

    def check_labels(self, labels: Sequence[int] | None, num_videos: int | None) -> Int[Array, 'n']:
        """The labels of `num_videos` videos, checked; see `__call__`."""
        return conditions.check_labels(labels, num_videos, len(self.class_names))

    def options(self, **options) -> dict[str, dict]:
        """{'content': …, 'motion': …}: how they are sampled, see `parts.sampling_options`."""
        conditioned = bool(self.class_names) or self.text
        return parts.sampling_options(self.config, conditioned, **options)

    def animation_options(self, asked: bool, **options) -> dict[str, dict]:
        """{'motion': …}: how `animate` samples, with a class or prompt asked for or without."""
        if not asked and {options.get('guidance'), options.get('motion_guidance')} == {None}:
            options['guidance'] = 1.0
        return {'motion': self.options(**options)['motion']}

    @property
    def _frame_shape(self) -> tuple[int, int, int]:
        """Of a frame as the autoencoder sees it."""
        autoencoder = self.autoencoder
        return autoencoder.height, autoencoder.width, autoencoder.channels

    def _sampled(self, options, batch_size, conditions, keys, *towards):
        """Batches of videos of these conditions and keys, see `stream`; `towards` as in
        `sampling.first_noise`."""
        shape = self._frame_shape

        def program(content, content_null, motion, motion_null, keys, *towards):
            kwargs = {'towards': towards} if towards else {}
            frame = sampling.content_program(
                self.content,
                self.content_process,
                *(keys, content, content_null, shape),
                **options['content'] | kwargs,
            )
            return self._animated(frame, keys, motion, motion_null, options['motion'] | kwargs)

        return batches.run(program, self.mesh, batch_size, *conditions, keys, *towards)

    def _animated(self, frame, keys, condition, null, options):
        motion = sampling.motion_program(
            *(self.motion, self.motion_process, keys, frame, condition, null, self.statistics),
            **options,
        )
        return self._decode(frame, motion)

    def _encode(self, video):
        return sampling.encode_program(self.autoencoder, self._vae, video, at_once=self._at_once)

    def _decode(self, frame, motion):
        return sampling.decode_program(
            self.autoencoder, self._vae, frame, motion, at_once=self._at_once
        )

    def _batched(self, program, batch_size, *arrays):
        return batches.collect(batches.run(program, self.mesh, batch_size, *arrays))


def _tell_of_negative(prompt: str, options: dict[str, dict]):
    if prompt and 1.0 in {used['sampling'].guidance for used in options.values()}:
        logging.warning('negative_prompt has no effect where guidance is 1')
