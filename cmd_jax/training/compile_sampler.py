"""What sampling would cost on a TPU slice that is not here: `sample.py --compile_for`.

The three programs of the Generator, compiled for that slice: content frame, motion latent, and the
decoding to pixels. Networks are as the Generator keeps them: layers of those that were trained in
what they compute in, pretrained ones in bfloat16.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from cmd_jax import atomic, sampling, stable_diffusion
from cmd_jax.errors import UserError, writable
from cmd_jax.models.layers import as_computed
from cmd_jax.parallel import compile_only
from cmd_jax.parallel.mesh import batch_sharding, batch_ways, make_mesh, replicated
from cmd_jax.stable_diffusion import weights
from cmd_jax.stable_diffusion.folder import PARTS
from cmd_jax.training import config as configs
from cmd_jax.training import frozen, parts
from cmd_jax.training.compile_for import bytes_on_chip, gigabytes, known_classes


@dataclasses.dataclass(frozen=True)
class SamplerReport:
    """The cost of a batch of videos on a slice.

    Attributes:
      slice, chips: what was compiled for.
      videos: in a batch.
      size: [frames, height, width] of a video.
      weights_bytes: of all networks on a chip.
      memory_bytes: that a chip has.
      programs: {name: compile_only.Cost}, None for one that does not fit.
    """

    slice: str
    chips: int
    videos: int
    size: list[int]
    weights_bytes: int
    memory_bytes: float
    programs: dict[str, compile_only.Cost | None]

    @property
    def peak(self) -> int | None:
        """Bytes on a chip: all networks, and the work of the largest program; None where one does
        not fit."""
        if None in self.programs.values():
            return None
        return self.weights_bytes + max(cost.work for cost in self.programs.values())

    @property
    def fits(self) -> bool:
        return self.peak is not None and self.peak <= self.memory_bytes

    def row(self) -> dict:
        """For JSON."""
        return dataclasses.asdict(self) | {'fits': self.fits, 'peak': self.peak}

    def lines(self) -> str:
        """For people."""
        frames, height, width = self.size
        rows = [
            ('videos', f'{self.videos} of {frames} x {height} x {width}'),
            ('networks on a chip', gigabytes(self.weights_bytes)),
        ]
        for name, cost in self.programs.items():
            told = 'does not fit'
            if cost is not None:
                told = f'work {gigabytes(cost.work)}, compiled in {cost.seconds:.0f} s'
            rows.append((name, told))
        if self.peak is not None:
            rows.append(('peak', f'{gigabytes(self.peak)} of {gigabytes(self.memory_bytes)}'))
        rows.append(('fits', 'yes' if self.fits else 'no'))
        title = f'sampling on {self.slice} ({self.chips} chips)'
        return '\n'.join([title] + [f'  {name:20} {value}' for name, value in rows])


def run(
    config: configs.Config,
    names: list[str],
    videos: int,
    *,
    classes: int | None = None,
    search: bool = False,
    out: str | Path | None = None,
) -> list[SamplerReport]:
    """Compiles sampling for slices, and prints what it costs there.

    Args:
      config: of a run.
      names: of slices, such as 'v5e:1x1'.
      videos: at a time, on all chips.
      classes: of the run's data; None: see `compile_for.known_classes`.
      search, out: see `compile_for.run`.

    Raises:
      UserError: an unknown slice, no TPU compiler, or videos that do not split over the slice.
    """
    slices = [compile_only.find(name) for name in names]
    if out:
        writable('--compile_report', Path(out).parent)
    # Programs for other machines cannot be read back from it.
    jax.config.update('jax_enable_compilation_cache', False)
    reports = []
    for place in slices:
        reports.append(measure(config, place, videos, classes, search))
        print(reports[-1].lines(), flush=True)
    if out:
        atomic.write(out, json.dumps([report.row() for report in reports], indent=1) + '\n')
    return reports


def measure(
    config: configs.Config,
    place: compile_only.Slice,
    videos: int,
    classes: int | None = None,
    search: bool = False,
) -> SamplerReport:
    """The cost of sampling on one slice."""
    mesh = make_mesh(devices=place.devices)
    if videos % batch_ways(mesh):
        raise UserError(
            f'--num_videos={videos} does not split over the {mesh.size} chips of {place.name}: '
            f'choose a multiple of {batch_ways(mesh)}'
        )
    classes = known_classes(config) if classes is None else classes
    with jax.set_mesh(mesh):
        networks, lowered = programs(config, classes, videos, mesh)
        costs = {}
        for name, program in lowered.items():
            try:
                costs[name] = compile_only.compile_program(program, search)[1]
            except compile_only.DoesNotFit:
                costs[name] = None
    data = config.data
    return SamplerReport(
        slice=place.name,
        chips=mesh.size,
        videos=videos,
        size=[data.frames, data.height, data.width],
        weights_bytes=bytes_on_chip(networks),
        memory_bytes=place.chip.memory,
        programs=costs,
    )


def programs(config: configs.Config, classes: int, videos: int, mesh) -> tuple[dict, dict]:
    """(abstract networks, {name: lowered program}) of sampling."""
    text, source = config.condition == 'text', config.stable_diffusion.source
    dtype, batch = parts.compute_dtype('auto'), batch_sharding(mesh)

    def shaped(make):
        return frozen.shaped(as_computed(nnx.eval_shape(lambda: make(nnx.Rngs(0)))), mesh)

    def pretrained(where, part):
        sizes = stable_diffusion.arguments(where, part)
        return frozen.shaped(
            weights.abstract(PARTS[part].module, **sizes, dtype=dtype), mesh, dtype
        )

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((videos, *shape), dtype, sharding=batch)

    networks = {
        name: shaped(lambda rngs, name=name: parts.make_network(name, config, classes, rngs))
        for name in configs.STAGES
    }
    vae = pretrained(source, 'vae') if source else None
    given = {'content': array(dtype=jnp.int32), 'motion': array(dtype=jnp.int32)}
    if source:
        networks['vae'] = vae
    if text:
        for stage in ('content', 'motion'):
            encoder = pretrained(parts.text_source(config, stage), 'text_encoder')
            networks[f'text of {stage}'] = encoder
            tokens = (encoder.length,) if stage == 'content' else ()
            given[stage] = array(*tokens, encoder.dim)
        if parts.text_source(config, 'motion') == source:
            del networks['text of motion']

    def chosen(stage):
        found = getattr(config, stage).sampling
        return found if text or classes else dataclasses.replace(found, guidance=1.0)

    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), videos))
    keys = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=batch)
    frame, autoencoder = parts.frame_shape(config), networks['autoencoder']
    motion = autoencoder.motion_channels
    statistics = jax.ShapeDtypeStruct((motion,), jnp.float32, sharding=replicated(mesh))
    latent = config.data.frames, autoencoder.motion_tokens, motion
    return networks, {
        'content frame': sampling.content_program.lower(
            networks['content'],
            parts.make_process(config.content.process),
            *(keys, given['content'], given['content'], frame),
            sampling=chosen('content'),
            **parts.content_sampling(config),
        ),
        'motion latent': sampling.motion_program.lower(
            networks['motion'],
            parts.make_process(config.motion.process),
            *(keys, array(*frame), given['motion'], given['motion']),
            dict.fromkeys(('mean', 'std'), statistics),
            sampling=chosen('motion'),
            content_noise=config.motion.content_noise,
        ),
        'video': sampling.decode_program.lower(
            *(autoencoder, vae, array(*frame), array(*latent)),
            at_once=config.stable_diffusion.frames_at_once,
        ),
    }
