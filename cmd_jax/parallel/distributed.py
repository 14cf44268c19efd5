"""Several processes that train as one: start-up, and what they do together.

One process per host (Cloud TPU pods, several slices) or per GPU (SLURM, Open MPI), or several on
one machine. `start` joins them, before anything touches a device; `coordination` says how they end.
"""

import dataclasses
import importlib.util
import logging as stdlogging
import os
import threading
import time

from absl import logging

from cmd_jax.errors import UserError, choose, writable
from cmd_jax.parallel import rendezvous
from cmd_jax.parallel.coordination import exit_at_once, place, watch

MODES = ('auto', 'on', 'off')
CACHE_BYTES = 8 * 2**30
SHARED_SECONDS = 15.0  # that a file of one process may take to be seen by the others


@dataclasses.dataclass(frozen=True)
class Cluster:
    """One process's place: `devices` are those of its host that it takes; None: all of them."""

    address: str
    count: int
    index: int
    devices: list[int] | None = None


def start(
    mode: str = 'auto',
    address: str | None = None,
    count: int | None = None,
    index: int | None = None,
    timeout: float = 300.0,
):
    """Joins the processes of a run; must come before anything touches a device.

    Args:
      mode: 'off': one process. 'on': several, by the next three, or as JAX detects the cluster.
        'auto': like 'on' where these are given, else only where the environment shows more than
        one process (srun, mpirun, a Cloud TPU pod or several slices).
      address: 'HOST:PORT' of process 0; all three or none of this and the next two.
      count: processes.
      index: of this process, 0 to count - 1. Where these are given, a process takes all devices of
        its host that JAX_LOCAL_DEVICE_IDS or CUDA_VISIBLE_DEVICES leave it.
      timeout: seconds that all processes have to appear.

    Raises:
      UserError: flags that do not fit together, no cluster to be detected, or processes that did
        not appear; it says which.
    """
    cluster = find(mode, address, count, index, timeout)
    if cluster is not None:
        _connect(cluster, timeout)
        quiet(cluster.index)
        logging.info('process 0 of %d, at %s', cluster.count, cluster.address)


def find(
    mode: str, address: str | None, count: int | None, index: int | None, timeout: float
) -> Cluster | None:
    """The place of this process in a run of several, or None; see `start`."""
    choose('--distributed', mode, MODES)
    given = {'coordinator_address': address, 'process_count': count, 'process_id': index}
    named = [f'--{k}={v}' for k, v in given.items() if v is not None]
    missing = [f'--{k}' for k, v in given.items() if v is None]
    if timeout <= 0:
        raise UserError(f'--startup_timeout={timeout:g} must be above 0')
    if mode == 'off':
        if named:
            raise UserError(
                f'{named[0]} needs several processes, --distributed=off is one: leave one out'
            )
        return None
    if named:
        if missing:
            raise UserError(f'{named[0]} needs {" and ".join(missing)} too')
        if count < 1:
            raise UserError(f'--process_count={count} must be at least 1')
        if not 0 <= index < count:
            raise UserError(
                f'--process_id={index} must be at least 0 and below --process_count={count}'
            )
        try:
            rendezvous.split(address)
        except ValueError as e:
            raise UserError(
                f'--coordinator_address={address} must be HOST:PORT of process 0'
            ) from e
        return Cluster(address, count, index)
    sign = several()
    if mode == 'auto' and sign is None:
        return None
    try:
        cluster = _detect(int(timeout))
    except Exception as e:
        # What JAX asks here (environment, metadata server, Kubernetes) fails in many ways.
        # JAX knows of a pod where it has looked for its process 0.
        if sign == _TPU_VM and mode == 'auto' and 'coordinator address' not in str(e):
            logging.warning('one process: this TPU VM does not say whether it is of a pod (%s)', e)
            return None
        raise UserError(
            f'--distributed={mode}: JAX cannot detect the cluster ({sign or "no sign of one"}; '
            f'{e}): give --coordinator_address, --process_count and --process_id, or '
            '--distributed=off for one process'
        ) from e
    for name, given in (('address of process 0', cluster.address), (_BIND, os.environ.get(_BIND))):
        try:
            rendezvous.split(given or 'host:1')
        except ValueError as e:
            raise UserError(
                f'{name}={given!r} must be HOST:PORT: set it in the environment '
                '(JAX_COORDINATOR_ADDRESS), or give --coordinator_address'
            ) from e
    # A TPU VM of one host needs nobody.
    return cluster if mode == 'on' or cluster.count > 1 else None


