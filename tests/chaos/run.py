"""Runs that are killed at random moments, and the comparison with one that is not."""

import contextlib
import dataclasses
import json
import os
import random
import select
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from cmd_jax.training import integrity
from tests.test_resume import COST, state

ROOT = Path(__file__).parents[2]
STAGE = 'autoencoder'
FLAGS = {
    'data.frames': 4,
    'data.height': 16,
    'data.width': 16,
    'data.workers': 1,
    'autoencoder.model.patch': 4,
    'autoencoder.model.dim': 16,
    'autoencoder.model.depth': 1,
    'autoencoder.model.heads': 2,
    'autoencoder.train.log_every': 1,
    'autoencoder.train.save_every': 2,
    'autoencoder.train.preview_every': 3,
    'autoencoder.train.keep_checkpoints': 1,
}
# A kill comes at any time after the first step or the restore begins ('any'), in the first seconds
# of a process ('start'), or while one of these phases lasts.
AIMED = ('save', 'seal', 'delete', 'verify', 'restore', 'preview', 'start')
NEED_A_CHECKPOINT = ('verify', 'restore')
PHASES = ('verify', 'restore', 'preview', 'save', 'seal', 'delete')
PATIENCE = 300.0  # seconds that nothing may take longer than
OUTLIVE = 10.0  # seconds that others may outlive the main process
LEAVE = 15.0  # seconds from SIGTERM to the end
RESUMABLE = 75  # exit status after SIGTERM


