"""From a config to networks, processes and the pretrained parts that it names."""

import dataclasses

import jax
import numpy as np
from flax import nnx

from cmd_jax import stable_diffusion
from cmd_jax.data import sources
from cmd_jax.data.clip_options import ClipOptions
from cmd_jax.diffusion import SAMPLERS, SPACINGS, Process, Sampling, timesteps
from cmd_jax.errors import UserError, choose
from cmd_jax.models.autoencoder import VideoAutoencoder
from cmd_jax.models.content import ContentDiT
from cmd_jax.models.motion import MotionDiT
from cmd_jax.parallel.mesh import compute_dtype
from cmd_jax.stable_diffusion import VAE, StableDiffusion, UNet
from cmd_jax.training import config as configs


def frame_shape(config: configs.Config) -> tuple[int, int, int]:
    """(height, width, channels) of a frame as the autoencoder sees it: pixels, or latents."""
    height, width = config.data.height, config.data.width
    source = config.stable_diffusion.source
    if not source:
        return height, width, 3
    about = stable_diffusion.arguments(source, 'vae')
    factor = 2 ** (len(about['block_channels']) - 1)
    for name, size in (('height', height), ('width', width)):
        if size % factor:
            raise UserError(
                f'data.{name}={size}: the VAE of {source} needs multiples of {factor}: change it'
            )
    return height // factor, width // factor, about['latent_channels']


def make_source(config: configs.Config, split: str, seed: int | None = None):
    """The clips of a split as config.data describes them; `seed` in the place of config.seed."""
    fields = dict(vars(config.data))
    spec, _ = fields.pop('source'), fields.pop('workers')
    options = {f.name: fields.pop(f.name) for f in dataclasses.fields(ClipOptions)}
    seed = config.seed if seed is None else seed
    return sources.make_source(spec, split, ClipOptions(**options), seed=seed, **fields)


def make_autoencoder(config: configs.Config, rngs: nnx.Rngs) -> VideoAutoencoder:
    section = config.autoencoder
    height, width, channels = frame_shape(config)
    model = vars(section.model) | {'head_dim': section.model.head_dim or None}
    return VideoAutoencoder(
        frames=config.data.frames,
        height=height,
        width=width,
        channels=channels,
        **model,
        dtype=compute_dtype(section.train.precision),
        rngs=rngs,
    )


def make_content(config: configs.Config, num_classes: int, rngs: nnx.Rngs) -> ContentDiT | UNet:
    section = config.content
    dtype = compute_dtype(section.train.precision)
    if config.condition == 'text':
        sizes = stable_diffusion.arguments(config.stable_diffusion.source, 'unet')
        return UNet(**sizes, remat=section.model.remat, dtype=dtype, rngs=rngs)
    height, width, channels = frame_shape(config)
    return ContentDiT(
        height=height,
        width=width,
        channels=channels,
        num_classes=num_classes,
        learn_sigma=section.process.learn_sigma,
        **vars(section.model),
        dtype=dtype,
        rngs=rngs,
    )


def make_motion(config: configs.Config, num_classes: int, rngs: nnx.Rngs) -> MotionDiT:
    section, patch = config.motion, config.autoencoder.model.patch
    height, width, channels = frame_shape(config)
    text_dim = 0
    if config.condition == 'text':
        text_dim = stable_diffusion.arguments(text_source(config, 'motion'), 'text_encoder')['dim']
    return MotionDiT(
        frames=config.data.frames,
        tokens=width // patch + height // patch,
        channels=config.autoencoder.model.motion_channels,
        content_size=(height, width, channels),
        num_classes=num_classes,
        text_dim=text_dim,
        learn_sigma=section.process.learn_sigma,
        **vars(section.model),
        dtype=compute_dtype(section.train.precision),
        rngs=rngs,
    )


def make_network(
    stage: str, config: configs.Config, num_classes: int, rngs: nnx.Rngs
) -> VideoAutoencoder | ContentDiT | UNet | MotionDiT:
    """The network of the stage of that name; captions as the condition are no classes."""
    if stage == 'autoencoder':
        return make_autoencoder(config, rngs)
    return {'content': make_content, 'motion': make_motion}[stage](config, num_classes, rngs)


def make_process(section: configs.DiffusionProcess) -> Process:
    return Process(**vars(section))


