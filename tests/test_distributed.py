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

import jax
import pytest

from cmd_jax.errors import UserError
from cmd_jax.parallel import distributed


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


@pytest.fixture
def env(monkeypatch):
    for name in set(os.environ) - set(environment()):
        monkeypatch.delenv(name)
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    return monkeypatch


def find(mode='auto', address=None, count=None, index=None, timeout=5.0):
    return distributed.find(mode, address, count, index, timeout)


@pytest.mark.parametrize(
    'given, error',
    [
        (dict(count=2), '--process_count=2 needs --coordinator_address and --process_id too'),
        (dict(address='h:1', index=0), '--coordinator_address=h:1 needs --process_count too'),
        (dict(address='h:1', count=2, index=2), '--process_id=2 must be .* below --process_count'),
        (dict(address='h:1', count=0, index=0), '--process_count=0 must be at least 1'),
        (dict(address='host', count=2, index=0), '--coordinator_address=host must be HOST:PORT'),
        (dict(address='h:99999', count=2, index=0), '--coordinator_address=h:99999 must be'),
        (dict(mode='off', index=1), '--process_id=1 needs several processes, --distributed=off'),
        (dict(mode='onn'), "--distributed='onn' is unknown: did you mean 'on'"),
        (dict(timeout=0.0), '--startup_timeout=0 must be above 0'),
        (dict(mode='on'), '--distributed=on: JAX cannot detect the cluster'),
    ],
)
def test_flags_that_do_not_fit(env, given, error):
    with pytest.raises(UserError, match=error):
        find(**given)


SLURM = {
    'SLURM_JOB_ID': '7',
    'SLURM_STEP_NODELIST': 'node[03-04]',
    'SLURM_NTASKS': '8',
    'SLURM_STEP_NUM_TASKS': '4',
    'SLURM_STEP_NUM_NODES': '2',
    'SLURM_PROCID': '3',
    'SLURM_LOCALID': '1',
}
MPI = {
    'OMPI_MCA_orte_hnp_uri': '1531576320.0;tcp://10.96.0.1,10.148.0.1:34911',
    'OMPI_COMM_WORLD_SIZE': '8',
    'OMPI_COMM_WORLD_RANK': '5',
    'OMPI_COMM_WORLD_LOCAL_RANK': '1',
    'OMPI_COMM_WORLD_LOCAL_SIZE': '4',
}


@pytest.mark.parametrize(
    'given, place, devices',
    [
        (SLURM, (4, 3), [1]),
        # One process for a whole host; and srun --gpus-per-task, which shows each its own GPU.
        (SLURM | {'SLURM_STEP_NUM_TASKS': '2', 'SLURM_PROCID': '1'}, (2, 1), None),
        (SLURM | {'CUDA_VISIBLE_DEVICES': '1'}, (4, 3), None),
        (MPI, (8, 5), [1]),
        (MPI | {'OMPI_COMM_WORLD_LOCAL_SIZE': '1'}, (8, 5), None),
    ],
)
def test_clusters_of_gpus(env, given, place, devices):
    for name, value in given.items():
        env.setenv(name, value)
    found = find()
    assert (found.count, found.index) == place and found.devices == devices
    assert found.address.split(':')[0] in ('node03', '10.96.0.1')
    assert find('off') is None


@pytest.mark.parametrize(
    'given',
    [
        {},
        SLURM | {'SLURM_STEP_NUM_TASKS': '1'},
        # A batch script, outside of srun.
        {'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '8', 'SLURM_PROCID': '0', 'SLURM_LOCALID': '0'},
        MPI | {'OMPI_COMM_WORLD_SIZE': '1'},
        {'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_WORKER_ID': '0'},
        {'MEGASCALE_NUM_SLICES': '1', 'TPU_WORKER_HOSTNAMES': 'localhost'},
    ],
)
def test_one_process(env, given):
    for name, value in given.items():
        env.setenv(name, value)
    assert find() is None


def test_open_mpi_without_an_address(env):
    """JAX cannot detect newer ones: many single runs would write the same files."""
    env.setenv('OMPI_COMM_WORLD_SIZE', '4')
    with pytest.raises(UserError, match='OMPI_COMM_WORLD_SIZE=4.*give --coordinator_address'):
        find()


@pytest.mark.parametrize(
    'given, place',
    [
        ({'TPU_WORKER_HOSTNAMES': 'a,b,c', 'TPU_WORKER_ID': '2'}, (3, 2)),
        (
            {
                'TPU_WORKER_HOSTNAMES': 'a,b',
                'TPU_WORKER_ID': '1',
                'MEGASCALE_NUM_SLICES': '2',
                'MEGASCALE_SLICE_ID': '1',
                'MEGASCALE_COORDINATOR_ADDRESS': 'localhost:8080',
            },
            (4, 3),
        ),
        # Slices of one host each.
        (
            {
                'TPU_WORKER_HOSTNAMES': 'a',
                'TPU_WORKER_ID': '0',
                'MEGASCALE_NUM_SLICES': '2',
                'MEGASCALE_SLICE_ID': '1',
                'MEGASCALE_COORDINATOR_ADDRESS': 'localhost',
            },
            (2, 1),
        ),
    ],
)
def test_tpu_pods(env, given, place):
    from jax._src.clusters import cloud_tpu_cluster

    env.setattr(cloud_tpu_cluster, 'running_in_cloud_tpu_vm', True)
    env.setattr(cloud_tpu_cluster.BaseTpuCluster, 'wait_for_coordinator', lambda *_: None)
    # Kubernetes sets all of these on several slices; on one, JAX asks the metadata server.
    answers = {'MEGASCALE_COORDINATOR_ADDRESS': '', 'MEGASCALE_NUM_SLICES': ''}
    env.setattr(cloud_tpu_cluster, 'get_tpu_env_value_from_metadata', answers.get)
    for name, value in ({'TPU_SKIP_MDS_QUERY': '1'} | given).items():
        env.setenv(name, value)
    found = find()
    assert (found.count, found.index) == place and found.devices is None
    assert found.address.split(':')[0] in ('a', 'localhost')


@pytest.fixture
def options(monkeypatch):
    names = ('compilation_cache_dir', 'compilation_cache_max_size')
    names = ['jax_' + n for n in names] + ['jax_persistent_cache_min_compile_time_secs']
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR', raising=False)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_compiled_programs_are_kept(options, monkeypatch, tmp_path, log):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    jax.config.update('jax_compilation_cache_dir', None)
    distributed.cache_compiled('')
    assert jax.config.jax_compilation_cache_dir is None
    (tmp_path / 'file').write_text('')
    distributed.cache_compiled(str(tmp_path / 'file'))
    assert jax.config.jax_compilation_cache_dir is None
    (record,) = log.records
    assert record.getMessage().startswith('compiled programs are not kept: --compilation_cache=')
    distributed.cache_compiled(None)
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / 'cmd_jax' / 'compiled')
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 1.0
    assert jax.config.jax_compilation_cache_max_size == 8 * 2**30
    monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path))
    distributed.cache_compiled(str(tmp_path / 'other'))
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / 'cmd_jax' / 'compiled')
