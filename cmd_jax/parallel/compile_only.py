"""The TPU compiler without a TPU: the devices of a slice that is elsewhere, and what a program that
is compiled for them costs there.

Needs libtpu beside the CPU's jax: pip install -r requirements-tpu-compile.txt
"""

import dataclasses
import math
import os
import re
import time
import typing
from collections.abc import Sequence

import jax

from cmd_jax.errors import UserError, choose
from cmd_jax.parallel import compiled as programs


@dataclasses.dataclass(frozen=True)
class Chip:
    """From Google Cloud's TPU documentation.

    Attributes:
      memory: bytes of HBM.
      flops: dense bfloat16 peak in FLOP/s.
      bandwidth: of HBM, bytes/s.
      axes: of its slices' shapes.
    """

    memory: float
    flops: float
    bandwidth: float
    axes: int


CHIPS = {
    'v4': Chip(32 * 2**30, 275e12, 1228e9, 3),
    'v5e': Chip(16 * 2**30, 197e12, 819e9, 2),
    'v5p': Chip(95 * 2**30, 459e12, 2765e9, 3),
    'v6e': Chip(32 * 2**30, 918e12, 1640e9, 2),
}
UTILISATION = 0.4  # of the peak, for the step time that is told

# Machine code that is made quickly, not quick machine code: with no search for the fastest tiles
# and overlaps, which takes most of the time, and few tiles to choose from; no second round of
# simplifications; instructions in the order in which they come; one route for a reduction, not
# several; no reductions joined, as the code for one grows faster than the number of its arrays;
# equal code made once. What is computed and the bytes that are communicated stay the same.
# Reductions are more, and need less memory by what is joined; the code is larger by some ten
# megabytes, and buffers may lie with more room between them.
QUICK = {
    'exec_time_optimization_effort': -1.0,
    'xla_tpu_enable_async_collective_fusion': 'false',
    'xla_jf_convolution_performance_target': '0',
    'xla_jf_fusion_max_instruction_count_for_window_config': '1',
    'xla_jf_naive_bundle_packer': 'true',
    'xla_jf_enable_advanced_multi_output_fusion': 'false',
    'xla_tpu_hlo_pass_fix_pipeline_iteration_limit': '1',
    'xla_jf_use_multi_colors_in_all_reduce_if_supported': 'false',
    'xla_jf_crs_combiner_threshold_count': '1',
    'xla_tpu_enable_deduplicated_calls': 'true',
}
TILES = {'xla_tpu_scoped_vmem_limit_kib': '8192'}  # of vector memory; kernels may need more


@dataclasses.dataclass(frozen=True)
class Slice:
    """A TPU slice, or several that work together.

    Attributes:
      name: such as 'v5e:8x8', or 'v5e:8x8*2' for two slices.
      chip: of CHIPS.
      devices: that programs can be compiled for.
    """

    name: str
    chip: Chip
    devices: list


# Passes on several threads; programs for several slices fail with it.
PARALLEL = '--xla_tpu_impure_hlo_parallel_compile=true'


def find_all(names: Sequence[str]) -> list[Slice]:
    """The slices of these names, in one process; raises what `find` raises."""
    # The compiler reads it once in a process.
    if not any('*' in name for name in names):
        os.environ.setdefault('LIBTPU_INIT_ARGS', PARALLEL)
    # Every operation would carry the lines of source that it comes from through all passes.
    jax.config.update('jax_traceback_in_locations_limit', 0)
    return [find(name) for name in names]


