"""From a source to batches: order, randomness, workers, batches (Grain)."""

import math
import os
import signal

import grain
import numpy as np
from absl import flags


class _Sample(grain.transforms.RandomMap):
    """Looks up a place of the source; a class so that workers can unpickle it."""

    def __init__(self, source):
        self._source = source

    def random_map(self, element: int, rng: np.random.Generator) -> dict | None:
        return self._source.__getitem__(element, rng)


def make_dataset(
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
) -> grain.IterDataset:
    """Batches of a source: video uint8 [b t h w 3], label int32, caption str, index int64 [b].

    The samples are one sequence, of which every process takes each process_count-th. It is
    exactly shuffled in every epoch, each time anew. What a sample draws depends on `seed` and its
    place in the sequence alone, so neither `workers` nor `process_count` changes it. Clips that
    cannot be read (None) are passed over; the next ones fill the batch.

    The iterator's position is saved by `get_state` or `grain.checkpoint.CheckpointSave`; it can be
    restored with the same number of workers and processes.

    Args:
      source: see `cmd_jax.data.sources`.
      batch_size: clips per batch in this process.
      seed: of order and of random clips, at least 0.
      shuffle: or the order of the source.
      repeat: go on for ever, batches reaching over the end of an epoch; else one epoch with a last
        batch that may be smaller (and batch numbers that may differ between processes).
      workers: processes that read and decode; 0 uses threads of this process.
      process_index: of this host among all.
      process_count: hosts.
      prefetch: batches kept ready.
    """
    samples = grain.MapDataset.range(len(source)).seed(seed)
    if shuffle:
        samples = samples.shuffle()
    if repeat:
        samples = samples.repeat()
    samples = samples.random_map(_Sample(source))[process_index::process_count]

    # Nones are kept until the sequence of the workers is whole again: dropping them in a worker
    # would make the order depend on the number of workers.
    ahead = prefetch * batch_size
    if workers:
        # Grain hands its flags to its workers and fails where no absl app has parsed any.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        read = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        per_worker = math.ceil(ahead / workers)
        options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=per_worker)
        dataset = samples.to_iter_dataset(read, allow_nones=True)
        dataset = dataset.mp_prefetch(options, worker_init_fn=_ignore_interrupts)
    else:
        # Decoding and resizing release the interpreter lock.
        threads = min(4, os.cpu_count() or 1, ahead)
        read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
        dataset = samples.to_iter_dataset(read, allow_nones=True)
    return dataset.filter(_is_read).batch(batch_size, batch_fn=_stack)


def _ignore_interrupts(worker: int, workers: int):
    # A terminal's Ctrl-C reaches the workers too; the main process decides when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _is_read(sample):
    return sample is not None


def _stack(samples):
    return {key: np.stack([sample[key] for sample in samples]) for key in samples[0]}
