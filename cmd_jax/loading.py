"""From the folder of a run to its Generator."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax

from cmd_jax.errors import UserError
from cmd_jax.generate import Generator
from cmd_jax.models.convolution import quick_convolutions
from cmd_jax.models.layers import in_compute_dtype
from cmd_jax.parallel.mesh import make_mesh
from cmd_jax.stable_diffusion import StableDiffusion
from cmd_jax.training import config as configs
from cmd_jax.training import parts, trained


def load(
    workdir: str | Path,
    *,
    stages: Sequence[str] = configs.STAGES,
    stable_diffusion: str | Path | None = None,
    full_precision: bool = False,
) -> Generator:
    """The Generator of a run directory.

    Args:
      workdir: the run.
      stages: those that are needed, the autoencoder among them: it alone can reconstruct, with the
        motion stage it can predict motion, and all three generate.
      stable_diffusion: where the pretrained image model is, if not where it was in training: a
        folder or a repository.
      full_precision: keep parameters as they were trained where layers compute in less (on
        accelerators): twice the memory for the same videos. `Generator.export` needs it.

    Raises:
      UserError: if a stage is missing or not trained to its last step (names the command), or
        content and motion were trained on another autoencoder than the one there, or on
        different conditions.
    """
    unknown = set(stages) - set(configs.STAGES)
    if unknown or 'autoencoder' not in stages:
        raise UserError(
            f'stages={list(stages)}: some of {configs.STAGES}, the autoencoder among them'
        )
    mesh = make_mesh()
    found = {stage: trained.load(workdir, stage, mesh, stable_diffusion) for stage in stages}
    for name, stage in found.items():
        network = quick_convolutions(stage.network)
        network = network if full_precision else in_compute_dtype(network)
        found[name] = dataclasses.replace(stage, network=network)
    there = found['autoencoder'].step
    for stage in set(found) - {'autoencoder'}:
        theirs = found[stage].autoencoder_step
        if theirs != there:
            raise UserError(
                f'{workdir}: {stage} was trained on the autoencoder of step {theirs}, which is now '
                f'at step {there}: train {stage} again, in a new workdir'
            )
    condition = {stage: found[stage].config.condition for stage in set(found) - {'autoencoder'}}
    if len(set(condition.values())) > 1:
        content, motion = condition['content'], condition['motion']
        raise UserError(
            f'{workdir}: content was trained with condition={content!r}, motion with '
            f'condition={motion!r}: train one of them again, in a new workdir'
        )
    cost = {stage: trained.training_cost(workdir, stage) for stage in found}
    return Generator(found, cost, mesh, *_frozen(found, mesh))


def _frozen(
    found: dict[str, trained.Trained], mesh: jax.sharding.Mesh
) -> tuple[StableDiffusion | None, StableDiffusion | None]:
    """The pretrained image model without its U-Net, and the text encoder of the motion stage; each
    None where the stages at hand do not need it."""
    config = found['content' if 'content' in found else 'autoencoder'].config
    text = any(
        stage.config.condition == 'text' for name, stage in found.items() if name != 'autoencoder'
    )
    source, pipeline, motion_text = config.stable_diffusion.source, None, None
    if source:
        wanted = ('vae', 'text_encoder') if text else ('vae',)
        pipeline = parts.load_frozen(source, wanted, mesh)
        pipeline = dataclasses.replace(pipeline, vae=quick_convolutions(pipeline.vae))
    if text and 'motion' in found:
        theirs, motion_text = parts.text_source(found['motion'].config, 'motion'), pipeline
        if theirs != source:
            motion_text = parts.load_frozen(theirs, ('text_encoder',), mesh)
    if text and 'content' in found:
        pipeline = dataclasses.replace(pipeline, unet=found['content'].network)
    return pipeline, motion_text
