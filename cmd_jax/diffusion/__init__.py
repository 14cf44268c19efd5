"""Diffusion mathematics: process (schedule, targets, losses), samplers, guidance. No networks."""

from cmd_jax.diffusion.guidance import guide
from cmd_jax.diffusion.process import Process
from cmd_jax.diffusion.samplers import SAMPLERS, SPACINGS, Sampling, sample, timesteps

__all__ = ['SAMPLERS', 'SPACINGS', 'Process', 'Sampling', 'guide', 'sample', 'timesteps']
