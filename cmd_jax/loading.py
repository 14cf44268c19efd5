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
    text_encoder: str | Path | None = None,
    full_precision: bool = False,
) -> Generator:
    """The Generator of a run directory.

    Args:
      workdir: the run.
      stages: those that are needed, the autoencoder among them: it alone can reconstruct, with the
        motion stage it can predict motion, and all three generate.
      stable_diffusion: where the pretrained image model is, if not where it was in training: a
        folder or a repository.
      text_encoder: the same of the motion stage's own text encoder (`motion.text_encoder`).
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
    moved = stable_diffusion, text_encoder
    found = {stage: trained.load(workdir, stage, mesh, *moved) for stage in stages}
    check_together(workdir, found)
    for name, stage in found.items():
        network = quick_convolutions(stage.network)
        network = network if full_precision else in_compute_dtype(network)
        found[name] = dataclasses.replace(stage, network=network)
    cost = {stage: trained.training_cost(workdir, stage) for stage in found}
    return Generator(found, cost, mesh, *_frozen(found, mesh))


def check_together(workdir: str | Path, found: dict[str, trained.Trained]):
    """Raises UserError unless the stages of a run are of one another, see `load`."""
    later = {stage: x for stage, x in found.items() if stage != 'autoencoder'}
    if not later:
        return
    there = trained.inputs_on([], found['autoencoder'])
    for stage, x in later.items():
        if wrong := trained.other_autoencoder(x.inputs, there):
            raise UserError(
                f'{workdir}: {stage} was trained on {wrong}: train {stage} again, in a new workdir'
            )
    if len(later) == 1:
        return
    content, motion = (later[stage].config.condition for stage in ('content', 'motion'))
    if content != motion:
        raise UserError(
            f'{workdir}: content was trained with condition={content!r}, motion with '
            f'condition={motion!r}: train one of them again, in a new workdir'
        )
    trained.check_classes(workdir, {stage: x.inputs.class_names for stage, x in later.items()})


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
