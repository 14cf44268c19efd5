"""SIGTERM, Ctrl-C and the platform's notice that this machine is about to go.

Who is asked to go saves what is worth saving and ends with RESUMABLE: the same command goes on.
Schedulers and scripts can start it again for as long as that is the exit code.
"""

import contextlib
import os
import signal
import threading
import time
import urllib.request
from pathlib import Path

from absl import logging

from cmd_jax.errors import Interrupted
from cmd_jax.parallel import coordination

RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h
CTRL_C = 130  # what shells say of SIGINT

_SIGTERM, _SIGINT, _NOTICE = 'SIGTERM', 'Ctrl-C', 'preemption notice'

# A signal's Python handler runs in the main thread between two instructions, maybe inside of this.
_lock = threading.RLock()
_current: 'Deferred | None' = None
_installed = False


def install():
    """Ends the process at once on SIGTERM or a notice, with RESUMABLE, unless inside `Deferred`.

    Even while the main thread is inside XLA; Ctrl-C stays Python's. For scripts, once, in the main
    thread: it takes SIGTERM and the wake-up descriptor of signals for good.
    """
    global _installed
    if _installed:
        return
    _installed = True
    read, write = os.pipe()
    os.set_blocking(write, False)
    # Python's own handlers wait for the main thread to come back; this is written to at once.
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    os.register_at_fork(after_in_child=_uninstall)
    threading.Thread(target=_listen, args=(read,), name='signals', daemon=True).start()
    watch_for_notices()


def _uninstall():
    # A forked child would write its signals to its parent's descriptor.
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _listen(descriptor: int):
    while numbers := os.read(descriptor, 64):
        for number in numbers:
            if number == signal.SIGTERM:
                _receive(_SIGTERM)
            elif number == signal.SIGINT:
                with _lock:
                    leave = _current is not None and _current.leaving
                if leave:
                    _leave(_SIGINT)


def _receive(kind: str):
    """What a SIGTERM or a notice does, in any thread."""
    with _lock:
        deferred = _current
        leave = deferred is None or deferred.leaving or (kind in deferred.seen and kind != _NOTICE)
        if not leave:
            deferred.note(kind)
    if leave:
        _leave(kind)


def _leave(kind: str):
    reason = f'interrupted: {kind}'
    code = CTRL_C if kind == _SIGINT else RESUMABLE
    with contextlib.suppress(OSError):
        os.write(2, f'{reason}: the same command goes on from what is saved\n'.encode())
    coordination.end(code, reason)


