"""Diffusion mathematics: process (schedule, targets, losses), samplers, guidance. No networks."""

from cmd_jax.diffusion.guidance import guide
from cmd_jax.diffusion.process import Process
from cmd_jax.diffusion.samplers import SAMPLERS, SPACINGS, sample, timesteps

__all__ = ['SAMPLERS', 'SPACINGS', 'Process', 'guide', 'sample', 'timesteps']
