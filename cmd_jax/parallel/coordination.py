"""What the processes of a run tell each other, and how they end.

How a run of several processes ends:

- All of them come to their end: `finish` waits for the slowest.
- One raises (cli.run calls `end`): the others read of it within a second or two, say who failed,
  and end with the same exit code.
- One is killed or its machine is lost: what waits for it in a collective may get an error from the
  network at once (Gloo, NCCL); at the latest JAX's heartbeats are missed for 100 s and its
  coordination service aborts every process (SIGABRT, 'the JAX distributed service detected fatal
  errors'). With process 0, which holds this service, it goes at once. Nothing waits for ever; the
  run goes on from its newest checkpoint when all are started again.
"""

import contextlib
import json
import multiprocessing
import os
import sys
import threading
import time

_POLL = 0.5  # seconds between two looks at what other processes tell
_GRACE = 3.0  # seconds that process 0, which holds the coordination service, waits for the others
_FOREVER = 30 * 24 * 3600 * 1000  # milliseconds


def place() -> tuple[int, int]:
    """(index, count) of this process; unlike JAX's own it does not touch a device."""
    if 'jax' not in sys.modules:
        return 0, 1
    from jax._src import distributed

    state = distributed.global_state
    return (state.process_id, state.num_processes) if state.client is not None else (0, 1)


class Watch:
    """What the processes tell each other, through JAX's coordination service.

    `reached` lets them stop at the same step without waiting for the devices: when one has asked
    for it, a thread in each says how often `reached` was called there, and lets no further call
    through until all have. They stop at the first call that none has made yet.

    Attributes:
      stop: why they stop and the exit code, once it is agreed; or None.
    """

    def __init__(self, client, index: int, count: int):
        self.client, self.index, self.count = client, index, count
        self.stop: tuple[str, int] | None = None
        self._wanted: tuple[str, int] | None = None
        self._lock = threading.Lock()
        self._calls, self._last = 0, None
        self._closed = threading.Event()
        self._ending = threading.Lock()
        self._thread = threading.Thread(target=self._run, name='watch', daemon=True)
        self._thread.start()

    def ask_to_stop(self, reason: str, code: int):
        """Asks all processes to stop; the first one that does goes."""
        self._wanted = reason, code

    def reached(self) -> bool:
        """Whether to stop here; all processes must call it equally often."""
        with self._lock:
            self._calls += 1
            return self._last is not None and self._calls >= self._last

    def end(self, code: int, reason: str) -> tuple[int, str]:
        """Tells the others that this process ends now; they do, too.

        Returns:
          The exit code and a last line: those of another process that has ended before, as the
          broken connections to it may be all that is wrong here.
        """
        self._ending.acquire()  # for good: only one thread does this
        first = []

        def tell():
            self._tell('ended', [self.index, code, reason])
            first.extend(self._told('ended') or [])
            self._linger()

        # There may be nobody left to answer.
        teller = threading.Thread(target=tell, daemon=True)
        teller.start()
        teller.join(_GRACE + 1.0)
        if not first or first[0] == self.index or first[2] == reason:
            return code, ''
        return first[1], ended(first[0], first[2])

    def close(self):
        self._closed.set()
        self._thread.join(5.0)

    def _tell(self, key: str, value, overwrite: bool = False):
        # The first to tell goes; and whom the service has left is ended by JAX.
        with contextlib.suppress(Exception):
            self.client.key_value_set(f'cmd_jax/{key}', json.dumps(value), overwrite)

    def _told(self, key: str):
        try:
            return json.loads(self.client.key_value_try_get(f'cmd_jax/{key}'))
        except Exception:
            return None  # not told yet

    def _linger(self):
        self._tell(f'gone/{self.index}', True)
        stop = time.monotonic() + _GRACE
        while self.index == 0 and time.monotonic() < stop:
            if all(self._told(f'gone/{i}') for i in range(self.count)):
                break
            time.sleep(0.1)

    def _run(self):
        while not self._closed.wait(_POLL):
            if first := self._told('ended'):
                self._follow(*first)
            if self._wanted and not self.stop:
                self._tell('stop', [*self._wanted, self.index])
            if not self.stop and (stop := self._told('stop')):
                self._agree(*stop)

    def _agree(self, reason: str, code: int, index: int):
        with self._lock:
            self._tell(f'stop/{self.index}', self._calls)
            # JAX ends all if one never answers.
            self._last = 1 + max(map(self._calls_of, range(self.count)))
            self.stop = (reason if index == self.index else f'{reason} in process {index}'), code

    def _calls_of(self, index: int) -> int:
        while True:
            with contextlib.suppress(Exception):  # not within a second
                return int(self.client.blocking_key_value_get(f'cmd_jax/stop/{index}', 1000))
            if first := self._told('ended'):
                self._follow(*first)

    def _follow(self, index: int, code: int, reason: str):
        if index == self.index:
            return
        # What stopped the other one may be about to stop this one, which says more.
        if self._closed.wait(1.0) or not self._ending.acquire(blocking=False):
            return
        self._linger()
        exit_at_once(code, ended(index, reason))


def ended(index: int, reason: str) -> str:
    return f'error: process {index} has ended ({reason}): see its output'


_watch: Watch | None = None


def watch() -> Watch | None:
    """The one of this process; None where it is the only one."""
    global _watch
    index, count = place()
    if _watch is None and count > 1:
        from jax._src import distributed

        _watch = Watch(distributed.global_state.client, index, count)
    return _watch


def end(code: int, reason: str):
    """Ends this process at once, and the others of the run; see `exit_at_once`."""
    line = ''
    if (watching := watch()) is not None:
        code, line = watching.end(code, reason)
    exit_at_once(code, line)


def finish():
    """Waits until all processes have come to their end."""
    if (watching := watch()) is not None:
        failed = []

        def wait():
            try:
                watching.client.wait_at_barrier('cmd_jax/finish', _FOREVER)
            except Exception as e:
                failed.append(e)

        # In the main thread Ctrl-C would not be seen.
        waiter = threading.Thread(target=wait, daemon=True)
        waiter.start()
        while waiter.is_alive():
            waiter.join(0.5)
        if failed:
            raise failed[0]
        watching.close()


def exit_at_once(code: int, line: str = ''):
    """Ends this process from any thread, whatever the main thread does; its children, too."""
    index = place()[0]

    def last_words():
        for stream in (sys.stdout, sys.stderr):
            # Closed, or broken: nothing to be done.
            with contextlib.suppress(Exception):
                stream.flush()
        if line:
            os.write(2, f'{f"[process {index}] " if index else ""}{line}\n'.encode())

    # The main thread may hold a stream's lock.
    speaker = threading.Thread(target=last_words, daemon=True)
    speaker.start()
    speaker.join(1.0)
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)
