"""From a source to batches: order, randomness, workers, batches (Grain).

The samples of a source are one sequence: epoch after epoch, each a new exact shuffle, in which
every sample comes once. What a sample draws depends on the seed and its place in the sequence
alone. Process p of n takes the places p, p + n, p + 2 n, ... of it; workers share these without
changing their order. A batch may reach over the end of an epoch.
"""

import itertools
import math
import os
import signal
from collections.abc import Iterator

import grain
import numpy as np
from absl import flags, logging

from cmd_jax.data import clips, videos
from cmd_jax.errors import UserError

SEEN = 100  # samples after which the share of bad ones counts
IN_A_ROW = 10_000  # most samples in a row that cannot be had


class _Sample(grain.transforms.RandomMap):
    """Looks up a place of the source; a class so that workers can unpickle it."""

    def __init__(self, source):
        self._source = source

    def random_map(self, element: int, rng: np.random.Generator) -> dict | clips.Skipped:
        return self._source.__getitem__(element, rng)


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
) -> Iterator[dict | clips.Skipped]:
    """The samples of a process in their order; `close()` ends its workers.

    Args:
      source: see `cmd_jax.data.sources`.
      seed: of order and of random clips, at least 0.
      shuffle: or the order of the source.
      repeat: for ever, or once.
      workers: processes that read and decode; 0: threads of this process.
      process_index: of this host among all.
      process_count: hosts.
      ahead: samples kept ready.
      start: samples of this process to pass over, unread.
    """
    sequence = grain.MapDataset.range(len(source)).seed(seed)
    if shuffle:
        sequence = sequence.shuffle()
    if repeat:
        sequence = sequence.repeat()
    sequence = sequence.random_map(_Sample(source))[process_index::process_count]
    if start:
        sequence = sequence[start:]
    if workers:
        # Grain hands its flags to its workers and fails where no absl app has parsed any.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        read = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        buffer = math.ceil(ahead / workers)
        options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=buffer)
        dataset = sequence.to_iter_dataset(read)
        return iter(dataset.mp_prefetch(options, worker_init_fn=_ignore_interrupts))
    # Decoding and resizing release the interpreter lock.
    threads = min(4, os.cpu_count() or 1, ahead)
    read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    return iter(sequence.to_iter_dataset(read))


def _ignore_interrupts(worker: int, workers: int):
    # A terminal's Ctrl-C reaches the workers too; the main process decides when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Batches(grain.DatasetIterator):
    """Batches of a source: what its samples have, stacked along a new first axis.

    Samples that cannot be had are passed over, told of once and counted; the next ones fill the
    batch (of several processes, the one that passes over a sample goes ahead in its own places).
    The position is saved by `get_state` or `grain.checkpoint.CheckpointSave`, and can be restored
    with another number of workers.

    Attributes:
      skipped: {file: clips.Skipped} of what was passed over since this object was made.
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
          batch_size: samples per batch in this process.
          repeat: go on for ever; else one epoch with a last batch that may be smaller (and numbers
            of batches that may differ between processes).
          prefetch: batches kept ready.
          max_bad: share of the samples that may be unreadable.
        """
        super().__init__()
        self._options = dict(
            source=source,
            seed=seed,
            shuffle=shuffle,
            repeat=repeat,
            workers=workers,
            process_index=process_index,
            process_count=process_count,
            ahead=prefetch * batch_size,
        )
        self._source, self._batch_size, self._max_bad = source, batch_size, max_bad
        self._samples, self._position = None, 0
        self._seen = self._lost = self._bad = self._row = 0
        self.skipped = {}

    def __next__(self) -> dict[str, np.ndarray]:
        """The next batch.

        Raises:
          UserError: too many samples cannot be had.
        """
        if self._samples is None:
            self._samples = samples(**self._options, start=self._position)
        batch = []
        while len(batch) < self._batch_size:
            sample = next(self._samples, None)
            if sample is None:
                break
            self._position += 1
            self._seen += 1
            if isinstance(sample, clips.Skipped):
                self._skip(sample)
            else:
                self._row = 0
                batch.append(sample)
        if not batch:
            raise StopIteration
        return {key: np.stack([sample[key] for sample in batch]) for key in batch[0]}

    def get_state(self) -> dict[str, int]:
        """{'position': samples of this process that were read}."""
        return {'position': self._position}

    def set_state(self, state: dict[str, int]):
        self.close()
        self._position = state['position']

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

    def start_prefetch(self):
        """For Grain's checkpoints, which call it after `set_state`: the first batch starts it."""

    def _skip(self, sample):
        if sample.file not in self.skipped:
            logging.warning('%s cannot be used: %s', self._source.name, sample)
            self.skipped[sample.file] = sample
        self._lost += 1
        self._bad += sample.reason != clips.TOO_SHORT
        self._row += 1
        # The bad ones may come last in one epoch and first in the next.
        most = min(2 * len(self._source), IN_A_ROW)
        if self._seen >= min(len(self._source), SEEN) and self._bad > self._max_bad * self._seen:
            what = f'{self._bad} of {self._seen} samples, more than data.max_bad={self._max_bad},'
        elif self._row >= most:
            what = f'{self._row} samples in a row'
        else:
            return
        first = '; '.join(str(s) for s in itertools.islice(self.skipped.values(), videos.FIRST))
        counts = videos.tally(s.reason for s in self.skipped.values())
        raise UserError(f'{self._source.name}: {what} cannot be had ({counts}): {first}')
