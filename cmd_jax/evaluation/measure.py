"""A protocol carried out: real clips and what stands in their place, through the networks."""

import collections
import functools
import time
from pathlib import Path

import jax
import numpy as np
from absl import logging

from cmd_jax.errors import UserError
from cmd_jax.evaluation import intervals, real_clips, run
from cmd_jax.evaluation import settings as choices
from cmd_jax.evaluation.gathered import Videos
from cmd_jax.evaluation.networks import clip, i3d, pretrained
from cmd_jax.evaluation.protocols import (
    Protocol,
    check_captions,
    check_text,
    fake_conditions,
    fingerprint,
)
from cmd_jax.evaluation.settings import Settings
from cmd_jax.training import config as configs

AT_ONCE = 256  # generated videos that are measured and kept together


def measure(
    generator, name: str, protocol: Protocol, settings: Settings, cache: Path
) -> tuple[dict, dict]:
    """Carries a protocol out.

    Args:
      generator: with the stages that the protocol needs.
      name: of the protocol.
      cache: folder for the features of real clips, and for what was measured of generated ones:
        an evaluation that was interrupted goes on.

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
    choices.check(name, protocol, settings)
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
            f'{real.settings["source"]}: its classes are not those of this run '
            f'({", ".join(generator.class_names[:3])}, ...): give --data with videos of the same '
            'classes; networks of others that were imported take the names of --class_names'
        )
    numbers = choices.about(generator, real, protocol, settings)
    found, labels, captions = _look_at_real(generator, protocol, settings, real, cache)
    check_captions(protocol, generator.text, captions)
    missing, too_many = real.told_missing()
    faults = [*choices.faults(protocol, settings, config, numbers, scorer), *real.faults]
    # Nothing else is called FVD.
    faults += [missing] if too_many else []
    warnings = [numbers['warnings'], None if too_many else missing]
    numbers |= {
        'warnings': '; '.join(filter(None, warnings)) or None,
        'num_real': len(captions),
        'real_missing': (real.listed + real.missed).total(),
    }
    official = not faults
    numbers = {
        'protocol': name,
        'comparable': official,
        'not_comparable_for': '; '.join(faults) or None,
    } | numbers
    pictures = {'sweep': []}
    if 'generation' in protocol.parts:
        count = settings.num_videos or protocol.num_fake or len(captions)
        asked = fake_conditions(protocol, count, labels, captions, generator.text)
        numbers |= {'clip_sha256': scorer.sha256} if scorer else {}
        generate = functools.partial(
            _generate, generator, protocol, settings, asked, scorer, numbers, cache
        )
        found['generation'] = generate(settings.guidance)
        numbers |= {'num_generated': count, 'seconds_generation': found['generation'].seconds}
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
    path = cache / f'real-{fingerprint(about)}.npz'
    before = real_clips.cached(path)
    labels, captions = [], []
    if before is not None:
        logging.info('features of %d real clips from %s', len(before['labels']), path)
        found['real'].take(before)
        labels, captions = before['labels'].tolist(), before['captions'].tolist()
        counts = before['missing'].tolist()
        real.missed = collections.Counter(dict(zip(before['reasons'].tolist(), counts)))
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
        real_clips.keep(path, found['real'].features, labels, captions, shown, dict(real.missed))
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


def _generate(generator, protocol, settings, asked, scorer, about, cache, guidance) -> Videos:
    """Videos of these conditions. What was measured of some at a time is kept: an evaluation that
    is interrupted goes on with the next ones."""
    videos = Videos(settings, protocol.distance, generator.mesh)
    kind, values = next(iter(asked.items()))
    sampled = run.settings(generator, **settings.sampling_with(guidance))
    decided = {k: v for k, v in about.items() if k.startswith(('sha256_', 'i3d_', 'clip_'))}
    decided |= sampled | {'seed': settings.seed, 'version': real_clips.VERSION}
    # What a config says besides, and what computes: each in its own way.
    decided['config'] = {k: configs.flatten(v) for k, v in generator.config.items()}
    decided |= {'device': generator.mesh.devices.flat[0].device_kind, 'jax': jax.__version__}
    for first in range(0, len(values), AT_ONCE):
        some = values[first : first + AT_ONCE]
        digest = fingerprint({'generated': [first, some], **decided})
        path = cache / f'generated-{digest}.npz'
        kept = real_clips.cached(path)
        if kept is not None:
            logging.info('%d of %d generated videos, kept', first + len(some), len(values))
            videos.take(kept)
            continue
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
        piece = Videos(settings, protocol.distance, generator.mesh)
        piece.stream(stream, some if generator.text else None, scorer)
        kept = piece.arrays(pictures=first == 0)
        real_clips.write(path, **kept)
        videos.take(kept)
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
