"""Previews of a stage in training, made by all processes and written by one; and what sets of such
videos are worth.

A stage's preview is a function (network, frozen, batch of real clips, keys) -> arrays of uint8
videos [n t h w 3], n of each, which are looked at side by side (images are videos of one frame).
"""

import json
from concurrent import futures
from pathlib import Path

import jax
import numpy as np
from absl import logging
from einops import repeat

from cmd_jax import atomic, sampling
from cmd_jax import video as videos
from cmd_jax.data.clips import Skipped
from cmd_jax.errors import UserError
from cmd_jax.evaluation import distances, features
from cmd_jax.evaluation.networks import i3d
from cmd_jax.parallel.distributed import any_process, is_main
from cmd_jax.parallel.mesh import batch_sharding, batch_ways, make_mesh, replicated
from cmd_jax.parallel.placement import fetch, put
from cmd_jax.training import config as configs
from cmd_jax.training import losses

PREVIEWS = 8
READERS = 8  # threads


def due(step: int, settings: configs.Train) -> bool:
    """Whether a step is one that has a preview."""
    every = settings.preview_every
    return step == settings.steps or bool(step and every and step % every == 0)


def missing(folder: Path, step: int) -> bool:
    """Whether a step's preview is not there, or not whole; all processes are told the same."""
    return any_process(is_main() and not (folder / f'{step:07d}.png').exists())


