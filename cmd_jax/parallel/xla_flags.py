"""Options of XLA that only its environment variable can set."""

import os

_NAME = '--xla_backend_extra_options'

# Of its CPU backend; those that do not know names in xla_ pass over them, as the TPU compiler does.
# One kernel for several results of the same arrays (as in an update), and no loops unrolled: fewer
# and smaller kernels to compile, and what they share is read and computed once. docs/speed.md has
# what it gives.
CPU = ('xla_cpu_use_multi_output_fusion', 'xla_cpu_disable_loop_unrolling')


def add(flags: str) -> str:
    """XLA_FLAGS with the options of `CPU`, unless there are such options in it."""
    return flags if _NAME in flags else f'{flags} {_NAME}={",".join(CPU)}'.strip()


def set_options():
    """Must come before anything touches a device, when XLA reads the variable."""
    os.environ['XLA_FLAGS'] = add(os.environ.get('XLA_FLAGS', ''))
