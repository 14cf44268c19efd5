import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from cmd_jax import video
from cmd_jax.data import pipeline
from cmd_jax.data.clips import TOO_SHORT, Skipped
from cmd_jax.errors import UserError


class Counting:
    """Samples that show their number and what they drew; every `holes`-th cannot be read, or those
    of a set."""

    name = 'counting'
    class_names = []

    def __init__(self, size, holes=None, reason='unreadable'):
        if isinstance(holes, int):
            holes = set(range(holes - 1, size, holes))
        self._size, self._holes, self._reason = size, holes or set(), reason

    def __len__(self):
        return self._size

    def __getitem__(self, i, rng=None):
        if i in self._holes:
            return Skipped(f'{i}', self._reason)
        drawn = rng.integers(256, size=(2, 3, 3, 3), dtype=np.uint8)
        return {
            'video': drawn,
            'label': np.int32(i % 3),
            'caption': 'x' * (i % 4),
            'index': np.int64(i),
        }


def take(iterator, n):
    return [next(iterator) for _ in range(n)]


def rows(batches):
    """[(place, index, what was drawn)] of the batches that processes read for one step."""
    return sorted(
        (int(p), int(i), v.tobytes())
        for b in batches
        for p, i, v in zip(b['place'], b['index'], b['video'], strict=True)
    )


def indices(batches):
    return [b['index'].tolist() for b in batches]


def same(a, b):
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(np.array_equal(x[k], y[k]) for k in x) for x, y in zip(a, b)
    )


def test_batches_have_the_promised_types():
    batch = next(pipeline.Batches(Counting(9), 4, seed=0, shuffle=False, repeat=True))
    assert batch['video'].shape == (4, 2, 3, 3, 3) and batch['video'].dtype == np.uint8
    assert batch['label'].dtype == np.int32 and batch['label'].tolist() == [0, 1, 2, 0]
    assert (
        batch['caption'].tolist() == ['', 'x', 'xx', 'xxx'] and batch['caption'].dtype.kind == 'U'
    )
    assert batch['index'].dtype == np.int64 and batch['index'].tolist() == [0, 1, 2, 3]
    assert batch['place'].dtype == np.int32 and batch['place'].tolist() == [0, 1, 2, 3]


def test_each_epoch_is_a_new_exact_shuffle():
    def make(seed):
        return pipeline.Batches(Counting(24), 6, seed=seed, shuffle=True, repeat=True)

    batches = take(make(1), 12)
    epochs = np.reshape(indices(batches), (3, 24))
    assert (np.sort(epochs) == np.arange(24)).all()
    assert len({tuple(e) for e in epochs}) == 3 and tuple(epochs[0]) != tuple(range(24))
    assert same(batches, take(make(1), 12))
    assert indices(batches) != indices(take(make(2), 12))
    # A sample that comes again draws anew.
    drawn = {b['video'][k].tobytes() for b in batches for k in range(6) if b['index'][k] == 5}
    assert len(drawn) == 3


def test_evaluation_keeps_order_and_remainder():
    dataset = pipeline.Batches(Counting(10), 4, seed=0, shuffle=False, repeat=False)
    batches = list(dataset)
    assert indices(batches) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [b['place'].tolist() for b in batches] == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1]]


def test_small_sources_fill_large_batches():
    dataset = pipeline.Batches(Counting(5), 8, seed=0, shuffle=True, repeat=True)
    seen = np.ravel(indices(take(dataset, 5)))
    assert np.bincount(seen).tolist() == [8] * 5


def test_processes_share_an_epoch_and_pass_over_what_cannot_be_had():
    def one(process_index, process_count):
        dataset = pipeline.Batches(
            Counting(11, holes=4),
            6,
            seed=5,
            shuffle=True,
            repeat=False,
            process_index=process_index,
            process_count=process_count,
        )
        return list(dataset)

    epoch = [i for p in range(2) for b in indices(one(p, 2)) for i in b]
    assert sorted(epoch) == [0, 1, 2, 4, 5, 6, 8, 9, 10]
    # Together they draw what one process draws.
    videos = [
        {v.tobytes() for p in range(n) for b in one(p, n) for v in b['video']} for n in (1, 2, 3)
    ]
    assert len(videos[0]) == 9 and videos[0] == videos[1] == videos[2]


SHARED = dict(seed=2, shuffle=True, repeat=True)


def read(source, count, batch_size, position=0, processes=1, workers=0):
    """`count` steps of all processes, as `rows`."""
    steps, positions = [[] for _ in range(count)], set()
    for p in range(processes):
        batches = pipeline.Batches(
            source,
            batch_size,
            **SHARED,
            workers=workers,
            process_index=p,
            process_count=processes,
        )
        batches.seek(position)
        try:
            for step in steps:
                step.append(next(batches))
        finally:
            batches.close()
        positions.add(batches.position)
    assert positions == {position + count * batch_size}
    return [rows(step) for step in steps]


