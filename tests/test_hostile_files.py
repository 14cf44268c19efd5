"""Two thousand files made by mutating real ones, in one run: no crash, no hang, all counted."""

import collections
import os
import tempfile
import time

import numpy as np
import pytest

from cmd_jax import video
from cmd_jax.data import clips, pipeline, sources
from cmd_jax.data.clip_options import ClipOptions
from cmd_jax.errors import UserError
from tests.tiny_videos import encode, hostile, numbered

COUNT = 2000
OPTIONS = ClipOptions(frames=4, height=16, width=16)


def originals(folder) -> dict[str, bytes]:
    """Small videos in several containers and codecs."""
    kinds = [
        *(('a.mp4', 'libx264', 7), ('b.mkv', 'libx264', 7), ('c.avi', 'mpeg4', 5)),
        *(('d.mpg', 'mpeg1video', 5), ('e.webm', 'libvpx-vp9', 7), ('f.ts', 'libx264', 7)),
    ]
    noise = np.random.default_rng(0).integers(0, 40, (24, 32, 48, 3), dtype=np.uint8)
    for name, codec, keyframes in kinds:
        encode(folder / name, numbered(24) + noise, codec, keyframes)
    video.write(folder / 'g.mp4', numbered(24))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def mutate(data: bytes, others: list[bytes], rng) -> bytes:
    """One of: flipped bits, bytes of noise, the end cut off, a piece cut out, another's header."""
    data, kind = bytearray(data), rng.integers(5)
    if kind == 0:
        for place in rng.integers(len(data), size=rng.integers(1, 200)):
            data[place] ^= 1 << rng.integers(8)
    elif kind == 1:
        start, size = rng.integers(len(data)), rng.integers(1, 500)
        data[start : start + size] = rng.bytes(size)
    elif kind == 2:
        del data[rng.integers(len(data)) :]
    elif kind == 3:
        start = rng.integers(len(data))
        del data[start : start + rng.integers(1, len(data))]
    else:
        other = others[rng.integers(len(others))]
        size = rng.integers(8, 1000)
        data[:size] = other[:size]
    return bytes(data)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """The files, and what is known to be wrong with some of them."""
    path = tmp_path_factory.mktemp('hostile')
    (path / 'whole').mkdir()
    whole = originals(path / 'whole')
    (path / 'videos').mkdir()
    known = hostile(path / 'videos')
    (path / 'videos' / 'folder.mp4').mkdir()
    known['folder.mp4'] = 'not a file'
    rng = np.random.default_rng(0)
    names, data = list(whole), list(whole.values())
    for i in range(COUNT - len(known)):
        k = rng.integers(len(names))
        suffix = names[rng.integers(len(names)) if i % 10 == 0 else k].split('.')[1]
        (path / 'videos' / f'{i:04d}.{suffix}').write_bytes(mutate(data[k], data, rng))
    return path / 'videos', known


def test_every_file_is_read_or_counted(folder, log):
    """Each is probed, decoded in an epoch, or told of with a reason."""
    path, known = folder
    started = time.monotonic()
    spec = f'folder:{path}'
    fields = dict(max_bad=1.0, timeout=5.0, test_fraction=0.0005)
    splits = [sources.make_source(spec, split, OPTIONS, **fields) for split in sources.SPLITS]
    reasons = {f: r.split(' (')[0] for f, r in splits[0].skipped.items()}
    read = set()
    for source in splits:
        batches = pipeline.Batches(
            source, 16, seed=0, shuffle=True, repeat=False, workers=2, max_bad=1.0
        )
        for batch in batches:
            assert batch['video'].shape[1:] == (4, 16, 16, 3)
            read |= {source.file(int(i)) for i in batch['index']}
        batches.close()
        reasons |= {file: skipped.reason for file, skipped in batches.skipped.items()}
    assert len(read) + len(reasons) == COUNT and not read & reasons.keys()
    assert known.items() <= reasons.items()
    counts = collections.Counter(reasons.values())
    assert {'unreadable', 'no frames', 'ends too early'} <= set(counts), counts
    assert len(read) > 200, counts
    # Twice the time-out of one file: nothing hangs.
    assert 'takes too long' not in counts or counts['takes too long'] < 20, counts
    line = next(m for m in log.messages if ' clips of ' in m)
    assert f'skipped {len(splits[0].skipped)}: ' in line
    print(f'{len(read)} read, {counts}, {time.monotonic() - started:.0f} s')


def test_more_bad_files_than_allowed_stop_the_run(folder):
    with pytest.raises(UserError, match='videos are unreadable, more than data.max_bad=0.05') as e:
        sources.make_source(f'folder:{folder[0]}', 'train', OPTIONS, max_bad=0.05)
    assert str(e.value).count('; ') == 9, 'the first ten reasons'


def test_files_that_may_not_be_read_are_unreadable():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        for name, mode in (('open.mp4', 0o644), ('closed.mp4', 0)):
            video.write(f'{folder}/{name}', numbered(4))
            os.chmod(f'{folder}/{name}', mode)
        user = os.geteuid()
        try:
            if user == 0:  # who may read everything
                os.seteuid(65534)
            assert clips.probe(f'{folder}/open.mp4').frames == 4
            with pytest.raises(clips.BadVideo, match='unreadable .Permission denied'):
                clips.probe(f'{folder}/closed.mp4')
        finally:
            os.seteuid(user)


def test_a_file_that_takes_too_long_is_given_up(tmp_path):
    encode(tmp_path / 'x.mp4', numbered(200, 240, 320), 'libx264', 200)
    with pytest.raises(clips.BadVideo, match='takes too long .more than 0.0001 s'):
        clips.decode(tmp_path / 'x.mp4', np.arange(190, 200), timeout=1e-4)
    with pytest.raises(clips.BadVideo, match='takes too long'):
        clips.probe(tmp_path / 'x.mp4', timeout=0.0)
    assert len(clips.decode(tmp_path / 'x.mp4', np.arange(190, 200))) == 10