class Life:
    """One process of train.py, in a group of its own, and what it tells.

    Attributes:
      events: [(when, what)]; times are seconds of the monotonic clock.
      started, struck, ended: when it was started, was sent a signal (or None), had ended.
      code: the exit status.
      outlived: seconds by which the last of its group outlived it; None: they had to be killed.
    """

    def __init__(self, workdir: Path, steps: int, log: Path):
        read, write = os.pipe()
        flags = {**FLAGS, f'{STAGE}.train.steps': steps}
        command = [sys.executable, '-m', 'tests.chaos.child', str(write)]
        command += [f'--config=configs/quickstart.py:{STAGE},tiny', f'--workdir={workdir}']
        command += [f'--config.{name}={value}' for name, value in flags.items()]
        self.log, self.events, self.struck, self.whom = log, [], None, ''
        self.started = time.monotonic()
        with log.open('ab') as out:
            self._process = subprocess.Popen(
                command, cwd=ROOT, stdout=out, stderr=out, pass_fds=[write], start_new_session=True
            )
        os.close(write)
        self._pipe, self._rest, self._open = read, b'', True

    def until(self, met: Callable, seconds: float = PATIENCE) -> bool:
        """Waits until a condition on the events is met; False: it ended, or the time is up."""
        end = time.monotonic() + seconds
        while not met():
            left = end - time.monotonic()
            if left <= 0 or not self._open:
                return False
            if select.select([self._pipe], [], [], left)[0]:
                self._listen()
        return True

    def outlast(self, seconds: float) -> bool:
        """Waits for so long; False: the process has ended."""
        self.until(lambda: False, seconds)
        return self._open

    def _listen(self):
        content = os.read(self._pipe, 1 << 16)
        self._open = bool(content)
        *lines, self._rest = (self._rest + content).split(b'\n')
        for line in lines:
            at, what = line.decode().split(' ', 1)
            self.events.append((float(at), what))

    def stop(self, number: int, whole_group: bool = False):
        """Sends a signal."""
        self.struck = time.monotonic()
        self.whom = 'group' if whole_group else 'main process'
        (os.killpg if whole_group else os.kill)(self._process.pid, number)

    def wait(self) -> int:
        """Waits until it has ended and none of its group is left."""
        late = not self.until(lambda: not self._open)
        if late:
            self._end_group()
        self.code = self._process.wait()
        self.ended, self.outlived = time.monotonic(), 0.0
        os.close(self._pipe)
        while self._others():
            self.outlived = time.monotonic() - self.ended
            if self.outlived > OUTLIVE:
                self.outlived = None
                self._end_group()
                break
            time.sleep(0.02)
        if late:
            raise TimeoutError(f'still there after {PATIENCE:.0f} s: {tail(self.log)}')
        return self.code

    def _end_group(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _others(self) -> list[int]:
        found = []
        for path in Path('/proc').glob('[0-9]*/stat'):
            try:
                status, _, group = path.read_text().rpartition(')')[2].split()[:3]
            except OSError:  # gone meanwhile
                continue
            if int(group) == self._process.pid and status not in 'ZX':
                found.append(int(path.parent.name))
        return found

    def count(self, what: str) -> int:
        return sum(event == what for _, event in self.events)

    def last(self, kind: str) -> int | None:
        """N of the latest `KIND N`."""
        found = [int(what.split()[1]) for _, what in self.events if what.startswith(f'{kind} ')]
        return found[-1] if found else None

    def durations(self, phase: str) -> list[float]:
        """Seconds of each time that a phase has lasted."""
        begins = [at for at, what in self.events if what == f'+{phase}']
        ends = [at for at, what in self.events if what == f'-{phase}']
        return [end - begin for begin, end in zip(begins, ends)]

    def where(self) -> str:
        """What it did when it ended: the phases that had begun and not ended."""
        found = [p for p in PHASES if self.count(f'+{p}') > self.count(f'-{p}')]
        if not found and not self.count('+train'):
            return 'compile' if self.count('-restore') else 'start'
        return '+'.join(found) or ('end' if self.count('-stage') else 'step')

    def story(self) -> str:
        """In a few words, how it ended."""
        out = f'hit {self.where()} after step {self.last("step") or self.last("restored") or 0}'
        if self.outlived is None:
            return f'{out}: {self.whom}, others stayed'
        others = f' (others {self.outlived:.1f} s later)' if self.outlived else ''
        return f'{out}: {self.whom}, gone in {self.ended - self.struck:.1f} s{others}'


@dataclasses.dataclass
class Verdict:
    """What a campaign found.

    Attributes:
      tally: {what the process did: kills}.
      failures: what must not be; empty: passed.
      notes: what may be, but should be known.
      sigterm: what was wrong with the end after SIGTERM; empty: nothing, None: it never came.
    """

    tally: dict[str, int] = dataclasses.field(default_factory=dict)
    failures: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    sigterm: list[str] | None = None


def plan(kills: int, dice: random.Random) -> list[str]:
    """Half of the kills at any time, the others aimed at each phase in turn; SIGTERM last."""
    aimed = [AIMED[i % len(AIMED)] for i in range(kills // 2)]
    out = aimed + ['any'] * (kills - len(aimed))
    dice.shuffle(out)
    return [*out, 'SIGTERM']


def campaign(
    workdir: Path, targets: list[str], steps: int, seed: int, say: Callable[[str], None] = print
) -> Verdict:
    """Kills runs at the targets, one after the other, and goes on with them until all are used.

    A run that comes to its end is compared with one that was never killed, and another is begun.
    """
    reference = Life(workdir / 'reference', steps, workdir / 'reference.log')
    if reference.wait() != 0:
        raise RuntimeError(f'the run without kills has failed: {tail(reference.log)}')
    spans = measure(reference)
    parts = ', '.join(f'{name} {1000 * span:.0f} ms' for name, span in spans.items())
    say(f'without kills: {reference.events[-1][0] - reference.started:.1f} s; {parts}')
    dice, verdict, targets, number = random.Random(seed), Verdict(), list(targets), 0
    while targets:
        number += 1
        folder, log = workdir / f'run{number}', workdir / f'run{number}.log'
        failures = []
        lives = kill_until_done(folder, log, steps, targets, spans, dice)
        for life, target, sealed in lives:
            failures += check_life(life, sealed)
            if target == 'SIGTERM':
                verdict.sigterm = check_sigterm(life, folder)
                say(f'SIGTERM: {"; ".join(verdict.sigterm) or "saved and gone"}; {life.story()}')
            elif target:
                verdict.tally[life.where()] = verdict.tally.get(life.where(), 0) + 1
                kills = sum(verdict.tally.values())
                left = ' '.join(names(folder / STAGE / 'checkpoints')) or 'no checkpoints'
                say(f'kill {kills}: aimed at {target}, {life.story()}; on disk: {left}')
        if life.code == 0:
            failures += compare(workdir / 'reference' / STAGE, folder / STAGE, steps)
        say(f'run {number}: {"; ".join(failures) or "as if it had never been killed"}')
        verdict.failures += [f'run {number}: {x}' for x in failures]
        verdict.notes += [f'run {number}: {x}' for x in look_through(log)]
        if life.code != 0:
            break  # it would fail again
    return verdict


def measure(life: Life) -> dict[str, float]:
    """Seconds within which the kills of each target come, from a whole run."""
    ready = next(at for at, what in life.events if what == '+train')
    # Half of it: a run is to be killed more than once.
    spans = {'any': (life.events[-1][0] - ready) / 2, 'start': ready - life.started}
    return spans | {'SIGTERM': spans['any'] / 4} | {x: typical(life, x, 0.02) for x in PHASES}


def typical(life: Life, phase: str, default: float) -> float:
    # Less than it mostly lasts: a signal takes its time, too.
    found = life.durations(phase)
    return 0.7 * statistics.median(found) if found else default


def kill_until_done(
    folder: Path, log: Path, steps: int, targets: list[str], spans: dict, dice: random.Random
) -> Iterator[tuple[Life, str | None, int | None]]:
    """The lives of a run, when they are over, as (life, target that was hit, step saved before).

    Targets that are hit are taken out of the list. The last one ends by itself, trained or failed.
    """
    sealed = None
    while True:
        target, life = choose(targets, sealed), Life(folder, steps, log)
        if target and not strike(life, target, spans, dice):
            target = None
        if target == 'SIGTERM':
            life.stop(signal.SIGTERM)
        elif target:
            life.stop(signal.SIGKILL, whole_group=dice.random() < 0.5)
        life.wait()
        if life.code == 0:
            target = None
        if target in targets:
            targets.remove(target)
        yield life, target, sealed
        if life.code == 0 or not target:
            return
        sealed = life.last('sealed') or sealed
        for phase in NEED_A_CHECKPOINT:
            spans[phase] = typical(life, phase, spans[phase])


def choose(targets: list[str], sealed: int | None) -> str | None:
    """The first target that can be met; one that leaves a checkpoint where all others need one."""
    if not targets:
        return None
    return next((x for x in targets if sealed or x not in NEED_A_CHECKPOINT), 'delete')


def strike(life: Life, target: str, spans: dict[str, float], dice: random.Random) -> bool:
    """Waits for the moment of a kill; False: the process has ended before."""
    delay = dice.uniform(0.0, spans[target])
    if target == 'start':
        return life.outlast(delay)
    if target == 'any':
        # To restore and to compile takes most of the time; steps must get their share.
        first = dice.choice(('+restore', '+train'))
        begun = life.until(lambda: life.count(first) or life.count('+train'))
    elif target == 'SIGTERM':
        begun = life.until(lambda: life.last('step'))
    else:
        times = 1 if target in NEED_A_CHECKPOINT else dice.randint(1, 3)
        begun = life.until(lambda: life.count(f'+{target}') >= times)
    return begun and life.outlast(delay)


# --- What must be ---------------------------------------------------------------------------------


def check_life(life: Life, sealed: int | None) -> list[str]:
    """Of a process: how it ended, and that it went on from what was saved before."""
    out = []
    if life.code in (1, 2) or (life.code != 0 and life.struck is None):
        out.append(f'exit code {life.code} by itself: {tail(life.log)}')
    if life.outlived is None:
        out.append(f'processes outlive the main one, {life.story()}')
    restored = life.last('restored')
    if sealed and (restored or 0) < sealed and (restored or life.count('+train')):
        out.append(f'step {sealed} was saved, and {restored} restored')
    return out


def check_sigterm(life: Life, folder: Path) -> list[str]:
    """Of a process that SIGTERM came to: that all it did is saved, in time."""
    folder, out = folder / STAGE / 'checkpoints', []
    steps = [int(x) for x in names(folder) if x.isdigit()]
    saved = max((x for x in steps if not integrity.fault(folder / str(x), x)), default=0)
    if saved < life.last('step'):
        out.append(f'step {life.last("step")} was done, and {saved} saved')
    if life.code != RESUMABLE:
        out.append(f'exit code {life.code} instead of {RESUMABLE}')
    if life.ended - life.struck > LEAVE:
        out.append(f'gone after {life.ended - life.struck:.1f} s')
    return out


def look_through(log: Path) -> list[str]:
    """What the processes of a run have complained of."""
    text = log.read_text(errors='replace')
    counts = {x: text.count(x) for x in ('Traceback', 'persistent compilation cache')}
    return [f'{count} x {what!r} in the log' for what, count in counts.items() if count]


def compare(expected: Path, found: Path, steps: int) -> list[str]:
    """In what a finished run differs from one that was never killed."""
    failures = []
    for folder in ('', 'checkpoints'):
        one, other = names(expected / folder), names(found / folder)
        if one != other:
            failures.append(f'{folder or STAGE} holds {other} instead of {one}')
    if failures:
        return failures
    if fault := integrity.fault(found / 'checkpoints' / str(steps), steps):
        return [fault]
    (trees, data), (found_trees, found_data) = state(expected, steps), state(found, steps)
    if data != found_data:
        failures.append(f'position in the data: {found_data} instead of {data}')
    if jax.tree.structure(trees) != jax.tree.structure(found_trees):
        failures.append('other arrays')
    else:
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(trees), jax.tree.leaves(found_trees)
        ):
            a, b = np.asarray(a), np.asarray(b)
            if a.dtype != b.dtype or a.tobytes() != b.tobytes():
                failures.append(f'{jax.tree_util.keystr(path)} differs')
    one, other = (records(folder / 'metrics.jsonl') for folder in (expected, found))
    if one != other:
        failures.append('metrics.jsonl differs')
    for name in ('config.json', 'inputs.json'):
        if (expected / name).read_bytes() != (found / name).read_bytes():
            failures.append(f'{name} differs')
    for path in sorted((expected / 'previews').iterdir()):
        other = found / 'previews' / path.name
        if not other.exists():
            failures.append(f'previews/{path.name} is missing')
        elif other.read_bytes() != path.read_bytes():
            failures.append(f'previews/{path.name} differs')
    extra = set(names(found / 'previews')) - set(names(expected / 'previews'))
    failures += [f'previews/{name} is left over' for name in sorted(extra)]
    return failures


def records(path: Path) -> list[dict]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in COST} for line in lines]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def tail(log: Path) -> str:
    return log.read_text(errors='replace').strip().splitlines()[-1][:500]
