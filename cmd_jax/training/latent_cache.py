"""Writes latent caches, and tells whether a cache was made by the networks of a run."""

import dataclasses
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import safetensors.numpy
from absl import logging
from tqdm import tqdm

from cmd_jax import atomic, sampling, stable_diffusion
from cmd_jax.data import clips, files, latent_records, pipeline, records, sources, videos
from cmd_jax.errors import UserError, parse_json, writable
from cmd_jax.parallel.distributed import barrier, is_main
from cmd_jax.parallel.mesh import batch_sharding, make_mesh
from cmd_jax.training import config as configs
from cmd_jax.training import parts, trained

# Fields of config.data, and the flags that set them.
FIELDS = {
    field.name: 'data' if field.name == 'source' else field.name
    for field in dataclasses.fields(configs.Data)
    if field.name not in ('frames', 'height', 'width')
}


def identity(config: configs.Config, autoencoder: trained.Trained) -> dict:
    """What the contents of a cache depend on besides the clips, as hashes."""
    # What the network computes does not depend on remat.
    model = {k: x for k, x in vars(autoencoder.config.autoencoder.model).items() if k != 'remat'}
    found = {
        'autoencoder': trained.fingerprint(autoencoder.network),
        'autoencoder_step': autoencoder.step,
        'model': model,
        'posterior': config.stable_diffusion.posterior,
    }
    if config.stable_diffusion.source:
        found['vae'] = stable_diffusion.fingerprint(config.stable_diffusion.source, 'vae')
    if config.condition == 'text':
        for name, stage in (('content_text', 'content'), ('motion_text', 'motion')):
            source = parts.text_source(config, stage)
            found[name] = stable_diffusion.fingerprint(source, 'text_encoder')
    return found


def check(source: latent_records.Latents, config: configs.Config, autoencoder: trained.Trained):
    """Raises UserError unless the cache was made by the networks that a run has now."""
    stored, data = source.header['networks'], config.data
    clip = {name: getattr(data, name) for name in ('frames', 'height', 'width')}
    if source.header['clip'] != clip:
        raise UserError(
            f'{source.path} holds clips of {source.header["clip"]}, the config asks for {clip}: '
            'use that config, or make another cache'
        )
    if config.condition == 'text' and 'content_text' not in stored:
        raise UserError(
            f"{source.path} holds no text features, which condition='text' needs: make it with an "
            'autoencoder whose config has condition=text'
        )
    old, new = configs.flat(stored), configs.flat(identity(config, autoencoder))
    wrong = [name for name, x in new.items() if old.get(name) != x]
    if wrong:
        raise UserError(
            f'{source.path} was made by other networks ({", ".join(wrong)} differ): make it anew '
            f'with the autoencoder of this run (step {autoencoder.step}; the cache has step '
            f'{stored["autoencoder_step"]}), or use that run'
        )


