"""What the environment says of other processes, and where compiled programs are kept."""

import os

import jax
import pytest

from cmd_jax.errors import UserError
from cmd_jax.parallel import distributed
from tests.test_distributed import environment


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
        (SLURM | {'CUDA_VISIBLE_DEVICES': '0,1', 'SLURM_GPUS_PER_TASK': '2'}, (4, 3), None),
        (SLURM | {'CUDA_VISIBLE_DEVICES': '0,1', 'SLURM_GPUS_PER_TASK': 'a100:2'}, (4, 3), None),
        # But not with --gpu-bind=none.
        (SLURM | {'CUDA_VISIBLE_DEVICES': '0,1,2,3', 'SLURM_GPUS_PER_TASK': '2'}, (4, 3), [2, 3]),
        # More GPUs than tasks.
        (SLURM | {'SLURM_GPUS_ON_NODE': '2'}, (4, 3), [1]),
        (SLURM | {'SLURM_GPUS_ON_NODE': '8'}, (4, 3), [4, 5, 6, 7]),
        (SLURM | {'CUDA_VISIBLE_DEVICES': '4,5,6,7'}, (4, 3), [2, 3]),
        (MPI, (8, 5), [1]),
        (MPI | {'CUDA_VISIBLE_DEVICES': '0,1,2,3,4,5,6,7'}, (8, 5), [2, 3]),
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
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0.1
    assert jax.config.jax_compilation_cache_max_size == 8 * 2**30
    distributed.cache_compiled('gs://bucket/compiled')
    assert jax.config.jax_compilation_cache_dir == 'gs://bucket/compiled'
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 1
    monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path))
    distributed.cache_compiled(str(tmp_path / 'other'))
    assert jax.config.jax_compilation_cache_dir == 'gs://bucket/compiled'