def make(preview, model, frozen: dict, batch: dict, mesh) -> tuple[np.ndarray, int]:
    """The videos of a stage's preview, those that belong together behind each other, and how many
    these are. The clips are split over the mesh, PREVIEWS at a time or as many as it has parts."""
    count, ways = len(jax.tree.leaves(batch)[0]), batch_ways(mesh)
    size = -(-min(count, PREVIEWS) // ways) * ways
    sharding = batch_sharding(mesh)
    keys = jax.jit(
        lambda first: sampling.video_keys(0, first, size),
        in_shardings=replicated(mesh),
        out_shardings=sharding,
    )
    pieces = []
    for first in range(0, count, size):
        rows = np.arange(first, first + size) % count
        some = put({name: x[rows] for name, x in batch.items()}, sharding)
        made = preview(model, frozen, some, keys(first))
        pieces.append([fetch(x)[: count - first] for x in made])
    found = [np.concatenate(videos) for videos in zip(*pieces)]
    return np.stack(found, axis=1).reshape(-1, *found[0].shape[1:]), len(found)


def write(folder: Path, step: int, out: np.ndarray, together: int):
    """FOLDER/STEP.png (a row a video, a column a frame) and, for videos, STEP.mp4 (a grid)."""
    scale = max(1, 128 // out.shape[2])
    if out.shape[1] == 1:
        image = videos.grid(out, columns=2 * together)[0]
        videos.write_image(folder / f'{step:07d}.png', image, scale=scale)
        return
    # The image last: with it, the preview is whole.
    videos.write(folder / f'{step:07d}.mp4', videos.grid(out, columns=2 * together), scale=scale)
    videos.write_image(folder / f'{step:07d}.png', videos.filmstrip(out), scale=scale)


def measure(folder: Path, step: int, real: np.ndarray, made: np.ndarray):
    """FOLDER/STEP.json: Frechet and kernel distance of I3D's features between clips and what was
    made of them. Of a sample far smaller than an FVD's, to follow a run by.
    """
    mesh = make_mesh(devices=jax.local_devices())
    frames = real.shape[1]
    real, made = (features.i3d_logits(videos, mesh=mesh) for videos in (real, made))
    found = {
        'step': step,
        'clips': len(real),
        'frames': frames,
        'i3d_size': i3d.SIZE,
        'frechet': distances.frechet_distance(real, made),
        'kernel': distances.kernel_distance(real, made),
    }
    atomic.write(folder / f'{step:07d}.json', json.dumps(found) + '\n')
    logging.info(
        'step %d: Frechet distance %.4g, kernel distance %.4g of %d test clips (no FVD)',
        *(step, found['frechet'], found['kernel'], len(real)),
    )


def clips(source, counts: dict[str, int]) -> dict[str, np.ndarray]:
    """The first clips of a source as a batch, always the same.

    Args:
      counts: {stage: its train.test_clips}; as many as the most of them are given, and PREVIEWS
        where there are as many.

    Raises:
      UserError: there is none, or fewer than a stage needs; or what a stage asks for has no
        meaning, or needs weights that are not installed.
    """
    for stage, count in counts.items():
        if count and (stage == 'content' or count < 2):
            raise UserError(
                f'{stage}.train.test_clips={count}: two clips or more of the autoencoder or motion '
                'stage, or 0; content frames are no videos'
            )
    if any(counts.values()):
        i3d.weights()  # or say now that they are not installed
    stage, count = max(counts.items(), key=lambda item: item[1])
    wanted, looked, good, bad = max(count, PREVIEWS), 0, [], None
    with futures.ThreadPoolExecutor(READERS) as pool:
        # Until there are enough: some may be unreadable or too short.
        while looked < len(source) and len(good) < wanted:
            places = range(looked, min(looked + wanted - len(good), len(source)))
            for clip in pool.map(source.__getitem__, places):
                if isinstance(clip, Skipped):
                    bad = bad or clip
                else:
                    good.append(clip)
            looked = places.stop
    if not good:
        raise UserError(f'{source.name}: no clip of the test split can be had: {bad}')
    if len(good) < count:
        raise UserError(
            f'{stage}.train.test_clips={count}: {source.name} has {len(good)} clips in its test '
            'split that can be had, take as many at most'
        )
    return {name: np.stack([clip[name] for clip in good]) for name in good[0]}


def encode(frozen: dict, batch: dict, at_once: int):
    """Content frames and motion latents of a batch, by the frozen autoencoder or from a cache."""
    if 'content' in batch:
        return batch['content'], batch['motion']
    return sampling.encode_program(
        frozen['autoencoder'], frozen.get('vae'), batch['video'], at_once=at_once
    )


def conditions(model, frozen: dict, batch: dict):
    """(condition, null) of a preview's clips."""
    condition = losses.condition_of(frozen, batch)
    return condition, losses.null_condition(model, frozen, condition)


def autoencoder(at_once, model, frozen, batch, keys):
    """Real clips, their content frames (held) and their reconstructions."""
    vae = frozen.get('vae')
    content, motion = encode(frozen | {'autoencoder': model}, batch, at_once)
    frame = sampling.video_program(vae, content[:, None], at_once=1)
    out = sampling.decode_program(model, vae, content, motion, at_once=at_once)
    return batch['video'], repeat(frame, 'b 1 h w c -> b t h w c', t=out.shape[1]), out


def content(process, options, at_once, model, frozen, batch, keys):
    """Content frames of real clips, and generated ones of the same condition."""
    true = encode(frozen, batch, at_once)[0]
    drawn = sampling.content_program(
        model, process, keys, *conditions(model, frozen, batch), true.shape[1:], **options
    )
    vae = frozen.get('vae')
    return tuple(sampling.video_program(vae, x[:, None], at_once=1) for x in (true, drawn))


def motion(process, options, at_once, model, frozen, batch, keys):
    """Real clips (of a cache, their reconstructions), and their content frames with generated
    motion."""
    frames, true = encode(frozen, batch, at_once)
    drawn = sampling.motion_program(
        *(model, process, keys, frames),
        *conditions(model, frozen, batch),
        frozen['statistics'],
        **options,
    )

    def decode(motion):
        return sampling.decode_program(
            frozen['autoencoder'], frozen.get('vae'), frames, motion, at_once=at_once
        )

    return batch['video'] if 'video' in batch else decode(true), decode(drawn)