class Deferred:
    """Inside, the first Ctrl-C, SIGTERM or notice is noted, to be acted upon where it suits.

    A second one of the same kind acts as usual: at once. Works without `install`, too, but not
    while the main thread is inside XLA. Only the main thread can take signals: in another one they
    are left alone. Not to be nested.

        with Deferred() as deferred:
            with deferred.at_once():
                compiled = step.lower(...).compile()
            while ...:
                ...  # a step
                if deferred.reached():
                    ...  # save
                    raise deferred.interrupted('saved at step 7')

    Attributes:
      reason: of the first: 'Ctrl-C', 'SIGTERM', 'preemption notice'; or None. Of several processes
        also the one that it came to.
      code: the exit code that belongs to it, or None.
      leaving: inside `at_once`.
      seen: kinds that have come.
    """

    def __init__(self):
        self.reason: str | None = None
        self.code: int | None = None
        self.leaving = False
        self.seen: set[str] = set()
        self._old = {}

    def __enter__(self):
        global _current
        numbers = [signal.SIGINT] if _installed else [signal.SIGINT, signal.SIGTERM]
        with _lock:
            _current = self
        if threading.current_thread() is threading.main_thread():
            for number in numbers:
                self._old[number] = signal.signal(number, self._on_signal)
        else:
            logging.warning(
                'not in the main thread: %s not waited for here',
                'Ctrl-C is' if _installed else 'Ctrl-C and SIGTERM are',
            )
        return self

    def __exit__(self, *_):
        global _current
        for number, handler in self._old.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        with _lock:
            _current = None

    def _on_signal(self, number, frame):
        kind = _SIGINT if number == signal.SIGINT else _SIGTERM
        if not self.leaving and kind not in self.seen:
            self.note(kind)
        elif callable(old := self._old[number]):
            old(number, frame)
        else:
            signal.signal(number, signal.SIG_DFL if old is None else old)
            signal.raise_signal(number)

    def note(self, kind: str):
        """Takes in a request; the first one is told of."""
        with _lock:
            self.seen.add(kind)
            if self.reason is not None:
                return
            self.reason, self.code = kind, CTRL_C if kind == _SIGINT else RESUMABLE
        again = '' if kind == _NOTICE else ' (again: stop at once)'
        logging.warning('%s: stopping: the state is saved after this step%s', kind, again)
        if (watch := coordination.watch()) is not None:
            watch.ask_to_stop(self.reason, self.code)

    def reached(self) -> bool:
        """Whether to stop here; several processes stop at the same call of it.

        To be called once a step, by all processes; does not wait for the devices.
        """
        watch = coordination.watch()
        if watch is None:
            return self.reason is not None
        if not watch.reached():
            return False
        self.reason, self.code = watch.stop
        return True

    def interrupted(self, done: str) -> Interrupted:
        """The exception to raise after a request, with what was done about it."""
        return Interrupted(f'{self.reason}: {done}', self.code)

    @contextlib.contextmanager
    def at_once(self):
        """Inside, there is nothing to be saved: a request ends it, also one that came before.

        Raises:
          Interrupted: a request came before.
        """
        with _lock:
            reason, self.leaving = self.reason, self.reason is None
        if reason is not None:
            if coordination.watch() is not None:
                coordination.end(self.code, f'interrupted: {reason}')
            raise self.interrupted('nothing to be saved; the same command goes on')
        try:
            yield
        finally:
            self.leaving = False


# Google Cloud's metadata server answers when the value changes.
_PREEMPTED = 'preempted', 'TRUE'
_MAINTENANCE = 'maintenance-event', 'TERMINATE_ON_HOST_MAINTENANCE'
PRODUCT = Path('/sys/class/dmi/id/product_name')
_WAIT = 300  # seconds that a question may stay open
_ATTEMPTS = 8  # in a row that may fail


def on_google_cloud() -> bool:
    """By what is on this machine: nothing is asked over the network."""
    if os.environ.get('GCE_METADATA_HOST'):
        return True
    try:
        return 'Google' in PRODUCT.read_text()
    except OSError:
        return False


def watch_for_notices() -> bool:
    """Waits in threads for the platform's notice, which is then received like a SIGTERM.

    Only on Google Cloud, where a preemptible machine has 30 s from its notice, and one with
    accelerators is told ahead of maintenance.

    Returns:
      Whether this is such a platform.
    """
    if not on_google_cloud():
        return False
    for key, value in (_PREEMPTED, _MAINTENANCE):
        threading.Thread(target=_wait_for, args=(key, value), name=key, daemon=True).start()
    return True


def _wait_for(key: str, value: str):
    host = os.environ.get('GCE_METADATA_HOST') or 'metadata.google.internal'
    base = f'http://{host}/computeMetadata/v1/instance/{key}'
    # Never through a proxy.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    query, failed, before = '', 0, None
    # A server that has answered once is waited for.
    while failed < _ATTEMPTS or before is not None:
        request = urllib.request.Request(base + query, headers={'Metadata-Flavor': 'Google'})
        try:
            with opener.open(request, timeout=_WAIT + 30) as answer:
                found = answer.read(1000).decode().strip()
                tag = answer.headers.get('ETag', '0')
        except Exception as e:
            # Not this platform's server, or one that is away for a while.
            failed += 1
            logging.log_first_n(logging.INFO, 'no %s from %s: %s', 1, key, host, e)
            time.sleep(min(60.0, 2.0 ** min(failed, 6)))
            continue
        failed = 0
        # Who asks with a time-out is told the old value again.
        if found == value != before:
            if before is None and key == _MAINTENANCE[0]:
                # May be an hour away: a run that was started again must not end at once.
                logging.warning('this machine is about to go: %s=%s', key, found)
            else:
                _receive(_NOTICE)
                return
        before = found
        query = f'?wait_for_change=true&timeout_sec={_WAIT}&last_etag={tag}'