def sampling_options(
    config: dict[str, configs.Config],
    conditioned: bool,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    motion_steps: int | None = None,
    motion_guidance: float | None = None,
    sampler: str | None = None,
    spacing: str | None = None,
    guidance_rescale: float | None = None,
    guidance_start: float | None = None,
    guidance_end: float | None = None,
) -> dict[str, dict]:
    """{'content': …, 'motion': …}: keywords of `draw_content` and `draw_motion`.

    Args:
      config: {stage: the Config that it was trained with}, which says what is left out here (None).
      conditioned: whether it is on classes or prompts.
      steps, guidance: of both stages.
      motion_steps, motion_guidance: of the motion stage alone.
      sampler, spacing, guidance_rescale, guidance_start, guidance_end: of both, see
        `diffusion.Sampling`.

    Raises:
      UserError: guidance where there is nothing to guide to, an unknown sampler or spacing, or more
        steps than the process has.
    """
    guided = {  # and with what value nothing is
        'guidance': (guidance, 1),
        'motion_guidance': (motion_guidance, 1),
        'guidance_rescale': (guidance_rescale, 0),
        'guidance_start': (guidance_start, 0),
        'guidance_end': (guidance_end, 1),
    }
    for name, (given, neutral) in guided.items():
        if not conditioned and given not in (None, neutral):
            raise UserError(f'{name}={given}: this run has no classes, leave it out')
    if sampler is not None:
        choose('sampler', sampler, SAMPLERS)
    if spacing is not None:
        choose('spacing', spacing, ('', *SPACINGS))
    common = dict(
        sampler=sampler,
        spacing=spacing,
        guidance_rescale=guidance_rescale,
        guidance_start=guidance_start,
        guidance_end=guidance_end,
    )
    asked = {
        'content': dict(steps=steps, guidance=guidance),
        'motion': dict(
            steps=steps if motion_steps is None else motion_steps,
            guidance=guidance if motion_guidance is None else motion_guidance,
        ),
    }
    options = {}
    if 'content' in config:
        options['content'] = content_sampling(config['content'])
    if 'motion' in config:
        options['motion'] = {'content_noise': config['motion'].motion.content_noise}
    for stage, used in options.items():
        changes = {k: v for k, v in (common | asked[stage]).items() if v is not None}
        changes = changes if conditioned else changes | {'guidance': 1.0}
        section = getattr(config[stage], stage)
        sampling = dataclasses.replace(section.sampling, **changes)
        # More steps than there are, and the like, before anything is computed.
        check_steps(section.process, sampling, used.get('offset', 0))
        used['sampling'] = sampling
    return options


def check_steps(section: configs.DiffusionProcess, sampling: Sampling, offset: int):
    """Raises UserError where a process has not the steps that a stage is sampled in."""
    process = make_process(section)
    timesteps(process, sampling.steps, sampling.spacing, offset, sampling.sampler)


def content_sampling(config: configs.Config) -> dict:
    """Options of `sampling.draw_content` that follow from what content frames are."""
    if config.condition == 'text':
        # Stable Diffusion's conventions.
        return dict(clip=None, offset=1, final_alpha_one=False)
    pixels = not config.stable_diffusion.source
    return dict(clip=1.0 if pixels else None, offset=0, final_alpha_one=True)


def check_pretrained(config: configs.Config):
    """Raises UserError where a U-Net was trained for other frames, or in another process, than the
    config says."""
    source = config.stable_diffusion.source
    channels = stable_diffusion.arguments(source, 'unet')['channels']
    expected = frame_shape(config)[2]
    if channels != expected:
        raise UserError(
            f'{source}: its U-Net has {channels} channels, the latents of its VAE {expected}'
        )
    given, stored = make_process(config.content.process), stable_diffusion.process(source)
    same = given.prediction == stored.prediction and given.steps == stored.steps
    if not same or not np.allclose(given.betas, stored.betas) or given.learn_sigma:
        raise UserError(
            f'content.process={vars(config.content.process)} is not what {source} was trained with '
            f'(schedule={stored.schedule}, prediction={stored.prediction}, learn_sigma=False): '
            'change it'
        )


def text_source(config: configs.Config, stage: str) -> str:
    """Where the text encoder of a stage is."""
    if stage == 'motion' and config.motion.text_encoder:
        return config.motion.text_encoder
    return config.stable_diffusion.source


def load_frozen(source: str, wanted: tuple[str, ...], mesh: jax.sharding.Mesh) -> StableDiffusion:
    """Some parts of a pipeline, kept in the precision that they compute in."""
    dtype = compute_dtype('auto')
    return stable_diffusion.load(source, parts=wanted, dtype=dtype, param_dtype=dtype, mesh=mesh)


def load_vae(config: configs.Config, mesh: jax.sharding.Mesh) -> VAE | None:
    """The VAE of latent mode."""
    source = config.stable_diffusion.source
    return load_frozen(source, ('vae',), mesh).vae if source else None
