"""Real processes on this machine meet, work together and end."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest


def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def environment(**more) -> dict[str, str]:
    """Without a cluster that the tests may run in."""
    clusters = ('SLURM_', 'OMPI_', 'TPU_', 'MEGASCALE_', 'JAX_COORDINATOR')
    env = {k: v for k, v in os.environ.items() if not k.startswith(clusters)}
    return env | {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '1'} | more


@contextlib.contextmanager
def processes(body: str, count: int = 3, ids=None, port=None, timeout=60, **env):
    """Some of `count` processes that run `body` as a script does."""
    code = ['import json, os, signal, sys, time', 'from absl import logging']
    code += ['from cmd_jax import cli', 'from cmd_jax.parallel import distributed']
    code += ['from cmd_jax.errors import UserError']
    code += ['def say(*words): print(json.dumps(words), flush=True)']
    code += ['cli.distributed_flags()', 'def main():', '    import jax']
    code += ['    index = jax.process_index()', textwrap.indent(textwrap.dedent(body), '    ')]
    code += ['cli.run(main)']
    command = [sys.executable, '-c', '\n'.join(code), f'--process_count={count}']
    command += [f'--coordinator_address=127.0.0.1:{port or free_port()}']
    started = {
        i: subprocess.Popen(
            [*command, f'--process_id={i}', f'--startup_timeout={timeout}'],
            **dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True),
            env=environment(**env),
        )
        for i in (range(count) if ids is None else ids)
    }
    try:
        yield started
    finally:
        for one in started.values():
            one.kill()
            one.communicate()


def ends(started: dict) -> tuple[list[int], list[str], list[str]]:
    """Exit codes, outputs and error outputs."""
    said = [one.communicate(timeout=60) for one in started.values()]
    codes = [one.returncode for one in started.values()]
    return codes, [clean(out) for out, _ in said], [clean(err) for _, err in said]


def clean(said: str) -> str:
    """Without the remarks of Gloo and of JAX about proxies."""
    lines = said.splitlines(keepends=True)
    return ''.join(x for x in lines if '[Gloo]' not in x and 'proxy' not in x.lower())


def test_three_processes_work_as_one(tmp_path):
    body = """
        logging.info('an info')
        logging.warning('a warning')
        said = [distributed.is_main(), jax.process_count(), jax.device_count()]
        for asked in (0, 2, 7):
            said.append(distributed.any_process(index == asked))
        # Who is late is waited for.
        if index == 1:
            time.sleep(1)
        before = time.time()
        distributed.barrier('here')
        say(index, said, before, time.time())
        if index == 2:
            time.sleep(1)
    """
    cache = tmp_path / 'cache'
    with processes(body, XDG_CACHE_HOME=str(cache)) as started:
        codes, outs, errs = ends(started)
    assert codes == [0, 0, 0], errs
    said = [json.loads(out) for out in outs]
    assert [s[:2] for s in said] == [[i, [i == 0, 3, 3, True, True, False]] for i in range(3)]
    assert min(s[3] for s in said) >= max(s[2] for s in said)
    assert [err.count('an info') for err in errs] == [1, 0, 0]
    assert [err.count('a warning') for err in errs] == [1, 1, 1]
    assert 'process 0 of 3, at 127.0.0.1:' in errs[0]
    assert [err.startswith(f'[process {i}] W') for i, err in enumerate(errs)] == [False, True, True]


def test_folders_that_are_not_shared(tmp_path, monkeypatch):
    body = f"""
        distributed.SHARED_SECONDS = 1.0
        shared, own = {str(tmp_path)!r}, os.path.join({str(tmp_path)!r}, str(index))
        os.makedirs(own)
        distributed.check_shared('workdir', shared)
        say(os.listdir(own))
        distributed.check_shared('workdir', own)
    """
    with processes(body) as started:
        codes, outs, errs = ends(started)
    assert codes == [2, 2, 2] and all(json.loads(out) == [[]] for out in outs), errs
    assert "/0' is another folder in process 1, 2 than in process 0: give one" in errs[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ['0', '1', '2']


@pytest.mark.parametrize('who', [0, 1])
def test_one_that_is_killed_ends_all(who):
    """With a code at which the loop of docs/pods.md starts it again."""
    body = f"""
        if index == {who}:
            os.kill(os.getpid(), signal.SIGKILL)
        distributed.barrier('nobody comes')
    """
    with processes(body, 2) as started:
        said = [one.communicate(timeout=150) for one in started.values()]
        codes = [one.returncode for one in started.values()]
    assert codes.pop(who) == -signal.SIGKILL
    assert codes in ([1], [-signal.SIGABRT]), said


def test_one_that_fails_where_nobody_listens_ends_all():
    body = """
        if index == 1:
            read, write = os.pipe()
            os.close(read)
            os.dup2(write, 2)
            raise RuntimeError('unheard')
        distributed.barrier('nobody comes')
    """
    with processes(body, 2) as started:
        codes, _, errs = ends(started)
    assert codes == [1, 1] and 'process 1 has ended (RuntimeError: unheard)' in errs[0]


def test_who_does_not_appear_is_named():
    begun = time.monotonic()
    with processes('', ids=[0, 2], timeout=4) as started:
        codes, _, errs = ends(started)
    assert codes == [2, 2]
    for err in errs:
        assert len(err.splitlines()) == 1
        assert err.startswith('error: 2 of 3 processes appeared within 4 s, missing: process 1.')
    assert time.monotonic() - begun < 20


def test_no_process_0():
    port = free_port()
    with processes('', ids=[1], timeout=2, port=port) as started:
        codes, _, errs = ends(started)
    assert codes == [2]
    assert f'--coordinator_address=127.0.0.1:{port}: process 1 of 3 could not reach' in errs[0]
    assert 'within 2 s (Connection refused)' in errs[0] and len(errs[0].splitlines()) == 1


def test_somebody_else_at_the_address():
    """A server that is not of this run; and process 0 cannot have its port."""
    with socket.create_server(('127.0.0.1', 0)) as server:
        with processes('', ids=[0, 1], timeout=3, port=server.getsockname()[1]) as started:
            codes, _, errs = ends(started)
    assert codes == [2, 2]
    assert 'process 0 cannot listen on port' in errs[0] and 'in use' in errs[0]
    assert 'process 1 of 3 could not reach process 0 within 3 s' in errs[1]


def test_processes_that_do_not_fit_together():
    port = free_port()
    with contextlib.ExitStack() as stack:
        started = {
            **stack.enter_context(processes('', ids=[0], port=port)),
            **stack.enter_context(processes('', 2, ids=[1], port=port)),
        }
        codes, _, errs = ends(started)
    assert codes == [2, 2]
    text = 'error: --process_count=2 in process 1, --process_count=3 in process 0'
    assert all(err.startswith(text) for err in errs), errs


def test_two_processes_with_one_id_and_a_stranger():
    """The one too many is sent away, and the rest go on without it."""
    port = free_port()
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(processes('say(index)', ids=[0, 1], port=port))
        stranger = stack.enter_context(socket.create_connection(wait_for_port(port)))
        stranger.sendall(b'GET / HTTP/1.1\n')
        second = stack.enter_context(processes('say(index)', ids=[1], port=port))
        # Either of the two may have come first.
        while first[1].poll() is None and second[1].poll() is None:
            time.sleep(0.05)
        third = stack.enter_context(processes('say(index)', ids=[2], port=port))
        codes, outs, errs = ends({**first, 2: third[2], 'again': second[1]})
    assert (codes[0], codes[2]) == (0, 0), errs
    assert sorted([codes[1], codes[3]]) == [0, 2]
    assert '--process_id=1 was given to two processes' in errs[1 if codes[1] else 3]
    assert [outs[0], outs[2]] == ['[0]\n', '[2]\n']


def wait_for_port(port: int) -> tuple[str, int]:
    for _ in range(600):
        with contextlib.suppress(OSError), socket.create_connection(('127.0.0.1', port)):
            return '127.0.0.1', port
        time.sleep(0.05)
    raise AssertionError('nobody listens')


@pytest.mark.parametrize('who', [0, 1])
@pytest.mark.parametrize(
    'error, code, said',
    [('ValueError("broken")', 1, 'ValueError: broken'), ('UserError("mend")', 2, 'error: mend')],
)
def test_one_that_fails_ends_all(who, error, code, said):
    body = f"""
        distributed.barrier('up')
        if index == {who}:
            raise {error}
        distributed.barrier('never')
    """
    begun = time.monotonic()
    with processes(body, 2) as started:
        codes, _, errs = ends(started)
    assert codes == [code, code], errs
    assert said in errs[who]
    assert f'error: process {who} has ended (' in errs[1 - who], errs
    assert time.monotonic() - begun < 30
    assert not any('fatal' in err for err in errs)


STEPS = """
    from cmd_jax.parallel.preemption import Deferred
    with Deferred() as deferred:
        if index == 2:
            time.sleep(1)  # still compiles while the others are on their way
        step = 0
        say('up')
        while not deferred.reached():
            step += 1
            time.sleep(0.01 * (index + 1))  # they are never at the same place
        say(step, deferred.reason, deferred.code)
        time.sleep(index)
        raise deferred.interrupted(f'saved at step {step}')
"""


def test_a_signal_to_one_stops_all_at_one_step():
    with processes(STEPS) as started:
        for one in started.values():
            assert one.stdout.readline() == '["up"]\n', one.stderr.read()
        time.sleep(0.2)
        started[1].send_signal(signal.SIGTERM)
        codes, outs, errs = ends(started)
    assert codes == [75, 75, 75], errs
    said = [json.loads(out) for out in outs]
    assert len({s[0] for s in said}) == 1 and said[0][0] > 10
    elsewhere = 'SIGTERM in process 1'
    assert [s[1:] for s in said] == [[elsewhere, 75], ['SIGTERM', 75], [elsewhere, 75]]


def test_sigterm_where_nothing_is_saved_ends_all():
    with processes("say('up')\ntime.sleep(60)", 2) as started:
        for one in started.values():
            assert one.stdout.readline() == '["up"]\n', one.stderr.read()
        begun = time.monotonic()
        started[1].send_signal(signal.SIGTERM)
        codes, _, errs = ends(started)
    assert codes == [75, 75], errs
    assert time.monotonic() - begun < 6
    assert 'process 1 has ended (interrupted: SIGTERM)' in errs[0]
