"""Real processes that are asked to go."""

import contextlib
import http.server
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from cmd_jax.errors import Interrupted
from cmd_jax.parallel import preemption

SOON = 2.0  # seconds

COMPILE = """
    import jax, jax.numpy as jnp
    def f(x):
        for i in range(600):
            x = jnp.sin(x @ x) + i
        return x
    lowered = jax.jit(f).lower(jnp.ones((16, 16)))
    say('ready')
    lowered.compile()
"""
COMPUTE = """
    import jax, jax.numpy as jnp
    f = jax.jit(lambda x: jax.lax.fori_loop(0, 10**9, lambda i, x: jnp.sin(x), x))
    f = f.lower(jnp.ones(8)).compile()
    say('ready')
    f(jnp.ones(8)).block_until_ready()
"""


@contextlib.contextmanager
def process(body: str, install: bool = True, **env):
    """A process that runs `body` as a script does, or without `install` as a notebook does."""
    code = ['import os, sys, time', 'from cmd_jax import cli']
    code += ['from cmd_jax.parallel.preemption import Deferred']
    code += ['def say(*words): print(*words, flush=True)']
    code += ['def main():', textwrap.indent(textwrap.dedent(body), '    ')]
    code += ['if __name__ == "__main__":', '    cli.run(main)' if install else '    main()']
    # Its own group, as a scheduler's; what is left of it dies with the test.
    started = subprocess.Popen(
        [sys.executable, '-c', '\n'.join(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {'JAX_PLATFORMS': 'cpu', 'GCE_METADATA_HOST': ''} | env,
        # Of a shell that has put the tests into the background, Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        yield started
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.communicate()


def wait_for(started, line: str):
    found = started.stdout.readline()
    assert found == f'{line}\n', found + started.stderr.read()


def ends(started, code: int, within: float = 30.0) -> tuple[str, str]:
    """What it says until it ends, with `code`."""
    begun = time.monotonic()
    out, err = started.communicate(timeout=60)
    assert started.returncode == code, (started.returncode, err)
    assert time.monotonic() - begun < within
    return out, err


@pytest.mark.parametrize('body', [COMPILE, COMPUTE], ids=['compiling', 'computing'])
def test_sigterm_does_not_wait_for_xla(body):
    with process(body + "\n    say('done')") as started:
        wait_for(started, 'ready')
        time.sleep(0.3)
        started.send_signal(signal.SIGTERM)
        out, err = ends(started, 75, SOON)
    assert out == ''
    assert err == 'interrupted: SIGTERM: the same command goes on from what is saved\n'


def test_ctrl_c_outside_is_pythons():
    body = """
        try:
            say('ready')
            time.sleep(60)
        finally:
            say('cleaned')
    """
    with process(body) as started:
        wait_for(started, 'ready')
        started.send_signal(signal.SIGINT)
        assert ends(started, 130, SOON) == ('cleaned\n', 'interrupted\n')


LOOP = """
    with Deferred() as deferred:
        say('ready')
        while not deferred.reached():
            time.sleep(0.01)
        say(deferred.reason, deferred.code)
        {then}
        raise deferred.interrupted('saved at step 7')
"""


@pytest.mark.parametrize('install', [True, False])
@pytest.mark.parametrize(
    'number, reason, code', [(signal.SIGTERM, 'SIGTERM', 75), (signal.SIGINT, 'Ctrl-C', 130)]
)
def test_the_first_is_noted(install, number, reason, code):
    with process(LOOP.format(then=''), install) as started:
        wait_for(started, 'ready')
        started.send_signal(number)
        out, err = ends(started, code if install else 1)
    assert out == f'{reason} {code}\n'
    assert err.count('the state is saved after this step (again: stop at once)') == 1
    last = f'interrupted: {reason}: saved at step 7'
    assert err.splitlines()[-1].endswith(last if install else last.split(': ', 1)[1])


@pytest.mark.parametrize(
    'install, number, code, said',
    [
        (True, signal.SIGTERM, 75, 'interrupted: SIGTERM: the same command'),
        (True, signal.SIGINT, 130, 'interrupted\n'),
        (False, signal.SIGTERM, -signal.SIGTERM, ''),
        (False, signal.SIGINT, -signal.SIGINT, 'KeyboardInterrupt'),
    ],
)
def test_the_second_of_a_kind_acts_as_usual(install, number, code, said):
    with process(LOOP.format(then="say('saving'); time.sleep(60)"), install) as started:
        wait_for(started, 'ready')
        started.send_signal(number)
        started.stdout.readline()
        wait_for(started, 'saving')
        # Another kind says nothing new.
        other = {signal.SIGTERM: signal.SIGINT, signal.SIGINT: signal.SIGTERM}[number]
        started.send_signal(other)
        time.sleep(0.2)
        assert started.poll() is None
        started.send_signal(number)
        assert said in ends(started, code, SOON)[1]


@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_at_once(number, code):
    """Where nothing is to be saved, even XLA is not waited for."""
    body = 'with Deferred() as deferred, deferred.at_once():' + textwrap.indent(COMPILE, '    ')
    with process(body + "\n        say('done')") as started:
        wait_for(started, 'ready')
        time.sleep(0.3)
        started.send_signal(number)
        out, err = ends(started, code, SOON)
    assert out == '' and err.startswith('interrupted: ')


def test_a_request_from_before_at_once():
    inside = False
    with preemption.Deferred() as deferred:
        with deferred.at_once():
            inside = True
        assert inside and not deferred.reached()
        os.kill(os.getpid(), signal.SIGTERM)
        assert deferred.reached()
        with pytest.raises(Interrupted, match='SIGTERM: nothing to be saved') as e:
            with deferred.at_once():
                raise AssertionError('came in')
    assert e.value.code == preemption.RESUMABLE
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with preemption.Deferred() as deferred:
        assert not deferred.reached()


def test_another_thread_leaves_signals_alone(log):
    before = signal.getsignal(signal.SIGINT)

    def work():
        with preemption.Deferred():
            assert signal.getsignal(signal.SIGINT) is before
            entered.append(True)

    entered = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert entered
    assert [r.getMessage() for r in log.records] == [
        'not in the main thread: Ctrl-C and SIGTERM are not waited for here'
    ]


def alive(pid: int) -> bool:
    """And not just waiting for its parent to ask how it ended."""
    try:
        with open(f'/proc/{pid}/stat') as f:
            return f.read().rpartition(') ')[2][0] != 'Z'
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_children_do_not_survive():
    """Neither spawned data workers nor forked ones, which leave their parent alone."""
    body = """
        import multiprocessing, signal
        ids = []
        for method in ('spawn', 'fork'):
            child = multiprocessing.get_context(method).Process(target=time.sleep, args=(60,))
            child.start()
            ids.append(child.pid)
        gone = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,))
        gone.start()
        time.sleep(0.3)
        gone.terminate()
        gone.join()
        say(gone.exitcode == -signal.SIGTERM, *ids)
        time.sleep(60)
    """
    with process(body) as started:
        ended, *ids = started.stdout.readline().split()
        assert ended == 'True' and len(ids) == 2
        time.sleep(0.2)
        assert started.poll() is None and all(map(alive, map(int, ids)))
        started.send_signal(signal.SIGTERM)
        ends(started, 75, SOON)
        time.sleep(0.2)
        assert not any(map(alive, map(int, ids)))


class Metadata(http.server.BaseHTTPRequestHandler):
    """Google Cloud's metadata server: an answer waits for a change."""

    def do_GET(self):
        server = self.server
        key = self.path.split('/instance/')[-1].split('?')[0]
        assert self.headers['Metadata-Flavor'] == 'Google'
        with server.changed:
            server.asked.append(self.path)
            if 'wait_for_change=true' in self.path:
                tag = self.path.split('last_etag=')[1]
                server.changed.wait_for(lambda: server.tags[key] != tag, server.patience)
            value, tag = server.values[key], server.tags[key]
        self.send_response(200)
        self.send_header('ETag', tag)
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(value.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def metadata():
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Metadata)
    server.daemon_threads, server.block_on_close = True, False
    server.changed, server.asked, server.patience = threading.Condition(), [], 60
    server.values = {'preempted': 'FALSE', 'maintenance-event': 'NONE'}
    server.tags = {'preempted': 'a', 'maintenance-event': 'a'}

    def tell(key, value):
        with server.changed:
            server.values[key], server.tags[key] = value, server.tags[key] + 'b'
            server.changed.notify_all()

    server.tell, server.host = tell, f'127.0.0.1:{server.server_port}'
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def waits(server):
    for _ in range(500):
        if sum('wait_for_change' in path for path in server.asked) >= 2:
            return
        time.sleep(0.01)
    raise AssertionError(server.asked)


@pytest.mark.parametrize(
    'key, value', [('preempted', 'TRUE'), ('maintenance-event', 'TERMINATE_ON_HOST_MAINTENANCE')]
)
def test_notice(metadata, key, value):
    with process(LOOP.format(then=''), GCE_METADATA_HOST=metadata.host) as started:
        wait_for(started, 'ready')
        waits(metadata)
        metadata.tell('maintenance-event', 'MIGRATE_ON_HOST_MAINTENANCE')  # is lived through
        time.sleep(0.2)
        assert started.poll() is None
        metadata.tell(key, value)
        out, err = ends(started, 75, SOON)
    assert out == 'preemption notice 75\n'
    assert 'interrupted: preemption notice: saved at step 7' in err


def test_notice_outside(metadata):
    metadata.values['maintenance-event'] = 'TERMINATE_ON_HOST_MAINTENANCE'  # of an hour ago
    metadata.patience = 0.1  # and told again when a question has been open for long
    with process(COMPUTE, GCE_METADATA_HOST=metadata.host) as started:
        wait_for(started, 'ready')
        waits(metadata)
        assert started.poll() is None
        metadata.tell('preempted', 'TRUE')
        assert 'interrupted: preemption notice' in ends(started, 75, SOON)[1]


def test_nobody_answers():
    """Where the metadata server is not, nothing else happens."""
    with process("time.sleep(1); say('done')", GCE_METADATA_HOST='127.0.0.1:9') as started:
        out, err = ends(started, 0)
    assert out == 'done\n' and 'Traceback' not in err


def test_elsewhere_nothing_is_asked(monkeypatch, tmp_path):
    monkeypatch.delenv('GCE_METADATA_HOST', raising=False)
    product = tmp_path / 'product_name'
    monkeypatch.setattr(preemption, 'PRODUCT', product)
    assert not preemption.on_google_cloud()
    product.write_text('KVM\n')
    before = threading.active_count()
    assert not preemption.watch_for_notices()
    assert threading.active_count() == before
    product.write_text('Google Compute Engine\n')
    assert preemption.on_google_cloud()