@pytest.mark.parametrize(
    'processes, workers, holes',
    [(1, 1, 5), (1, 2, 5), (2, 1, 5), (4, 1, 5), (2, 2, 2)]
    + [(processes, 0, holes) for processes in (2, 4, 8) for holes in (None, 5, 2)],
)
def test_batches_do_not_depend_on_processes_and_workers(processes, workers, holes):
    source = Counting(13, holes)
    expected = read(source, 5, 8)
    assert all([place for place, *_ in step] == list(range(8)) for step in expected)
    assert read(source, 5, 8, processes=processes, workers=workers) == expected


def test_what_cannot_be_had_is_replaced_in_its_own_place():
    """The others are those of `samples`, which knows of no replacing."""
    source = Counting(13, holes={3, 4, 8, 11})
    plain = take(pipeline.samples(source, **SHARED), 26 * 4)
    batches = pipeline.Batches(source, 26, **SHARED)
    found = [row for step in map(rows, zip(take(batches, 4))) for row in step]
    lost, replacements = 0, []
    for sample, (_, index, drawn) in zip(plain, found, strict=True):
        if isinstance(sample, Skipped):
            lost += 1
            replacements.append((index, drawn))
        else:
            assert (index, drawn) == (sample['index'], sample['video'].tobytes())
    assert lost == 4 * 8 and batches.skipped.keys() == {'3', '4', '8', '11'}
    # By chance, each time anew, and never the same clip twice.
    assert {i for i, _ in replacements} == {0, 1, 2, 5, 6, 7, 9, 10, 12}
    assert len({drawn for _, _, drawn in found}) == len(found)


@pytest.mark.parametrize('size, holes', [(2, {0}), (3, {1, 2}), (40, set(range(39)))])
def test_what_is_there_is_found(size, holes):
    """A place is not given up before everything in the source was tried."""
    batches = pipeline.Batches(Counting(size, holes, TOO_SHORT), 50, **SHARED)
    good = sorted(set(range(size)) - holes)
    assert {i for b in take(batches, 4) for i in b['index']} == set(good)


@pytest.mark.parametrize('holes', [None, 5])
@pytest.mark.parametrize('stop, size', [(24, 8), (24, 12), (24, 4), (13, 4), (5, 8)])
@pytest.mark.parametrize('processes', [1, 2, 4])
def test_a_run_goes_on_with_other_processes_and_batch_sizes(processes, stop, size, holes):
    """From places in the middle of epochs, also ones that the processes do not divide."""
    source = Counting(13, holes)
    whole = [x[1:] for x in read(source, 1, 80)[0]]
    steps = read(source, 3, size, position=stop, processes=processes)
    assert [[p for p, *_ in step] for step in steps] == [list(range(size))] * 3
    assert [x[1:] for step in steps for x in step] == whole[stop : stop + 3 * size]


def test_a_run_stopped_again_and_again_reads_the_same():
    """By two processes with workers, one, four and two; the position goes through JSON."""
    source = Counting(13, holes=5)
    expected, position, found = read(source, 8, 4), 0, []
    for processes, workers, count in ((2, 1, 2), (1, 0, 3), (4, 0, 1), (2, 2, 2)):
        found += read(source, count, 4, position, processes, workers)
        position = json.loads(json.dumps(position + 4 * count))
    assert found == expected


def test_the_position_moves_with_the_batches_and_closing_keeps_it():
    batches = pipeline.Batches(Counting(13, holes=5), 4, **SHARED)
    assert batches.position == 0
    first = take(batches, 3)
    assert batches.position == 12
    batches.close()
    going_on = take(batches, 2)
    assert batches.position == 20
    batches.seek(0)
    assert same(take(batches, 5), first + going_on)
    batches.seek(12)
    assert batches.position == 12 and same(take(batches, 2), going_on)


@pytest.mark.parametrize('stop', [1, 3, 5])
def test_an_epoch_holds_every_sample_once_over_an_interruption(stop):
    """Two processes, stopped in the middle of an epoch; one goes on."""
    source = Counting(24)
    steps = read(source, stop, 4, processes=2)
    steps += read(source, 12 - stop, 4, position=4 * stop)
    for epoch in np.reshape([i for step in steps for _, i, _ in step], (2, 24)):
        assert sorted(epoch) == list(range(24))


class Calls(Counting):
    """Notes how often it is asked."""

    calls = 0

    def __getitem__(self, i, rng=None):
        self.calls += 1
        return super().__getitem__(i, rng)