def find(name: str) -> Slice:
    """The slice of that name.

    Raises:
      UserError: an unknown name, or libtpu is not installed.
    """
    told = f'--compile_for={name}'
    match = re.fullmatch(r'([a-z0-9]+):(\d+(?:x\d+)*)(?:\*(\d+))?', name)
    if not match:
        raise UserError(f'{told}: give CHIP:SHAPE, such as v5e:8x8 or v5p:4x4x4, or v5e:8x8*2')
    kind, shape, slices = match[1], match[2], int(match[3] or 1)
    if slices < 1:
        raise UserError(f'{told}: *{slices} must be at least *1')
    choose('--compile_for: chip', kind, CHIPS)
    chip = CHIPS[kind]
    if shape.count('x') + 1 != chip.axes:
        raise UserError(f'{told}: the slices of {kind} have {chip.axes} axes')
    # The compiler would ask the machine that it is on for its TPUs.
    os.environ['TPU_SKIP_MDS_QUERY'] = '1'
    os.environ['TPU_WORKER_HOSTNAMES'] = 'localhost'
    os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-4')
    # No TPU is taken: several processes may compile.
    os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', 'true')
    try:
        import libtpu  # noqa: F401  is it there?
    except ImportError as e:
        raise UserError(
            f'{told}: the TPU compiler is missing: pip install -r requirements-tpu-compile.txt'
        ) from e
    from jax.experimental import topologies

    options = {'num_slices': slices} if slices > 1 else {}
    if kind == 'v4':
        # A chip's two cores are one device, as on the machine itself.
        options['chip_config_name'] = 'megacore'
    if math.prod(map(int, shape.split('x'))) == 1:
        options['chips_per_host_bounds'] = [1, 1, 1]
    try:
        found = topologies.get_topology_desc(
            platform='tpu', topology_name=f'{kind}:{shape}', **options
        )
    except jax.errors.JaxRuntimeError as e:
        raise UserError(f'{told}: {str(e).splitlines()[0]}') from e
    return Slice(name, chip, list(found.devices))


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a compiled program costs on one chip.

    Attributes:
      seconds: of compilation.
      arguments: bytes of what it reads.
      work: bytes of what it needs besides, at most.
      peak: bytes in all.
      collectives: {kind: {'count', 'bytes'}} of a run.
      traffic: bytes to and from the chip's memory in a run, about.
    """

    seconds: float
    arguments: int
    work: int
    peak: int
    collectives: dict
    traffic: int


def compile_program(lowered: typing.Any, search: bool = False) -> tuple[typing.Any, Cost]:
    """Compiles a lowered program for the devices of its mesh.

    Args:
      lowered: of `jax.jit(...).lower(...)`.
      search: for the fastest tiles and overlaps too: minutes more.

    Raises:
      DoesNotFit: into the memory of a chip.
    """
    started = time.time()
    try:
        program = _compile(lowered, search)
    except jax.errors.JaxRuntimeError as e:
        if 'RESOURCE_EXHAUSTED' not in str(e):
            raise
        raise DoesNotFit(_needed(str(e))) from e
    seconds, memory = time.time() - started, program.memory_analysis()
    made = memory.output_size_in_bytes - memory.alias_size_in_bytes
    work = memory.temp_size_in_bytes + made + memory.generated_code_size_in_bytes
    computations = programs.parse(program.as_text())
    return program, Cost(
        seconds=seconds,
        arguments=memory.argument_size_in_bytes,
        work=work,
        peak=memory.argument_size_in_bytes + work,
        collectives=programs.collectives(computations),
        traffic=programs.memory_traffic(computations),
    )


def _compile(lowered, search: bool):
    if search:
        return lowered.compile()
    try:
        return lowered.compile(compiler_options=QUICK | TILES)
    except jax.errors.JaxRuntimeError as e:
        if 'memory space vmem' not in str(e):
            raise
    return lowered.compile(compiler_options=QUICK)


class DoesNotFit(Exception):
    """A program needs more memory than a chip has.

    Attributes:
      needed: bytes, where the compiler tells.
    """

    def __init__(self, needed: float | None):
        super().__init__(needed)
        self.needed = needed


def _needed(message: str) -> float | None:
    # Two wordings of libtpu's.
    found = re.search(r'([\d.]+)([KMGT]?)(?: of \S+ hbm|\) exceeds available HBM)', message)
    return found and float(found[1]) * 1024 ** ' KMGT'.index(found[2] or ' ')
