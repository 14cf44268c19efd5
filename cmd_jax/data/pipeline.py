"""From a source to batches: order, randomness, workers, batches (Grain).

The samples of a source are one sequence: epoch after epoch, each a new exact shuffle, in which
every sample comes once. What a sample draws depends on the seed and its place in the sequence
alone, and so does what replaces one that cannot be had. Process p of n takes the places p, p + n,
p + 2 n, ... of it; workers share these without changing their order. A batch may reach over the end
of an epoch. How far the sequence was read is one number, the same in all processes.
"""

import itertools
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator

import grain
import numpy as np
from absl import flags, logging

from cmd_jax.data import clips, videos
from cmd_jax.errors import UserError

SEEN = 100  # samples after which the share of bad ones counts
IN_A_ROW = 10_000  # most samples in a row that cannot be had
# A place is given up when, at the share of bad samples allowed, a good one had been due so often:
# by chance that happens once in exp(30).
DUE = 30


class _Sample(grain.transforms.RandomMap):
    """Looks up a place of the source; a class so that workers can unpickle it."""

    def __init__(self, source):
        self._source = source

    def random_map(self, element: int, rng: np.random.Generator) -> dict | clips.Skipped:
        return self._source.__getitem__(element, rng)


class _Replace(grain.transforms.MapWithIndex):
    """Puts other samples of the source in the places of those that cannot be had.

    They are drawn from the seed, the place and the number of the attempt alone; none comes twice
    before all have come. Gives good samples as they are; of others (the replacement, or None where
    the place is given up; all that was skipped on the way).
    """

    def __init__(self, source, seed: int, max_bad: float):
        self._source, self._seed, self._max_bad = source, seed, max_bad

    def map_with_index(self, index: int, element: dict | clips.Skipped) -> dict | tuple:
        if not isinstance(element, clips.Skipped):
            return element
        size, tried, skipped, bad = len(self._source), set(), [], 0
        while isinstance(element, clips.Skipped):
            skipped.append(element)
            bad += element.reason != clips.TOO_SHORT
            row = len(skipped)
            due = row * (1 - self._max_bad) >= DUE and bad > self._max_bad * row
            if row >= _most(self._source) or due:
                return None, skipped
            rng = np.random.default_rng((self._seed, index, row))
            number = int(rng.integers(size))
            while number in tried:
                number = int(rng.integers(size))
            tried.add(number)
            if len(tried) == size:
                tried.clear()
            element = self._source.__getitem__(number, rng)
        return element, skipped


def samples(
    source,
    *,
    seed: int,
    shuffle: bool,
    repeat: bool,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    ahead: int = 16,
    start: int = 0,
    replace: Callable | grain.transforms.MapWithIndex | None = None,
) -> Iterator:
    """The samples of a process in their order, dict or `clips.Skipped`; `close()` ends its workers.

    Args:
      source: see `cmd_jax.data.sources`.
      seed: of order and of random clips, at least 0.
      shuffle: or the order of the source.
      repeat: for ever, or once.
      workers: processes that read and decode; 0: threads of this process.
      process_index: of this host among all.
      process_count: hosts.
      ahead: samples kept ready.
      start: places of the sequence to pass over, unread, before the processes share the rest.
      replace: (place in the sequence, sample) -> what comes instead; called in the workers.
    """
    sequence = grain.MapDataset.range(len(source)).seed(seed)
    if shuffle:
        sequence = sequence.shuffle()
    if repeat:
        sequence = sequence.repeat()
    sequence = sequence.random_map(_Sample(source))
    if replace:
        sequence = sequence.map_with_index(replace)
    sequence = sequence[start + process_index :: process_count]
    if workers:
        # Grain hands its flags to its workers and fails where no absl app has parsed any.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        read = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        buffer = math.ceil(ahead / workers)
        options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=buffer)
        dataset = sequence.to_iter_dataset(read)
        return iter(dataset.mp_prefetch(options, worker_init_fn=_begin_worker))
    # Decoding and resizing release the interpreter lock.
    threads = min(4, os.cpu_count() or 1, ahead)
    read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    return iter(sequence.to_iter_dataset(read))


def _begin_worker(worker: int, workers: int):
    # A terminal's Ctrl-C reaches the workers too, and a cluster's SIGTERM; the main process decides
    # when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name='parent', daemon=True).start()


def _end_with_parent():
    # Grain's workers would wait for ever for room in a queue that nobody reads any more.
    multiprocessing.parent_process().join()
    os._exit(1)


def _most(source) -> int:
    """Samples in a row that may be bad: those may come last in one epoch and first in the next."""
    return min(2 * len(source), IN_A_ROW)


