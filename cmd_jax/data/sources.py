"""Random-access sources of clips, and the one function that makes a source from its name.

A source has `len`, `source[i]` and `source.__getitem__(i, rng)`, which give a dict of `video` uint8
[t h w 3], `label` int32, `caption` str and `index` int64, or `clips.Skipped` for a clip that cannot
be had (`Latents`: `content` and `motion` instead of `video`); and the attributes `name`,
`class_names` (empty where there are no classes) and `captions` (what its clips can have, sorted,
each once; None where they are too many to list). It is picklable: workers get a copy. `rng` draws
what is random in training; without it the clip is the middle one.
"""

from cmd_jax.data import listings, manifest
from cmd_jax.data.clip_options import ClipOptions
from cmd_jax.data.latent_records import Latents
from cmd_jax.data.moving_digits import MovingDigits
from cmd_jax.data.records import RecordVideos
from cmd_jax.data.tfds_videos import TfdsVideos
from cmd_jax.data.videos import Listing, VideoFiles
from cmd_jax.errors import UserError, choose

SPLITS = ('train', 'test')
# What stands behind the colon.
SOURCES = {
    'folder': 'a folder of videos',
    'ucf101': 'the folder of UCF-101',
    'manifest': 'a table in a .csv, .jsonl or .parquet file',
    'tfds': 'the name of a data set, or the folder of a prepared one',
    'records': 'a folder made by cmd_jax.data.prepare',
    'latents': 'a folder made by cmd_jax.data.latents',
    'moving_digits': 'nothing, or the number of training clips',
}

FILES = ('folder', 'ucf101', 'manifest')


def parse(spec: str) -> tuple[str, str]:
    """('folder', '/data/videos') of 'folder:/data/videos'.

    Raises:
      UserError: an unknown kind, or nothing behind the colon.
    """
    kind, _, where = spec.partition(':')
    choose('data.source', kind, SOURCES)
    if not where and kind != 'moving_digits':
        raise UserError(f'data.source={spec!r}: write {kind}: and then {SOURCES[kind]}')
    return kind, where


def make_source(
    spec: str,
    split: str,
    options: ClipOptions,
    *,
    seed: int = 0,
    fold: int = 1,
    test_fraction: float = 0.1,
    probe: bool = True,
    max_bad: float = 0.5,
    timeout: float = 30.0,
):
    """The source that a string names: 'KIND:WHERE', see `SOURCES`.

    Args:
      spec: for example 'folder:/data/videos'.
      split: 'train' or 'test'.
      options: of its clips; `Latents` has clips already, and looks at none.
      seed: of moving_digits; the others draw from the generator of the pipeline.
      fold: of ucf101: which of the official pairs of lists, 1 to 3.
      test_fraction, probe, max_bad, timeout: see `VideoFiles`.

    Raises:
      UserError: unknown kind, or what the source cannot do.
    """
    kind, where = parse(spec)
    choose('data.split', split, SPLITS)
    if kind == 'moving_digits':
        return digits(spec, where, split, options, seed)
    if kind == 'tfds':
        return TfdsVideos(where, split, options)
    if kind == 'records':
        return RecordVideos(where, split, options)
    if kind == 'latents':
        return Latents(where, split)
    return VideoFiles(
        list_files(kind, where, fold),
        split,
        options,
        test_fraction=test_fraction,
        probe=probe,
        max_bad=max_bad,
        timeout=timeout,
    )


def list_files(kind: str, where: str, fold: int = 1) -> Listing:
    """The video files of a source of one of the kinds in `FILES`."""
    if kind == 'ucf101':
        return listings.ucf101(where, fold)
    return listings.folder(where) if kind == 'folder' else manifest.read(where)


def digits(spec: str, where: str, split: str, options: ClipOptions, seed: int) -> MovingDigits:
    """Moving digits of the size of clips; they have no frames to choose from."""
    if where and not (where.isdecimal() and int(where)):
        raise UserError(f'data.source={spec!r}: behind the colon is the number of training clips')
    if options.stride != 1 or options.fps or options.flip:
        raise UserError(
            f'data.source={spec!r} takes no stride, fps or flip (data.stride={options.stride}, '
            f'data.fps={options.fps}, data.flip={options.flip}): leave them'
        )
    sizes = {'frames': options.frames, 'height': options.height, 'width': options.width}
    size = int(where) if where and split == 'train' else None
    return MovingDigits(split, **sizes, size=size, seed=seed)