_TPU_VM = 'a Cloud TPU VM'
_BIND = 'JAX_COORDINATOR_BIND_ADDRESS'


def launched() -> str | None:
    """What shows that mpirun or srun has started several of this process, or None."""
    env = os.environ
    if _number('OMPI_COMM_WORLD_SIZE') > 1:
        return f'OMPI_COMM_WORLD_SIZE={env["OMPI_COMM_WORLD_SIZE"]}'
    # A batch script has SLURM_NTASKS, too; only srun starts that many.
    if {'SLURM_STEP_NODELIST', 'SLURM_PROCID'} <= env.keys() and _tasks() > 1:
        return f'{_tasks()} tasks of srun'
    return None


def several() -> str | None:
    """What in the environment shows that this may be one of several processes, or None."""
    env = os.environ
    if found := launched():
        return found
    for name in ('TPU_PROCESS_ADDRESSES', 'TPU_WORKER_HOSTNAMES'):
        if ',' in env.get(name, ''):
            return f'{name}={env[name]}'
    if _number('MEGASCALE_NUM_SLICES') > 1:
        return f'MEGASCALE_NUM_SLICES={env["MEGASCALE_NUM_SLICES"]}'
    if env.get('MEGASCALE_COORDINATOR_ADDRESS') and 'MEGASCALE_NUM_SLICES' not in env:
        return f'MEGASCALE_COORDINATOR_ADDRESS={env["MEGASCALE_COORDINATOR_ADDRESS"]}'
    if 'TPU_WORKER_HOSTNAMES' in env or 'TPU_PROCESS_ADDRESSES' in env:
        return None  # a single host
    from jax._src import cloud_tpu_init

    # A TPU VM outside Kubernetes knows only from its metadata server.
    if cloud_tpu_init.running_in_cloud_tpu_vm and 'TPU_SKIP_MDS_QUERY' not in env:
        return _TPU_VM
    return None


def _number(name: str) -> int:
    value = os.environ.get(name, '')
    return int(value) if value.isdecimal() else 0


def _tasks() -> int:
    # SLURM_NTASKS of the allocation may differ from that of the step.
    return _number('SLURM_STEP_NUM_TASKS') or _number('SLURM_NTASKS')


