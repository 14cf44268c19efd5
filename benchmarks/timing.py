"""How the benchmarks time a function, and what they tell of the machine."""

import os
import platform
import time

import jax
import jax.numpy as jnp

from cmd_jax.models import flops
from cmd_jax.training import parts


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
    return parts.compute_dtype('auto')


def matmul_peak(size: int | None = None, repeats: int = 5, dtype=jnp.float32) -> float:
    """GFLOP/s of a product of two matrices; `size`: 4,096 a side on CPUs, 8,192 elsewhere."""
    size = size or (4096 if jax.default_backend() == 'cpu' else 8192)
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(lambda a: a @ a)
    jax.block_until_ready(product(a))
    started = time.time()
    for _ in range(repeats):
        jax.block_until_ready(product(a))
    return repeats * 2e-9 * size**3 / (time.time() - started)


def machine() -> dict:
    """What ran, and on what."""
    return {
        'device': jax.devices()[0].device_kind,
        'cores': os.cpu_count(),
        'python': platform.python_version(),
        'jax': jax.__version__,
        'glibc_tunables': os.environ.get('GLIBC_TUNABLES'),
        'date': time.strftime('%Y-%m-%d'),
    }
