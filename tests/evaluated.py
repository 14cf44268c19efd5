"""Protocols carried out in seconds, for several test files."""

from cmd_jax.evaluation import measure
from cmd_jax.evaluation.protocols import PROTOCOLS

# I3D at a size that takes no time.
FEW = measure.Settings(num_videos=6, size=32, batch_size=8)


def carry_out(generator, name, cache, settings=FEW):
    return measure.measure(generator, name, PROTOCOLS[name], settings, cache)
