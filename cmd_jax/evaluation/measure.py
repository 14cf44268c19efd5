"""A protocol carried out: real clips and what stands in their place, through the networks."""

import collections
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from absl import logging

from cmd_jax.errors import UserError
from cmd_jax.evaluation import distances, features, intervals, real_clips, run
from cmd_jax.evaluation.networks import clip, i3d, lpips, pretrained
from cmd_jax.evaluation.protocols import (
    LEAST,
    Protocol,
    check_captions,
    check_text,
    fake_conditions,
    fingerprint,
)
from cmd_jax.parallel import batches

SHOWN = 16  # clips of each kind for the page
AT_ONCE = 256  # generated videos whose conditions are in memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What a user may choose. Other numbers of videos, networks or sizes make another protocol.

    Attributes:
      data: KIND:WHERE of the real clips; None: the run's own.
      num_videos: real clips and generated videos; None: the protocol's numbers.
      steps, guidance, sampler, spacing: of sampling; None: the run's config's.
      seed: of clips, samples and intervals.
      size: pixels a side that I3D sees.
      batch_size: videos at a time in the run's networks.
      i3d: file of I3D's weights; None: the installed package's.
      clip: folder or repository of CLIP.
      sweep: guidance scales at which generation is measured besides.
    """

    data: str | None = None
    num_videos: int | None = None
    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None
    spacing: str | None = None
    seed: int = 0
    size: int = i3d.SIZE
    batch_size: int = 16
    i3d: str | None = None
    clip: str = clip.REPOSITORY
    sweep: Sequence[float] = ()

    @property
    def sampling(self) -> dict:
        """Options of sampling but for the guidance scale, and the seed."""
        return {k: getattr(self, k) for k in ('steps', 'sampler', 'spacing', 'seed')}


class Videos:
    """What was measured of a set of videos, gathered batch by batch.

    Attributes:
      shown: the first videos.
      values: {name: a value for each video}.
    """

    def __init__(self, settings: Settings, distance: bool, mesh):
        self._settings, self._distance, self._mesh = settings, distance, mesh
        self._found, self.values = [], collections.defaultdict(list)
        self.shown = []

    def show(self, videos, count: int):
        """Keeps the first for the page, `count` of these at most."""
        room = min(count, SHOWN - sum(map(len, self.shown)))
        if room > 0:
            self.shown.append(np.asarray(videos[:room]))

    def restore(self, kept: dict[str, np.ndarray]):
        """Takes what `real_clips.keep` has kept."""
        self.shown, self._found = [kept['shown']], [kept['features']]

    def add(self, videos: np.ndarray, real: np.ndarray | None = None):
        """Videos on the host, and the real clips that they stand for, to compare in pairs."""
        self.show(videos, len(videos))
        if self._distance:
            settings = self._settings
            options = dict(size=settings.size, path=settings.i3d, mesh=self._mesh)
            self._found.append(features.i3d_logits(videos, **options))
        if real is not None:
            for name, measure in _of_pairs(real.shape, self._mesh).items():
                self.values[name].extend(measure(real, videos, mean=False))

    def stream(self, videos: Iterator, prompts: list[str] | None, scorer: clip.CLIP | None):
        """Batches on the devices, as `Generator.stream` gives them: what I3D says of one is
        computed behind the next one's sampling, and nothing waits for the host."""

        def looked_at():
            for batch, count in videos:
                found = None
                if self._distance:
                    network = features.load_i3d(self._settings.i3d, self._mesh)
                    found = features.i3d_program(network, batch, size=self._settings.size)
                yield batch, found, count

        done = 0
        for batch, found, count in batches.ahead(looked_at()):
            self.show(batch, count)
            if found is not None:
                self._found.append(np.asarray(found)[:count])
            if scorer is not None:
                texts = prompts[done : done + count]
                similar = features.clipsim(np.asarray(batch)[:count], texts, scorer, mean=False)
                self.values['clipsim'].extend(similar)
            done += count

    @property
    def features(self) -> np.ndarray:
        return np.concatenate(self._found)


def _of_pairs(shape: tuple[int, ...], mesh) -> dict[str, Callable]:
    """The measures of pairs that frames of this size are large enough for."""
    found = {'psnr': distances.psnr}
    if min(shape[2:4]) >= distances.SSIM_WINDOW:
        found['ssim'] = distances.ssim
    if lpips.fits('alex', *shape[2:4]):
        found['lpips'] = functools.partial(features.lpips, net='alex', mesh=mesh)
    return found


