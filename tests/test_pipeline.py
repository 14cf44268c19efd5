import json
import os
import pathlib
import subprocess
import sys

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from cmd_jax import video
from cmd_jax.data import pipeline
from cmd_jax.data.clips import Skipped


class Counting:
    """Samples that show their number and what they drew; every `holes`-th cannot be read."""

    name = 'counting'
    class_names = []

    def __init__(self, size, holes=None):
        self._size, self._holes = size, holes

    def __len__(self):
        return self._size

    def __getitem__(self, i, rng=None):
        if self._holes and i % self._holes == self._holes - 1:
            return Skipped(f'{i}', 'unreadable')
        drawn = rng.integers(256, size=(2, 3, 3, 3), dtype=np.uint8)
        return {
            'video': drawn,
            'label': np.int32(i % 3),
            'caption': 'x' * (i % 4),
            'index': np.int64(i),
        }


def take(iterator, n):
    return [next(iterator) for _ in range(n)]


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
    assert indices(dataset) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_small_sources_fill_large_batches():
    dataset = pipeline.Batches(Counting(5), 8, seed=0, shuffle=True, repeat=True)
    seen = np.ravel(indices(take(dataset, 5)))
    assert np.bincount(seen).tolist() == [8] * 5


def test_processes_share_the_samples():
    def one(process_index, process_count, batch_size, repeat):
        dataset = pipeline.Batches(
            Counting(11, holes=4),
            batch_size,
            seed=5,
            shuffle=True,
            repeat=repeat,
            process_index=process_index,
            process_count=process_count,
        )
        return [b for b, _ in zip(dataset, range(20))]

    epoch = [i for p in range(2) for b in indices(one(p, 2, 3, False)) for i in b]
    assert sorted(epoch) == [0, 1, 2, 4, 5, 6, 8, 9, 10]
    # Together they draw what one process draws.
    videos = [
        {v.tobytes() for p in range(n) for b in one(p, n, 6 // n, False) for v in b['video']}
        for n in (1, 2, 3)
    ]
    assert len(videos[0]) == 9 and videos[0] == videos[1] == videos[2]


def test_position_is_saved_in_the_middle_of_an_epoch(tmp_path):
    def make():
        source = Counting(13, holes=5)
        return pipeline.Batches(source, 4, seed=2, shuffle=True, repeat=True)

    iterator = make()
    take(iterator, 2)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(2, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
        manager.wait_until_finished()
        going_on = take(iterator, 7)
        other = make()
        args = ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(other))
        manager.restore(2, args=args)
    assert same(going_on, take(other, 7))


def test_any_number_of_workers_gives_the_same_sequence_and_goes_on(tmp_path):
    """With clips that cannot be had among them; stopped in the middle of an epoch each time."""

    def make(workers, position=0):
        source = Counting(13, holes=5)
        batches = pipeline.Batches(source, 4, seed=2, shuffle=True, repeat=True, workers=workers)
        batches.set_state({'position': position})
        return batches

    expected = take(make(0), 9)
    state, done = {'position': 0}, 0
    for workers, count in ((1, 2), (4, 3), (0, 1), (4, 2)):
        batches = make(workers, state['position'])
        try:
            assert same(take(batches, count), expected[done : done + count]), workers
        finally:
            batches.close()
        state, done = json.loads(json.dumps(batches.get_state())), done + count
    assert state['position'] > 4 * done, 'what was passed over counts'


@pytest.mark.parametrize('stop', [1, 3, 5])
def test_an_epoch_holds_every_sample_once_over_an_interruption(stop):
    """Two processes, stopped in the middle of an epoch, restarted with other workers."""
    seen = []
    for process in range(2):
        options = dict(seed=7, shuffle=True, repeat=True, process_index=process, process_count=2)
        first = pipeline.Batches(Counting(24), 2, **options)
        mine = take(first, stop)
        second = pipeline.Batches(Counting(24), 2, workers=process, **options)
        second.set_state(first.get_state())
        mine += take(second, 12 - stop)
        second.close()
        seen.append(np.ravel(indices(mine)).reshape(2, 12))
    # Two epochs of 24: in each, every index once.
    for epoch in np.concatenate(seen, axis=1):
        assert sorted(epoch) == list(range(24))
    whole = np.ravel(indices(take(pipeline.Batches(Counting(24), 4, **options | ONE), 12)))
    together = np.stack([s.ravel() for s in seen], axis=1).ravel()
    np.testing.assert_array_equal(whole, together)


ONE = {'process_index': 0, 'process_count': 1}


PROCESS = """
import json, sys, zlib
from cmd_jax.data import pipeline, sources
from cmd_jax.data.clip_options import ClipOptions

if __name__ == '__main__':
    index, count, workers, stop = map(int, sys.argv[1:5])
    options = ClipOptions(frames=4, height=16, width=16, flip=True)
    source = sources.make_source(sys.argv[5], 'train', options, test_fraction=0.001)
    given = dict(seed=3, shuffle=True, repeat=True, process_index=index, process_count=count)
    batches, seen = pipeline.Batches(source, 4 // count, **given), []
    for step in range(8):
        if step == stop:
            state = batches.get_state()
            batches.close()
            batches = pipeline.Batches(source, 4 // count, **given, workers=workers)
            batches.set_state(state)
        batch = next(batches)
        seen += [[int(i), zlib.crc32(v.tobytes())] for i, v in zip(batch['index'], batch['video'])]
    batches.close()
    print(json.dumps(seen))
"""


def test_processes_read_one_sequence_of_random_clips(tmp_path):
    """One process, and two that stop at different steps and go on with workers."""
    for i in range(8):
        noise = np.random.default_rng(i).integers(0, 256, (12, 24, 40, 3), dtype=np.uint8)
        video.write(tmp_path / 'videos' / f'{i}.mp4', noise)
    (tmp_path / 'process.py').write_text(PROCESS)
    root = pathlib.Path(__file__).parent.parent
    asked = [(0, 1, 0, -1), (0, 2, 1, 3), (1, 2, 2, 5)]
    running = [
        subprocess.Popen(
            [sys.executable, tmp_path / 'process.py', *map(str, a), f'folder:{tmp_path}/videos'],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {'PYTHONPATH': str(root)},
        )
        for a in asked
    ]
    whole, *halves = (json.loads(p.communicate(timeout=200)[0].splitlines()[-1]) for p in running)
    assert [x for pair in zip(*halves) for x in pair] == whole
    # The same video comes again, as another clip.
    assert len({tuple(x) for x in whole}) > len({i for i, _ in whole}) == 7