def write(
    workdir: str | Path,
    out: str | Path,
    data: dict,
    *,
    clips_per_video: int = 1,
    limit: int = 0,
    dtype: str = 'float32',
    batch_size: int = 32,
    shard_clips: int = 1024,
    seed: int = 0,
    stable_diffusion: str | None = None,
    text_encoder: str | None = None,
):
    """Encodes both splits of a data set; goes on where an earlier call stopped.

    Every process encodes shards of its own on its own devices.

    Args:
      workdir: a run with a trained autoencoder.
      out: folder of the cache.
      data: fields of config.data that differ from the run's.
      clips_per_video: times that the training split is gone through; by chance, each time anew.
      limit: at most so many clips of a split; 0: all.
      dtype: what arrays are stored in, 'float32' or 'float16'.
      batch_size: clips at a time in this process.
      shard_clips: clips in a file.
      seed: of what is random in the clips.
      stable_diffusion, text_encoder: where the pretrained image model, and the motion stage's own
        text encoder, are now; None: where they were in training.

    Raises:
      UserError: no trained autoencoder, data that cannot be read, or a folder with another cache.
    """
    out = os.fspath(writable('--out', out))
    mesh = make_mesh(devices=jax.local_devices())
    run = trained.load(workdir, 'autoencoder', mesh, stable_diffusion)
    if text_encoder is not None:
        run = dataclasses.replace(run, config=trained.with_text_encoder(run.config, text_encoder))
    tree = dataclasses.asdict(run.config)
    tree['data'] |= data
    config = configs.parse(tree)
    if sources.parse(config.data.source)[0] == 'latents':
        raise UserError(f'--data={config.data.source}: give the videos that it was made from')
    splits = {s: parts.make_source(config, s, seed=seed) for s in sources.SPLITS}
    totals = {
        split: min(len(source) * (clips_per_video if split == 'train' else 1), limit or 1 << 62)
        for split, source in splits.items()
    }
    free = ('workers', 'timeout', 'max_bad')  # of the contents
    settings = {
        'networks': identity(config, run),
        'data': {k: x for k, x in vars(config.data).items() if k not in free},
        'clips_per_video': clips_per_video,
        'dtype': dtype,
        'shard_clips': shard_clips,
        'seed': seed,
        'clips': totals,
    }
    if begin(out, settings):
        logging.info('%s is finished', out)
        return
    encoder = Encoder(config, run, mesh, batch_size, np.dtype(dtype), seed)
    first, last = jax.process_index(), jax.process_count()
    for split, source in splits.items():
        shards = -(-totals[split] // shard_clips)
        mine = range(first * shards // last, (first + 1) * shards // last)
        write_split(out, split, source, totals[split], shards, mine, shard_clips, encoder, config)
    barrier('latents')
    if is_main():
        finish(out, settings, splits, encoder, shard_clips, config)


def begin(out: str, settings: dict) -> bool:
    """Notes what is made in the folder; whether it is there already, whole.

    Raises:
      UserError: the folder holds something else.
    """
    path = os.path.join(out, records.SETTINGS)
    settings = json.loads(json.dumps(settings))
    if os.path.exists(path):
        stored = parse_json(path, files.read(path))
        # Older folders tell more, which does not decide about the contents.
        old, new = configs.flat(stored), configs.flat(settings)
        told = '; '.join(f'{n}: {old.get(n)} -> {x}' for n, x in new.items() if old.get(n) != x)
        if told:
            raise UserError(f'{out} holds another cache ({told}): choose another --out')
        return os.path.exists(os.path.join(out, records.HEADER))
    if os.path.exists(os.path.join(out, records.HEADER)):
        raise UserError(f'{out} holds other records: choose another --out')
    if is_main():
        files.write(path, json.dumps(settings, indent=1).encode())
    return False


def write_split(out, split, source, total, shards, mine, shard_clips, encoder, config):
    """Writes the shards `mine` of a split that are not there yet."""
    paths = {k: os.path.join(out, records.shard_name(split, k, shards)) for k in mine}
    about = {k: records.part(out, split, k) for k in mine}
    missing = [k for k in mine if not (os.path.exists(paths[k]) and os.path.exists(about[k]))]
    if not missing:
        return
    start, end = missing[0] * shard_clips, min((mine[-1] + 1) * shard_clips, total)
    sequence = pipeline.samples(
        source,
        seed=encoder.seed,
        shuffle=False,
        repeat=True,
        workers=config.data.workers,
        ahead=2 * encoder.batch_size,
        start=start,
    )
    try:
        # Of several processes one shows how far it is: all have as much to do.
        about_bar = dict(desc=f'latents of {split}', unit='clip', disable=not is_main())
        with tqdm(total=end - start, **about_bar) as bar:
            for k in range(missing[0], mine[-1] + 1):
                count = min((k + 1) * shard_clips, total) - k * shard_clips
                part = Part(itertools.islice(sequence, count), k * shard_clips, bar)
                if k not in missing:  # made by an earlier call, after one that was not
                    for _ in part.samples():
                        pass
                    continue
                made = records.write_shard(paths[k], encoder(part.samples()))
                told = {'records': made, 'skipped': part.skipped, 'unreadable': part.unreadable}
                files.write(about[k], json.dumps(told).encode())
    finally:
        sequence.close()


class Part:
    """The samples of one shard with their places, without those that cannot be had."""

    def __init__(self, samples: Iterator, start: int, bar: tqdm):
        self._samples, self._start, self._bar = samples, start, bar
        self.skipped, self.unreadable = {}, 0

    def samples(self) -> Iterator[tuple[int, dict]]:
        for place, sample in enumerate(self._samples, self._start):
            self._bar.update()
            if isinstance(sample, clips.Skipped):
                self.skipped[sample.file] = [sample.reason, sample.detail]
                self.unreadable += sample.reason != clips.TOO_SHORT
            else:
                yield place, sample


def finish(out, settings, splits, encoder, shard_clips, config):
    """Writes the features of the empty prompt, and the header, with which the cache is whole."""
    told = {}
    for split, total in settings['clips'].items():
        shards = -(-total // shard_clips)
        made = [json.loads(files.read(records.part(out, split, k))) for k in range(shards)]
        skipped = {k: v for part in made for k, v in part['skipped'].items()}
        lost = total - sum(part['records'] for part in made)
        counts = videos.tally(reason for reason, _ in skipped.values())
        # Parts of older versions do not tell.
        bad = sum(part.get('unreadable', 0) for part in made)
        if bad > config.data.max_bad * total:
            faulty = [(k, *v) for k, v in skipped.items() if v[0] != clips.TOO_SHORT]
            first = [': '.join(filter(None, words)) for words in faulty[: videos.FIRST]]
            raise UserError(
                f'{bad} of {total} clips of the split {split!r} cannot be had, more than '
                f'--max_bad={config.data.max_bad} allows ({counts}): {"; ".join(first)}: mend the '
                'videos and make it anew, or allow more with the same command to keep what is made'
            )
        if lost == total:
            raise UserError(
                f'none of {total} clips of the split {split!r} can be had ({counts}): give other '
                'videos, or another --out and lower --stride, or --short=loop'
            )
        told[split] = {'records': total - lost, 'shards': shards, 'skipped': skipped}
        logging.info(
            '%s: %d clips of %s%s', out, total - lost, split, f'; skipped: {counts}' * bool(lost)
        )
    for folder in (out, os.path.join(out, records.PARTS)):
        atomic.clear(folder)
    if encoder.texts:
        empty = {k: np.asarray(x[0]) for k, x in encoder.text_features(['']).items()}
        files.write(os.path.join(out, latent_records.EMPTY_PROMPT), safetensors.numpy.save(empty))
    header = {
        'format': latent_records.FORMAT,
        'class_names': list(splits['train'].class_names),
        'clip': {n: getattr(config.data, n) for n in ('frames', 'height', 'width')},
        'splits': told,
        **{k: v for k, v in settings.items() if k != 'clips'},
    }
    files.write(os.path.join(out, records.HEADER), json.dumps(header, indent=1).encode())


class Encoder:
    """The frozen networks of a run, from clips to records."""

    def __init__(self, config, run: trained.Trained, mesh, batch_size: int, dtype, seed: int):
        self._mesh, self._dtype, self.seed = mesh, dtype, seed
        self._autoencoder, self._vae = run.network, parts.load_vae(config, mesh)
        self._at_once = config.stable_diffusion.frames_at_once
        self._sampled = config.stable_diffusion.posterior == 'sample' and self._vae is not None
        # Whole rows of devices.
        self.batch_size = -(-batch_size // mesh.size) * mesh.size
        self.texts = {}
        if config.condition == 'text':
            where = {'hidden': 'content', 'pooled': 'motion'}
            where = {name: parts.text_source(config, stage) for name, stage in where.items()}
            found = {
                source: parts.load_frozen(source, ('text_encoder',), mesh)
                for source in set(where.values())
            }
            self.texts = {name: found[source] for name, source in where.items()}

    def __call__(self, samples: Iterator[tuple[int, dict]]) -> Iterator[bytes]:
        """The records of clips; the devices encode while the host reads and writes."""
        waiting = None
        while batch := list(itertools.islice(samples, self.batch_size)):
            work = batch, self._start(batch)
            if waiting:
                yield from self._records(*waiting)
            waiting = work
        if waiting:
            yield from self._records(*waiting)

    def _start(self, batch):
        places = np.array([place for place, _ in batch])
        video = np.stack([sample['video'] for _, sample in batch])
        # The last batch is filled up, so that nothing compiles anew.
        fill = self.batch_size - len(batch)
        video = np.concatenate([video, np.repeat(video[:1], fill, 0)])
        video = jax.device_put(video, batch_sharding(self._mesh))
        keys = None
        if self._sampled:
            places = np.concatenate([places, np.repeat(places[:1], fill)])
            keys = jax.vmap(lambda p: jax.random.fold_in(jax.random.key(self.seed), p))(places)
        with jax.set_mesh(self._mesh):
            return sampling.encode_program(
                self._autoencoder, self._vae, video, at_once=self._at_once, keys=keys
            )

    def _records(self, batch, encoded):
        arrays = dict(zip(('content', 'motion'), map(np.asarray, encoded)))
        arrays |= self.text_features([sample['caption'] for _, sample in batch])
        for i, (_, sample) in enumerate(batch):
            yield records.pack(
                {name: x[i].astype(self._dtype) for name, x in arrays.items()}
                | {'label': sample['label'], 'caption': str(sample['caption'])}
            )

    def text_features(self, captions: list[str]) -> dict[str, np.ndarray]:
        """`hidden` and `pooled` of captions, where there is text."""
        if not self.texts:
            return {}
        encoded = {id(text): text.encode(captions) for text in self.texts.values()}
        hidden, pooled = (encoded[id(self.texts[name])] for name in ('hidden', 'pooled'))
        return {'hidden': hidden[0], 'pooled': pooled[1]}
