"""The processes of a run meet before JAX joins them.

JAX aborts a process, with a C++ stack trace and no names, when another one does not appear in time.
So they first meet here, over plain TCP on the same port: process 0 listens until all are there, or
says who is missing. Then it frees the port for JAX's coordination service.
"""

import contextlib
import json
import selectors
import socket
import time
from collections.abc import Iterable

from absl import logging

from cmd_jax.errors import UserError

_RETRY = 0.2  # seconds between two attempts to reach process 0
_LONGEST = 10_000  # bytes of a message that is not this program's


def meet(address: str, bind: str, count: int, index: int, timeout: float):
    """Returns when all `count` processes are here.

    Args:
      address: 'HOST:PORT' of process 0.
      bind: 'HOST:PORT' that process 0 listens on; '[::]:PORT': all of its addresses.
      count: processes.
      index: of this process.
      timeout: seconds.

    Raises:
      UserError: not all are here in time (it says which), or they do not fit together.
    """
    if index == 0:
        _host(address, bind, count, timeout)
    else:
        _join(address, count, index, timeout)


def split(address: str) -> tuple[str, int]:
    """'HOST:PORT' in two; raises ValueError."""
    host, _, port = address.rpartition(':')
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(address)
    return host.strip('[]'), int(port)


def _absent(present: Iterable[int], count: int, timeout: float) -> str:
    present = set(present)
    missing = [i for i in range(count) if i not in present]
    names = ', '.join(map(str, missing[:20])) + (', ...' if missing[20:] else '')
    return (
        f'{count - len(missing)} of {count} processes appeared within {timeout:g} s, missing: '
        f'process {names}. Start them all at the same time, or set --startup_timeout'
    )


def _send(connection: socket.socket, **message):
    # One that has gone is seen when it is read from.
    with contextlib.suppress(OSError):
        connection.sendall(json.dumps(message).encode() + b'\n')


def _host(address: str, bind: str, count: int, timeout: float):
    deadline = time.monotonic() + timeout
    host, port = split(bind)
    every = host in ('', '::', '0.0.0.0')
    dual = every and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual or ':' in host else socket.AF_INET
    try:
        listener = socket.create_server(
            ('' if every else host, port), family=family, backlog=1024, dualstack_ipv6=dual
        )
    except OSError as e:
        raise UserError(
            f'--coordinator_address={address}: process 0 cannot listen on port {port} '
            f'({e.strerror or e}): choose another one'
        ) from e
    unread: dict[socket.socket, bytes] = {}
    here: dict[int, socket.socket | None] = {0: None}
    with contextlib.ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        stack.callback(lambda: [c.close() for c in unread])
        stack.enter_context(listener)
        listener.setblocking(False)
        selector.register(listener, selectors.EVENT_READ)
        while len(here) < count:
            left = deadline - time.monotonic()
            ready = selector.select(left) if left > 0 else []
            if left <= 0:
                error = _absent(here, count, timeout)
                for connection in unread:
                    _send(connection, error=error)
                raise UserError(error)
            for found, _ in ready:
                if found.fileobj is listener:
                    with contextlib.suppress(OSError):
                        connection, _ = listener.accept()
                        # Messages are short; nobody can hold up the others.
                        connection.settimeout(1.0)
                        unread[connection] = b''
                        selector.register(connection, selectors.EVENT_READ)
                    continue
                connection = found.fileobj
                try:
                    data = connection.recv(4096)
                except OSError:
                    data = b''
                unread[connection] += data
                if data and b'\n' in unread[connection]:
                    _greet(connection, unread[connection], count, here, unread)
                    unread[connection] = b''
                elif not data or len(unread[connection]) > _LONGEST:
                    selector.unregister(connection)
                    connection.close()
                    del unread[connection]
                    here = {i: c for i, c in here.items() if c is not connection}
        # The port is free for JAX before anybody turns to JAX.
        listener.close()
        for connection in here.values():
            if connection is not None:
                _send(connection, go=True)


def _greet(connection, line: bytes, count: int, here: dict, every: Iterable):
    """Takes in one that says who it is."""
    try:
        hello = json.loads(line)
        index, theirs = int(hello['process']), int(hello['count'])
    except (ValueError, KeyError, TypeError):
        return  # a stranger
    if theirs != count or not 0 < index < count:
        error = (
            f'--process_count={theirs} in process {index}, --process_count={count} in process 0: '
            'all processes must be given the same number'
        )
        for one in every:
            _send(one, error=error)
        raise UserError(error)
    if index in here:
        logging.warning('--process_id=%d was given to two processes', index)
        _send(connection, error=f'--process_id={index} was given to two processes')
        return
    here[index] = connection
    for one in here.values():
        if one is not None:
            _send(one, here=sorted(here))


def _join(address: str, count: int, index: int, timeout: float):
    deadline = time.monotonic() + timeout
    here, why = [], 'no answer'
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection(split(address), timeout=min(left, 5.0)) as connection:
                _send(connection, process=index, count=count)
                unread = b''
                while (left := deadline - time.monotonic()) > 0:
                    connection.settimeout(left)
                    data = connection.recv(4096)
                    unread += data
                    if not data or len(unread) > _LONGEST:
                        here, why = [], 'what answers there is not process 0, or has ended'
                        break
                    *lines, unread = unread.split(b'\n')
                    for message in map(json.loads, lines):
                        if 'error' in message:
                            raise UserError(message['error'])
                        if 'go' in message:
                            return
                        if not here:
                            # From here on process 0 says when it is too late: the same to all.
                            deadline = time.monotonic() + timeout + 5.0
                        here = message['here']
        except TimeoutError:
            pass
        except OSError as e:
            here, why = [], e.strerror or str(e)
        except (ValueError, TypeError, KeyError):
            why = 'what answers there is not process 0'
        time.sleep(max(0.0, min(_RETRY, deadline - time.monotonic())))
    if here:
        raise UserError(_absent(here, count, timeout))
    raise UserError(
        f'--coordinator_address={address}: process {index} of {count} could not reach process 0 '
        f'within {timeout:g} s ({why}): start process 0, check the address and firewalls, or set '
        '--startup_timeout'
    )
