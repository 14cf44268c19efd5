"""The real clips of a protocol, in a fixed order, and their features from one run to the next."""

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from absl import logging
from jaxtyping import Float, UInt8

from cmd_jax import atomic
from cmd_jax.data import pipeline, sources, videos
from cmd_jax.data.clips import TOO_EARLY, TOO_SHORT, UNREADABLE, BadVideo, Skipped, probe
from cmd_jax.errors import UserError
from cmd_jax.evaluation.intervals import FEWEST
from cmd_jax.evaluation.protocols import LEAST, Protocol, check_captions
from cmd_jax.training import config as configs
from cmd_jax.training import parts

VERSION = 2  # of how clips are decoded and resized, and of what is kept
AT_ONCE = 64  # clips in memory
LOOKED_AT = 16  # files whose size is compared with the clips'
REASONS = (TOO_SHORT, TOO_EARLY, UNREADABLE)  # for which a video of a set gives no clip
MISSING = 0.01  # share of a set's videos that may give no clip, in a number for others


class RealClips:
    """One clip of each of a number of videos, chosen by the seed.

    Attributes:
      count: how many.
      settings: what decides them, as plain values.
      class_names: of the source; empty where there are no classes.
      captions: that they can have; None: unknown.
      warnings: what may make their numbers another protocol's.
      faults: what does.
      listed: {reason: videos} that were left out of the source from the start.
      missed: {reason: videos} that gave no clip when they were decoded; empty before.
    """

    def __init__(
        self,
        config: configs.Config,
        protocol: Protocol,
        data: str | None,
        count: int | None,
        seed: int,
        text: bool,
    ):
        """Nothing is decoded yet.

        Args:
          config: of the run's autoencoder: size, length and rate of clips are those of training.
          data: KIND:WHERE instead of the run's own source.
          count: clips; None: one of every video.
          seed: of random clips.
          text: whether the run is conditioned on prompts.

        Raises:
          UserError: a source that there is not, of latents, without the captions that are needed,
            or of too few videos.
        """
        chosen = dataclasses.replace(
            config.data,
            source=data or config.data.source,
            clips='random' if protocol.split == 'train' else 'center',
            crop='center',
            flip=False,
        )
        kind = sources.parse(chosen.source)[0]
        if protocol.source not in ('', kind):
            raise UserError(
                f'the real clips of this protocol are those of {protocol.source}, not of '
                f'{chosen.source}: give --data={protocol.source}:DIR'
            )
        if kind == 'latents':
            raise UserError(f'--data={chosen.source}: a latent cache has no videos, give them')
        config = dataclasses.replace(config, data=chosen)
        self._source, self._seed = parts.make_source(config, protocol.split, seed=0), seed
        self.class_names = list(self._source.class_names)
        self.captions = self._source.captions
        check_captions(protocol, text, self.captions)
        there = len(self._source)
        if there < (count or LEAST):
            raise UserError(
                f'{self._source.name}: {there} videos in the split {protocol.split!r}, and the '
                f'protocol takes {count or f"all, {LEAST} at least"}: give more with --data, or '
                f'--num_videos={there} for a number that is not comparable with others'
            )
        self.count = there if count is None else count
        self._fewest = there * (1 - chosen.max_bad) if count is None else count
        header = getattr(self._source, 'header', {})
        self.listed, self._share = _left_out(self._source, header, protocol.split)
        self.missed = collections.Counter()
        self.settings = {
            'source': chosen.source,
            'prepared_from': header.get('source'),
            'split': protocol.split,
            'videos': there,
            'clips': self.count,
            'place': 'random' if protocol.split == 'train' else 'middle',
            'seed': seed,
            **{name: getattr(chosen, name) for name in ('frames', 'height', 'width', 'short')},
            **{name: getattr(chosen, name) for name in ('stride', 'fps', 'fold', 'test_fraction')},
            'resized': 'bicubic with antialiasing (Pillow), the middle cut out',
            'sha256': _listing(self._source),
        }
        self.warnings, self.faults = [], []
        if isinstance(self._source, videos.VideoFiles):
            self._look_at_files(chosen)
        elif header:
            self._look_at_records(header['options'], chosen, protocol)
        for warning in self.warnings:
            logging.warning('%s', warning)

    def __iter__(self) -> Iterator[dict]:
        """The clips, `video`, `label` and `caption`, always the same; those that cannot be had are
        passed over, and others come in their place."""
        found = pipeline.samples(
            self._source, seed=self._seed, shuffle=True, repeat=False, ahead=AT_ONCE
        )
        given, self.missed = 0, collections.Counter()
        try:
            for clip in found:
                if isinstance(clip, Skipped):
                    self.missed[clip.reason] += 1
                    continue
                given += 1
                yield clip
                if given == self.count:
                    break
        finally:
            found.close()
        if given < max(FEWEST, self._fewest):
            raise UserError(f'{self._source.name}: only {given} of {self.count} clips can be had')

    def chunks(self) -> Iterator[dict[str, np.ndarray]]:
        """The same stacked, some at a time."""
        clips = iter(self)
        while some := list(itertools.islice(clips, AT_ONCE)):
            yield {
                'video': np.stack([clip['video'] for clip in some]),
                'label': np.array([int(clip['label']) for clip in some]),
                'caption': [str(clip['caption']) for clip in some],
            }

    def told_missing(self) -> tuple[str | None, bool]:
        """(what of the set gave no clip, whether that is too much for a number for others)."""
        together, missed = self.listed + self.missed, sum(self.missed.values())
        if not together:
            return None, False
        share = max(self._share, missed / (missed + self.count))
        reasons = ', '.join(f'{count} {reason}' for reason, count in together.most_common())
        return f'videos that gave no clip: {reasons}', share > MISSING

    def _look_at_files(self, data):
        sizes = set()
        for video in range(min(LOOKED_AT, self._source.videos)):
            with contextlib.suppress(BadVideo):
                info = probe(self._source.path(video))
                sizes.add((info.height, info.width))
        # Scaled until they just cover the clip: by one side alone.
        small = [size for size in sorted(sizes) if size[0] <= data.height or size[1] <= data.width]
        if small:
            told = ', '.join(f'{height} x {width}' for height, width in small)
            self.warnings.append(
                f'videos of {told} for clips of {data.height} x {data.width}: they were resized '
                'before by a kernel that is not known, or are enlarged here; numbers of other '
                'kernels differ'
            )

    def _look_at_records(self, prepared: dict, data, protocol: Protocol):
        """`prepared`: the options that records were made with, see `data.shards.Settings`."""
        clips, each = prepared['clips'], prepared['per_video']
        if clips == 'all' or (clips == 'random' and each > 1):
            self.faults.append(
                f'records of clips={clips!r}: several clips of a video, where the protocol takes '
                "one; prepare them with --clips=whole, or 'random' ones"
            )
        elif clips == 'center' and protocol.split == 'train':
            self.faults.append('records of the middle clips, where the protocol takes random ones')
        elif clips == 'random' and protocol.split == 'test':
            self.faults.append('records of random clips, where the protocol takes the middle ones')
        if prepared['encoding'] == 'jpeg':
            self.warnings.append(
                'real frames went through JPEG when they were prepared, and generated ones do not'
            )
        size = prepared['height'], prepared['width']
        if size != (data.height, data.width):
            self.warnings.append(
                f'records of {size[0]} x {size[1]} for clips of {data.height} x {data.width}: '
                'resized twice; numbers of other kernels differ'
            )


