"""How the benchmarks time a function, and what they tell of the machine."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import jaxlib

from cmd_jax.models import flops
from cmd_jax.parallel.mesh import compute_dtype


def measure(fn, *args, seconds: float = 2.0) -> dict:
    """The time of one call and its memory, after compilation: medians of five calls or more."""
    compiled = jax.jit(fn).lower(*args).compile()
    found = median(repeated(lambda: compiled(*args), 5, seconds))
    return found | {
        'gflops_per_second': flops.count(fn, *args).flops / found['seconds'] / 1e9,
        'temporary_mb': compiled.memory_analysis().temp_size_in_bytes / 1e6,
    }


def repeated(run: Callable, times: int, seconds: float = 0.0) -> list[float]:
    """Seconds of each of so many calls, or of as many as take that long. One before is not told."""
    jax.block_until_ready(run())
    found, start = [], time.perf_counter()
    while len(found) < times or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        jax.block_until_ready(run())
        found.append(time.perf_counter() - before)
    return found


def median(times: Iterable[float], name: str = 'seconds') -> dict:
    """For a row: {name: median, name_spread: [least, most]}."""
    times = list(times)
    return {name: statistics.median(times), f'{name}_spread': [min(times), max(times)]}


def dtype():
    """What networks compute in on this device."""
    return compute_dtype('auto')


def matmul_peak(size: int | None = None, repeats: int = 5, dtype=jnp.float32) -> float:
    """GFLOP/s of products of two matrices, the median of `repeats`; `size`: 4,096 a side on CPUs,
    8,192 elsewhere."""
    cpu = jax.default_backend() == 'cpu'
    size, chain = size or (4096 if cpu else 8192), 1 if cpu else 16
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    scaled = a * size**-0.5  # to stay finite, and not in the loop: it would be a pass of its own
    # One after the other: a call a product would be timed with it.
    product = jax.jit(lambda a, b: jax.lax.fori_loop(0, chain, lambda _, b: a @ b, b))
    jax.block_until_ready(product(scaled, a))
    warm, times = time.perf_counter() + (0.0 if cpu else 0.5), []
    # Accelerators take a while to raise their clock.
    while time.perf_counter() < warm or len(times) < repeats:
        before = time.perf_counter()
        jax.block_until_ready(product(scaled, a))
        times.append(time.perf_counter() - before)
    return chain * 2e-9 * size**3 / statistics.median(times[-repeats:])


def use_the_whole_gpu():
    """JAX takes three quarters of a GPU's memory; benchmarks of what fits take nearly all.

    Must come before anything touches a device.
    """
    os.environ.setdefault('XLA_PYTHON_CLIENT_MEM_FRACTION', '0.95')


def device_memory(name: str) -> float | None:
    """GB by that name of the device's `memory_stats`, such as 'peak_bytes_in_use'; None where it
    does not tell."""
    found = (jax.devices()[0].memory_stats() or {}).get(name)
    return found and found / 1e9


def processor() -> str:
    """Its name, and the widest vectors that it has."""
    try:
        with open('/proc/cpuinfo') as file:
            lines = dict(x.split(':', 1) for x in file.read().splitlines() if ':' in x)
    except OSError:
        return platform.processor()
    about = {name.strip(): value.strip() for name, value in lines.items()}
    words = about.get('flags', '').split()
    widest = next((x for x in ('amx_tile', 'avx512f', 'avx2') if x in words), '')
    return f'{about.get("model name", platform.machine())} {widest}'.strip()


def in_own_process(benchmark: str, *flags: str) -> dict:
    """The JSON that a benchmark prints last in a process of its own; lines before it are passed on.

    Ends this process where that one fails.
    """
    command = [sys.executable, '-m', f'benchmarks.{benchmark}', *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:  # it has said why
        sys.exit(done.returncode)
    *told, result = done.stdout.splitlines()
    for line in told:
        print(line, flush=True)
    return json.loads(result)


def machine() -> dict:
    """What ran, and on what. Where other processes of a benchmark need the device, from one of its
    own: in_own_process('timing')."""
    device = jax.devices()[0]
    return {
        'device': device.device_kind,
        'devices': jax.device_count(),
        'cores': os.cpu_count(),
        'python': platform.python_version(),
        'jax': jax.__version__,
        'jaxlib': jaxlib.__version__,
        'flax': flax.__version__,
        'runtime': device.client.platform_version,  # of CUDA or libtpu
        'processor': processor(),
        'glibc_tunables': os.environ.get('GLIBC_TUNABLES'),
        'preloaded': [Path(x).name for x in os.environ.get('LD_PRELOAD', '').split(':') if x],
        'date': time.strftime('%Y-%m-%d'),
    }


if __name__ == '__main__':
    print(json.dumps(machine()))