def measure(
    generator, name: str, protocol: Protocol, settings: Settings, cache: Path
) -> tuple[dict, dict]:
    """Carries a protocol out.

    Args:
      generator: with the stages that the protocol needs.
      name: of the protocol.
      cache: folder for the features of real clips.

    Returns:
      numbers: flat; estimates under PART_MEASURE (those of a sweep under
        generation_guidance_SCALE_MEASURE), their intervals under the same names with _low and
        _high, and everything that they depend on.
      pictures: {kind of videos: the first ones}, `content` and `sweep` where there are any.

    Raises:
      UserError: too few videos, clips of another length than the protocol's, weights that are not
        there, or prompts for a run without.
    """
    started = time.perf_counter()
    config = generator.config['autoencoder']
    if protocol.frames and config.data.frames != protocol.frames and settings.num_videos is None:
        raise UserError(
            f'protocol={name} is of {protocol.frames} frames, and this run of {config.data.frames}:'
            ' take generation or reconstruction, or --num_videos for a number that is not '
            'comparable with others'
        )
    if settings.num_videos is not None and settings.num_videos < intervals.FEWEST:
        raise UserError(f'--num_videos={settings.num_videos}: {intervals.FEWEST} videos or more')
    check_text(protocol, generator.text)
    scorer = clip.load(settings.clip, generator.mesh) if protocol.similarity else None
    wanted = settings.num_videos or protocol.num_real
    real = real_clips.RealClips(
        config, protocol, settings.data, wanted, settings.seed, generator.text
    )
    for scale in settings.sweep:
        generator.options(guidance=scale)
    conditioned = generator.class_names and protocol.parts != ('reconstruction',)
    if conditioned and real.class_names != generator.class_names:
        raise UserError(
            f'--data={settings.data}: its classes are not those of this run '
            f'({", ".join(generator.class_names[:3])}, ...): give videos of the same classes'
        )
    numbers = _about(generator, real, protocol, settings)
    # Nothing else is called FVD.
    official = (
        settings.num_videos is None
        and real.count >= min(protocol.num_real or LEAST, LEAST)
        and numbers.get('i3d_sha256', i3d.SHA256) == i3d.SHA256
        and settings.size == i3d.SIZE
        and (scorer is None or scorer.is_vit_b32)
    )
    numbers = {'protocol': name, 'comparable': official} | numbers
    found, labels, captions = _look_at_real(generator, protocol, settings, real, cache)
    check_captions(protocol, generator.text, captions)
    numbers['num_real'] = len(captions)
    pictures = {'sweep': []}
    if 'generation' in protocol.parts:
        count = settings.num_videos or protocol.num_fake or len(captions)
        asked = fake_conditions(protocol, count, labels, captions, generator.text)
        generate = functools.partial(_generate, generator, protocol, settings, asked, scorer)
        before = time.perf_counter()
        found['generation'] = generate(settings.guidance)
        numbers |= {'num_generated': count, 'seconds_generation': time.perf_counter() - before}
        numbers |= {'clip_sha256': scorer.sha256} if scorer else {}
        for scale in settings.sweep:
            estimates = _estimates(found['real'], protocol, official, settings, generate(scale))
            pictures['sweep'].append((scale, estimates))
            numbers |= flat(f'generation_guidance_{scale:g}', estimates)
    for part in protocol.parts:
        numbers |= flat(part, _estimates(found['real'], protocol, official, settings, found[part]))
    numbers['seconds_evaluation'] = time.perf_counter() - started
    pictures |= {kind: np.concatenate(videos.shown) for kind, videos in found.items()}
    pictures['content'] = generator.content_frames(pictures['real'])
    return numbers, pictures


def flat(part: str, estimates: dict[str, intervals.Estimate]) -> dict[str, float]:
    """Estimates as numbers of a report: PART_NAME, PART_NAME_low, PART_NAME_high."""
    return {
        f'{part}_{name}{end}': value
        for name, x in estimates.items()
        for end, value in (('', x.value), ('_low', x.low), ('_high', x.high))
    }