def test_too_many_bad_samples_stop_training_with_the_reasons():
    def run(source, **options):
        made = pipeline.Batches(source, 4, **SHARED, **options)
        with pytest.raises(UserError) as error:
            take(made, 100)
        made.close()
        return str(error.value)

    # Two thirds are bad, which shows after a hundred samples.
    mixed = Counting(300, {i for i in range(300) if i % 3})
    told = run(mixed)
    assert told == run(mixed, workers=1)
    assert 'samples, more than data.max_bad=0.5, cannot be had (' in told
    bad, seen = map(int, told.split(': ')[1].split(' samples')[0].split(' of '))
    assert seen >= 100 and 0.5 < bad / seen < 0.8
    assert told.count(': unreadable') == 10 and '\n' not in told

    everything = Calls(1000_000, range(1000_000))
    assert run(everything).startswith('counting: 60 of 60 samples, more than data.max_bad=0.5,')
    # The places read ahead, each with as many attempts.
    assert 60 <= everything.calls <= 60 * 20

    # A small source is gone through twice.
    assert run(Counting(8, 1)).startswith('counting: 16 of 16 samples, more than data.max_bad=0.5,')
    for told in (run(Counting(8, 1, TOO_SHORT)), run(Counting(8, 1), max_bad=1.0)):
        assert told.startswith('counting: 16 samples in a row cannot be had (')

    # What is allowed stops nothing.
    assert len(take(pipeline.Batches(mixed, 4, **SHARED, max_bad=0.9), 60)) == 60


def test_what_cannot_be_had_is_told_of_once(log):
    batches = pipeline.Batches(Counting(10, holes=5), 10, **SHARED)
    take(batches, 6)
    assert batches.skipped.keys() == {'4', '9'}
    assert sum('counting cannot be used: 4: unreadable' in m for m in log.messages) == 1
    batches.close()
    batches.close()
    told = [m for m in log.messages if 'could not be had' in m]
    assert len(told) == 1
    seen, lost = (int(told[0].split()[k]) for k in (2, 4))
    assert seen - lost == 60 and lost >= 12, 'each attempt is a sample'


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(UserError, match='batch_size=10: 4 processes cannot share it'):
        pipeline.Batches(Counting(24), 10, **SHARED, process_count=4)


PROCESS = """
import json, sys, zlib
from cmd_jax.data import pipeline, sources
from cmd_jax.data.clip_options import ClipOptions

if __name__ == '__main__':
    index, count, workers, stop = map(int, sys.argv[1:5])
    options = ClipOptions(frames=4, height=16, width=16, flip=True)
    source = sources.make_source(sys.argv[5], 'train', options, test_fraction=0.001)
    given = dict(seed=3, shuffle=True, repeat=True, process_index=index, process_count=count)
    batches, seen = pipeline.Batches(source, 4, **given), []
    for step in range(8):
        if step == stop:
            position = batches.position
            batches.close()
            batches = pipeline.Batches(source, 4, **given, workers=workers)
            batches.seek(position)
        batch = next(batches)
        assert batches.position == 4 * (step + 1)
        for place, i, clip in zip(batch['place'], batch['index'], batch['video']):
            seen.append([4 * step + int(place), int(i), zlib.crc32(clip.tobytes())])
    batches.close()
    print(json.dumps([seen, list(batches.skipped)]))
"""


def test_processes_read_one_sequence_of_random_clips(tmp_path):
    """One process, and two that stop at the same step and go on with workers; of a file that
    turns out to be damaged, too."""
    for i in range(8):
        noise = np.random.default_rng(i).integers(0, 256, (12, 24, 40, 3), dtype=np.uint8)
        video.write(tmp_path / 'videos' / f'{i}.mp4', noise)
    data = (tmp_path / 'videos' / '5.mp4').read_bytes()
    (tmp_path / 'videos' / '5.mp4').write_bytes(data[: len(data) // 2])
    (tmp_path / 'process.py').write_text(PROCESS)
    root = pathlib.Path(__file__).parent.parent
    asked = [(0, 1, 0, -1), (0, 2, 1, 3), (1, 2, 2, 3)]
    running = [
        subprocess.Popen(
            [sys.executable, tmp_path / 'process.py', *map(str, a), f'folder:{tmp_path}/videos'],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {'PYTHONPATH': str(root)},
        )
        for a in asked
    ]
    try:
        told = [json.loads(p.communicate(timeout=200)[0].splitlines()[-1]) for p in running]
    finally:
        for process in running:
            process.kill()
    (whole, skipped), *halves = told
    assert sorted(x for seen, _ in halves for x in seen) == whole
    assert skipped == ['5.mp4'] and ['5.mp4'] in [found for _, found in halves]
    # The same video comes again, as another clip.
    assert len({tuple(x[1:]) for x in whole}) > len({i for _, i, _ in whole})
