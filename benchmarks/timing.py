"""How the benchmarks time a function."""

import time

import jax

from cmd_jax.models import flops


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