def _look_at_real(generator, protocol, settings, real, cache):
    """Real clips through I3D (unless that was done before) and through the run's networks."""
    new = functools.partial(Videos, settings, protocol.distance, generator.mesh)
    parts = [part for part in protocol.parts if part != 'generation']
    found = {kind: new() for kind in ('real', *parts)}
    digest = pretrained.sha256(i3d.weights(settings.i3d)) if protocol.distance else None
    about = {'real': real.settings, 'i3d': digest, 'size': settings.size}
    path = cache / f'{fingerprint(about)}.npz'
    before = real_clips.cached(path)
    labels, captions = [], []
    if before is not None:
        logging.info('features of %d real clips from %s', len(before['labels']), path)
        found['real'].restore(before)
        labels, captions = before['labels'].tolist(), before['captions'].tolist()
        if not parts:
            return found, labels, captions
    done = 0
    for chunk in real.chunks():
        videos = chunk['video']
        if before is None:
            found['real'].add(videos)
            labels += chunk['label'].tolist()
            captions += chunk['caption']
        for part in parts:
            if part == 'reconstruction':
                out = generator.reconstruct(videos, batch_size=settings.batch_size)
            else:
                out = _predict_motion(generator, settings, chunk, done)
            found[part].add(out, videos if protocol.pairs else None)
        done += len(videos)
        logging.info('%d of %d real clips', done, real.count)
    if before is None and protocol.distance:
        shown = np.concatenate(found['real'].shown)
        real_clips.keep(path, found['real'].features, labels, captions, shown)
    return found, labels, captions


def _predict_motion(generator, settings, chunk, first) -> np.ndarray:
    """Real clips, from number `first` on, with generated motion."""
    given = {}
    if generator.text:
        given = {'prompt': chunk['caption']}
    elif generator.class_names:
        given = {'labels': chunk['label'].tolist()}
    return generator.predict_motion(
        chunk['video'],
        **given,
        first=first,
        guidance=settings.guidance,
        batch_size=settings.batch_size,
        **settings.sampling,
    )


def _generate(generator, protocol, settings, asked, scorer, guidance) -> Videos:
    """Videos of these conditions."""
    videos = Videos(settings, protocol.distance, generator.mesh)
    kind, values = next(iter(asked.items()))
    for first in range(0, len(values), AT_ONCE):
        some = values[first : first + AT_ONCE]
        given = {kind: some}
        if not generator.text and not generator.class_names:
            given = {'num_videos': len(some)}
        stream = generator.stream(
            **given,
            first=first,
            guidance=guidance,
            batch_size=settings.batch_size,
            **settings.sampling,
        )
        videos.stream(stream, some if generator.text else None, scorer)
        logging.info('%d of %d generated videos', first + len(some), len(values))
    return videos


def _estimates(real: Videos, protocol, official, settings, videos: Videos) -> dict:
    """{name: Estimate} of a set of videos. What is no FVD has another name."""
    found, seed = {}, settings.seed
    if protocol.distance:
        both = real.features, videos.features
        found['fvd' if official else 'frechet'] = intervals.frechet(*both, seed=seed)
        found['kvd' if official else 'kernel'] = intervals.kernel(*both, seed=seed)
    for name, values in videos.values.items():
        found[name] = intervals.of_mean(np.array(values), seed=seed)
    return found


def _about(generator, real, protocol, settings) -> dict:
    """What the numbers depend on."""
    about = {f'real_{name}': value for name, value in real.settings.items()}
    for stage, config in generator.config.items():
        about[f'sha256_{stage}'] = generator.sha256[stage]
        about[f'ema_decay_{stage}'] = getattr(config, stage).train.ema_decay
    sampled = settings.sampling | {'guidance': settings.guidance}
    del sampled['seed']
    about |= run.settings(generator, **sampled)
    if protocol.distance:
        about |= {
            'i3d_sha256': pretrained.sha256(i3d.weights(settings.i3d)),
            'i3d_size': settings.size,
            'i3d_resized': 'bilinear about pixel centres, without antialiasing',
        }
    warnings = list(real.warnings)
    if protocol.pairs:
        about['lpips_net'] = 'alex'
        shape = (1, 1, real.settings['height'], real.settings['width'])
        missing = {'ssim', 'lpips'} - set(_of_pairs(shape, generator.mesh))
        if missing:
            warnings.append(f'the frames are too small for {" and ".join(sorted(missing))}')
    about['resamples'] = intervals.RESAMPLES
    about['warnings'] = '; '.join(warnings) or None
    return about