def _detect(timeout: int) -> Cluster:
    """What JAX detects, before it connects."""
    from jax._src import clusters

    found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
        os.environ.get('JAX_COORDINATOR_ADDRESS'), None, None, None, None, timeout
    )
    address, count, index, devices = found
    if address is None or count is None or index is None:
        raise ValueError('no known kind of cluster')
    on_host = _number('OMPI_COMM_WORLD_LOCAL_SIZE')
    if clusters.SlurmCluster.is_env_present() and not clusters.OmpiCluster.is_env_present():
        count, hosts = _tasks(), _number('SLURM_STEP_NUM_NODES')
        on_host = count // hosts if hosts and count % hosts == 0 else 0
    # JAX gives each process the one GPU of its number. One process for a whole host takes all, and
    # a launcher that shows each process its own GPUs has chosen already.
    shown = os.environ.get('CUDA_VISIBLE_DEVICES')
    seen = shown.count(',') + 1 if shown else None
    chosen = 'JAX_LOCAL_DEVICE_IDS' in os.environ or (shown is not None and seen in (None, 1))
    if 'SLURM_GPUS_PER_TASK' in os.environ:
        # srun --gpu-bind=none shows each the others' as well. The number may follow a kind: a100:2.
        per_task = os.environ['SLURM_GPUS_PER_TASK'].rpartition(':')[2]
        chosen |= seen is None or not per_task.isdecimal() or seen <= int(per_task)
    if on_host == 1 or chosen:
        devices = None
    if devices is not None and on_host:
        # Fewer processes than GPUs share them.
        gpus = seen or _number('SLURM_GPUS_ON_NODE')
        each = max(1, gpus // on_host)
        devices = [each * i + k for i in devices for k in range(each)]
    return Cluster(address, count, index, None if devices is None else list(devices))


def _connect(cluster: Cluster, timeout: float):
    import jax

    deadline = time.monotonic() + timeout
    address, count, index = cluster.address, cluster.count, cluster.index
    bind = os.environ.get(_BIND) or f'[::]:{address.rpartition(":")[2]}'
    rendezvous.meet(address, bind, count, index, timeout)
    # It would take SIGTERM for itself: see cmd_jax.parallel.preemption.
    jax.config.update('jax_enable_preemption_service', False)
    stdlogging.getLogger('jax._src.distributed').setLevel(stdlogging.WARNING)
    # All are there; should one be lost now, JAX would abort.
    left = max(10.0, deadline - time.monotonic())
    message = (
        f'error: {count} processes met at {address}, but JAX did not connect them within '
        f'{left:.0f} s: see whether one has ended, and unset proxies in the environment'
    )
    late = threading.Timer(left, exit_at_once, [2, message])
    late.daemon = True
    late.start()
    jax.distributed.initialize(
        address,
        count,
        index,
        local_device_ids=cluster.devices,
        cluster_detection_method='deactivate',
        initialization_timeout=int(left) + 30,
    )
    late.cancel()
    watch()


def quiet(index: int):
    """Logs of processes other than 0: warnings and errors only, each with the process."""
    if index:
        logging.set_verbosity(logging.WARNING)
        logging.get_absl_handler().setFormatter(_Prefixed(index))


class _Prefixed(logging.PythonFormatter):
    def __init__(self, index: int):
        super().__init__()
        self.index = index

    def format(self, record):
        return f'[process {self.index}] {super().format(record)}'


def default_cache() -> str:
    """$XDG_CACHE_HOME/cmd_jax/compiled, in ~/.cache where it is not set."""
    base = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    return os.path.join(base, 'cmd_jax', 'compiled')


def cache_compiled(folder: str | None):
    """Keeps what took over a tenth of a second to compile, for the next run; at an address, which
    takes its time to ask, over a second.

    The ones that were not used for longest go when there are more than CACHE_BYTES.

    Args:
      folder: None: `default_cache()`; '': nothing is kept. A JAX_COMPILATION_CACHE_DIR in the
        environment goes first. One that cannot be written is warned of.
    """
    import jax

    if folder == '' or 'JAX_COMPILATION_CACHE_DIR' in os.environ:
        return
    folder = folder or default_cache()
    if '://' not in folder:
        try:
            writable('--compilation_cache', folder)
        except UserError as e:
            logging.warning('compiled programs are not kept: %s', e)
            return
    jax.config.update('jax_compilation_cache_dir', folder)
    # Not all: JAX looks at each that is there before it keeps another.
    least = 1.0 if '://' in folder else 0.1
    jax.config.update('jax_persistent_cache_min_compile_time_secs', least)
    # JAX limits the size only with this package.
    if importlib.util.find_spec('filelock'):
        jax.config.update('jax_compilation_cache_max_size', CACHE_BYTES)


def is_main() -> bool:
    """Whether this is process 0, which writes what is written once."""
    return place()[0] == 0


def barrier(name: str):
    """Waits until all processes are here, and their devices have done what they were given."""
    if place()[1] > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def check_shared(name: str, folder: str | os.PathLike):
    """Raises UserError in processes that see another folder of that name than process 0."""
    index, count = place()
    if count == 1:
        return
    import numpy as np
    from jax.experimental import multihost_utils

    token = int(multihost_utils.broadcast_one_to_all(np.int32(time.time_ns() % 2**31)))
    path = os.path.join(folder, f'.seen-by-all-{token}')
    if index == 0:
        open(path, 'x').close()
    barrier('a file for all to see')
    # Network file systems show new files late.
    end = time.monotonic() + SHARED_SECONDS
    while not (there := os.path.exists(path)) and time.monotonic() < end:
        time.sleep(0.2)
    seen = multihost_utils.process_allgather(np.array(there)).reshape(-1)
    if index == 0:
        os.unlink(path)
    if not seen.all():
        blind = ', '.join(str(i) for i in np.flatnonzero(~seen))
        raise UserError(
            f'{name}={str(folder)!r} is another folder in process {blind} than in process 0: give '
            'one that all hosts see, such as a network file system'
        )


def any_process(flag: bool) -> bool:
    """Whether `flag` is set in any process; all of them must ask. It waits for the devices."""
    if place()[1] == 1:
        return flag
    import numpy as np
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.array(flag)).any())