class Batches:
    """An iterator over batches of a source: what its samples have, stacked along a new first axis.

    Samples that cannot be had are told of once and counted. Where the source repeats, others
    replace them, drawn by chance, and the batches of all processes together depend on the seed and
    `position` alone: a run can go on with another number of processes, workers or samples per
    batch. In a single epoch they are passed over, and the next ones of the process fill its batch.

    A batch also has `place`, int32 [n]: where its samples lie in the batch of all processes, each
    of 0 ... batch_size - 1 once.

    Attributes:
      skipped: {file: clips.Skipped} of what could not be had since this object was made.
    """

    def __init__(
        self,
        source,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool,
        repeat: bool,
        workers: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        prefetch: int = 2,
        max_bad: float = 0.5,
    ):
        """Nothing is read before the first batch is asked for.

        Args:
          source, seed, shuffle, workers, process_index, process_count: see `samples`.
          batch_size: samples per batch of all processes; each reads its equal share.
          repeat: go on for ever; else one epoch with a last batch that may be smaller (and numbers
            of batches that may differ between processes).
          prefetch: batches kept ready.
          max_bad: share of the samples that may be unreadable.

        Raises:
          UserError: a batch that the processes cannot share equally.
        """
        if batch_size % process_count:
            raise UserError(
                f'batch_size={batch_size}: {process_count} processes cannot share it equally, '
                'take a multiple'
            )
        self._options = dict(
            source=source,
            seed=seed,
            shuffle=shuffle,
            repeat=repeat,
            workers=workers,
            process_index=process_index,
            process_count=process_count,
            ahead=prefetch * (batch_size // process_count),
            replace=_Replace(source, seed, max_bad) if repeat else None,
        )
        self._source, self._max_bad = source, max_bad
        self._places = np.arange(process_index, batch_size, process_count, dtype=np.int32)
        # Where reading began in the sequence, and the places that this process has read since.
        self._samples, self._start, self._read = None, 0, 0
        self._seen = self._lost = self._bad = self._row = 0
        self.skipped = {}

    def __iter__(self) -> 'Batches':
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """The next batch.

        Raises:
          UserError: too many samples cannot be had.
        """
        if self._samples is None:
            self._samples = samples(**self._options, start=self.position)
        batch = []
        while len(batch) < len(self._places):
            sample = next(self._samples, None)
            if sample is None:
                break
            self._read += 1
            sample = self._count(sample)
            if sample is not None:
                batch.append(sample)
        if not batch:
            raise StopIteration
        stacked = {key: np.stack([sample[key] for sample in batch]) for key in batch[0]}
        return stacked | {'place': self._places[: len(batch)].copy()}

    @property
    def position(self) -> int:
        """Places of the sequence that all processes together have read. In a single epoch, where
        processes may read unequally far, as many as if all had read like this one."""
        return self._start + self._read * self._options['process_count']

    def seek(self, position: int):
        """Goes on from a position, also of a run with another batch size or number of processes."""
        self.close()
        self._start, self._read = position, 0

    def close(self):
        """Ends the workers, and tells how much was passed over."""
        if self._samples is None:
            return
        self._samples.close()
        self._samples = None
        if self.skipped:
            counts = videos.tally(s.reason for s in self.skipped.values())
            logging.info(
                '%s: of %d samples, %d could not be had (unreadable: %d); by file: %s',
                *(self._source.name, self._seen, self._lost, self._bad, counts),
            )

    def _count(self, sample: dict | clips.Skipped | tuple) -> dict | None:
        """What there is of a place; what could not be had is counted, and judged."""
        skipped = ()
        if isinstance(sample, clips.Skipped):
            sample, skipped = None, (sample,)
        elif isinstance(sample, tuple):
            sample, skipped = sample
        for one in skipped:
            self._skip(one)
        if sample is not None:
            self._seen += 1
            self._row = 0
        elif self._options['repeat']:
            self._stop()
        return sample

    def _skip(self, sample: clips.Skipped):
        if sample.file not in self.skipped:
            logging.warning('%s cannot be used: %s', self._source.name, sample)
            self.skipped[sample.file] = sample
        self._seen += 1
        self._lost += 1
        self._bad += sample.reason != clips.TOO_SHORT
        self._row += 1
        # In a few samples of a sequence without end the bad ones may come first by chance.
        enough = SEEN if self._options['repeat'] else min(len(self._source), SEEN)
        if self._row >= _most(self._source) or (self._seen >= enough and self._too_bad()):
            self._stop()

    def _too_bad(self) -> bool:
        return self._bad > self._max_bad * self._seen

    def _stop(self):
        what = f'{self._row} samples in a row'
        if self._too_bad():
            share = f'more than data.max_bad={self._max_bad}'
            what = f'{self._bad} of {self._seen} samples, {share},'
        first = '; '.join(str(s) for s in itertools.islice(self.skipped.values(), videos.FIRST))
        counts = videos.tally(s.reason for s in self.skipped.values())
        raise UserError(f'{self._source.name}: {what} cannot be had ({counts}): {first}')
