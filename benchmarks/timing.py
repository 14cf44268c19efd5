"""How the benchmarks time a function, and what they tell of the machine."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from cmd_jax.models import flops
from cmd_jax.parallel.mesh import compute_dtype


def measure(fn, *args, seconds: float = 2.0) -> dict:
    """The best time of one call and its memory, after compilation."""
    compiled = jax.jit(fn).lower(*args).compile()
    jax.block_until_ready(compiled(*args))
    times, start = [], time.perf_counter()
    while time.perf_counter() - start < seconds or len(times) < 2:
        before = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        times.append(time.perf_counter() - before)
    return {
        'seconds': min(times),
        'gflops_per_second': flops.count(fn, *args).flops / min(times) / 1e9,
        'temporary_mb': compiled.memory_analysis().temp_size_in_bytes / 1e6,
    }


def dtype():
    """What networks compute in on this device."""
    return compute_dtype('auto')


def matmul_peak(size: int | None = None, repeats: int = 5, dtype=jnp.float32) -> float:
    """GFLOP/s of products of two matrices, the median of `repeats`; `size`: 4,096 a side on CPUs,
    8,192 elsewhere."""
    cpu = jax.default_backend() == 'cpu'
    size, chain = size or (4096 if cpu else 8192), 1 if cpu else 16
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    # One after the other, scaled to stay finite: a call a product would be timed with it.
    product = jax.jit(lambda a: jax.lax.fori_loop(0, chain, lambda _, b: a @ b * size**-0.5, a))
    jax.block_until_ready(product(a))
    warm, times = time.perf_counter() + (0.0 if cpu else 0.5), []
    # Accelerators take a while to raise their clock.
    while time.perf_counter() < warm or len(times) < repeats:
        before = time.perf_counter()
        jax.block_until_ready(product(a))
        times.append(time.perf_counter() - before)
    return chain * 2e-9 * size**3 / statistics.median(times[-repeats:])


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
    """What ran, and on what."""
    return {
        'device': jax.devices()[0].device_kind,
        'cores': os.cpu_count(),
        'python': platform.python_version(),
        'jax': jax.__version__,
        'processor': processor(),
        'glibc_tunables': os.environ.get('GLIBC_TUNABLES'),
        'preloaded': [Path(x).name for x in os.environ.get('LD_PRELOAD', '').split(':') if x],
        'date': time.strftime('%Y-%m-%d'),
    }