def _left_out(source, header: dict, split: str) -> tuple[collections.Counter, float]:
    """({reason: videos} that a source has left out from the start, their share of all)."""
    if isinstance(source, videos.VideoFiles):
        reasons = [reason.partition(' (')[0] for reason in source.skipped.values()]
        found = collections.Counter(reason for reason in reasons if reason in REASONS)
        return found, sum(found.values()) / source.listed
    about = header.get('splits', {}).get(split)
    found = collections.Counter(about['skipped'] if about else {})
    return found, sum(found.values()) / about['videos'] if about else 0.0


def _listing(source) -> str:
    """A hash of what a source is made of: its classes; its files with their labels, captions,
    times, sizes and times of change; the header of prepared records."""
    digest = hashlib.sha256(repr((VERSION, source.name, source.class_names)).encode())
    if isinstance(source, videos.VideoFiles):
        for video in range(source.videos):
            about = source.file(video), source.label(video), source.caption(video)
            digest.update(repr((*about, source.times(video))).encode())
            with contextlib.suppress(OSError):  # not of this file system
                stat = os.stat(source.path(video))
                digest.update(repr((stat.st_size, stat.st_mtime_ns)).encode())
    if header := getattr(source, 'header', None):
        digest.update(json.dumps(header, sort_keys=True).encode())
    return digest.hexdigest()


def cached(path: Path) -> dict[str, np.ndarray] | None:
    """What an earlier evaluation has written; None where there is nothing."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as e:
        logging.warning('%s cannot be read (%s): the features are computed again', path, e)
        return None


def keep(
    path: Path,
    features: Float[np.ndarray, 'n d'],
    labels: list[int],
    captions: list[str],
    shown: UInt8[np.ndarray, 'k t h w 3'],
    missing: dict[str, int],
):
    """Writes what `cached` reads."""
    write(
        path,
        features=features,
        labels=labels,
        captions=captions,
        shown=shown,
        missing=list(missing.values()),
        reasons=list(missing),
    )


def write(path: Path, **arrays):
    """Arrays that `cached` reads, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(path) as temporary, open(temporary, 'wb') as file:
        np.savez(file, **arrays)
