"""What a run tells: metrics.jsonl, TensorBoard, the progress bar, model FLOP/s."""

import contextlib
import json
import math
import time
from pathlib import Path

import jax
from absl import logging
from tqdm import tqdm

from cmd_jax import atomic
from cmd_jax.errors import UserError
from cmd_jax.memory import peak_memory_gb

# Dense bfloat16 peak of one chip in FLOP/s, from the vendors' data sheets.
PEAK_FLOPS = {
    'TPU v4': 275e12,
    'TPU v5 lite': 197e12,
    'TPU v5e': 197e12,
    'TPU v5': 459e12,
    'TPU v5p': 459e12,
    'TPU v6 lite': 918e12,
    'TPU v6e': 918e12,
    'NVIDIA A100-SXM4-40GB': 312e12,
    'NVIDIA A100-SXM4-80GB': 312e12,
    'NVIDIA H100 80GB HBM3': 989e12,
    'NVIDIA H200': 989e12,
}


def read(path: Path) -> list[dict]:
    """The records of a metrics.jsonl; none where there is no file. JSON null: not finite."""
    lines = path.read_text().splitlines() if path.exists() else []
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            # The process was killed while it wrote the line.
            break
    return records


class Metrics:
    """Writes scalars to FOLDER/metrics.jsonl, a line a step, and to TensorBoard.

    Args:
      folder: of the stage.
      step: the step that training goes on from; later lines of an interrupted run are dropped, so
        that the file reads as if there had been no interruption.
      started: when this process began with the stage, as time.time().
      tensorboard: event files through clu, which imports TensorFlow.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool, started: float):
        self.path = Path(folder) / 'metrics.jsonl'
        kept = [record for record in read(self.path) if record['step'] <= step]
        atomic.write(self.path, ''.join(json.dumps(record) + '\n' for record in kept))
        self.seconds_before = kept[-1]['seconds'] if kept else 0.0
        self.started = started
        self.writer = None
        if tensorboard:
            self.writer = tensorboard_writer(folder)

    def write(self, step: int, scalars: dict[str, float]):
        """Adds `seconds` (wall-clock time in this stage, over all its processes), `memory_gb`.

        Raises:
          UserError: the file cannot be written.
        """
        seconds = self.seconds_before + time.time() - self.started
        finite = {k: v if math.isfinite(v) else None for k, v in scalars.items()}
        cost = {'seconds': round(seconds, 3), 'memory_gb': round(peak_memory_gb(), 3)}
        record = {'step': step} | finite | cost
        try:
            with self.path.open('a') as f:
                f.write(json.dumps(record) + '\n')
        except OSError as e:
            raise UserError(
                f'{self.path} cannot be written ({e.strerror}): make room or mend the folder, and '
                'start again'
            ) from e
        if self.writer is not None:
            self.writer.write_scalars(step, scalars)

    def close(self):
        if self.writer is not None:
            self.writer.close()


def tensorboard_writer(folder: Path):
    """clu's writer, or None (logged) where TensorFlow is absent."""
    try:
        import tensorflow as tf
        from clu import metric_writers
    except ImportError as e:
        logging.warning('no TensorBoard files: %s (metrics.jsonl is written)', e)
        return None
    # TensorFlow would take the accelerator's memory.
    tf.config.set_visible_devices([], 'GPU')
    return metric_writers.SummaryWriter(str(folder))


class Trace:
    """A profiler trace of steps 11 to 15 of this process (fewer if it ends before) in `folder`.

    XProf and Perfetto show it.
    """

    def __init__(self, folder: Path, step: int):
        self.folder, self.step, self.first, self.last = folder, step, step + 10, step + 15
        self.on = False

    def update(self, step: int, result):
        """To be called after each step, with something that the step computes."""
        self.step = step
        if step == self.first:
            jax.block_until_ready(result)
            jax.profiler.start_trace(self.folder)
            self.on = True
        elif step == self.last:
            jax.block_until_ready(result)
            self.stop()

    def stop(self):
        if self.on:
            self.on = False
            jax.profiler.stop_trace()
            logging.info('profile of %d steps in %s', self.step - self.first, self.folder)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()
        if self.step <= self.first:
            logging.warning('no profile: it is of the steps behind the first ten')


class Progress:
    """A bar with loss, videos/s, model FLOP/s and, where the device's peak is known, MFU."""

    def __init__(self, name: str, step: int, steps: int, batch_size: int, flops: float):
        about = dict(total=steps, initial=step, desc=name, unit='step', dynamic_ncols=True)
        try:
            self.bar = tqdm(**about)
        except OSError:  # nobody looks
            self.bar = tqdm(**about, disable=True)
        self.batch_size, self.flops = batch_size, flops
        peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
        self.peak = peak and peak * jax.device_count()
        self.since = self.last = None

    def update(self, step: int):
        with contextlib.suppress(OSError):  # nobody looks at it any more: no reason to stop
            self.bar.update(step - self.bar.n)
        # Speed is measured from the end of the first step.
        if self.since is None:
            self.since, self.last = time.time(), step

    def speed(self, step: int) -> dict[str, float]:
        """Videos/s and model FLOP/s since the last call."""
        now = time.time()
        seconds, steps = max(now - self.since, 1e-9), step - self.last
        self.since, self.last = now, step
        if not steps:
            return {}
        rates = {'videos_per_second': steps * self.batch_size / seconds}
        rates['model_tflops_per_second'] = steps * self.flops / seconds / 1e12
        if self.peak:
            rates['mfu'] = steps * self.flops / seconds / self.peak
        return rates

    def show(self, scalars: dict[str, float]):
        names = {'loss': 'loss', 'psnr': 'psnr', 'videos_per_second': 'videos/s'}
        names |= {'model_tflops_per_second': 'TFLOP/s', 'mfu': 'MFU'}
        told = {b: f'{scalars[a]:.3g}' for a, b in names.items() if a in scalars}
        with contextlib.suppress(OSError):
            self.bar.set_postfix(told)

    def close(self):
        with contextlib.suppress(OSError):
            self.bar.close()
