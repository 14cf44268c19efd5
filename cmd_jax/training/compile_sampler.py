"""What sampling would cost on a TPU slice that is not here: `sample.py --compile_for`.

The three programs of the Generator, compiled for that slice: content frame, motion latent, and the
decoding to pixels. Networks are as the Generator keeps them: layers of those that were trained in
what they compute in, pretrained ones in bfloat16.
"""

import dataclasses
import functools
import json
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from cmd_jax import atomic, sampling, stable_diffusion
from cmd_jax.errors import UserError, writable
from cmd_jax.models.flops import count
from cmd_jax.models.layers import in_compute_dtype
from cmd_jax.models.rngs import make_rngs
from cmd_jax.parallel import compile_only
from cmd_jax.parallel.mesh import batch_sharding, batch_ways, compute_dtype, make_mesh, replicated
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
      chip_flops: its peak a second.
      flops: {name: FLOPs of a program on all chips}, guidance included.
      programs: {name: compile_only.Cost}, None for one that does not fit.
    """

    slice: str
    chips: int
    videos: int
    size: list[int]
    weights_bytes: int
    memory_bytes: float
    chip_flops: float
    flops: dict[str, float]
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

    @property
    def seconds(self) -> float:
        """Of a batch, at UTILISATION of the chips' peak."""
        rate = compile_only.UTILISATION * self.chip_flops * self.chips
        return sum(self.flops.values()) / rate

    def row(self) -> dict:
        """For JSON."""
        told = {'fits': self.fits, 'peak': self.peak, 'seconds': self.seconds}
        return dataclasses.asdict(self) | told

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
                told = f'{self.flops[name] / 1e12:.4g} TFLOP, work {gigabytes(cost.work)}, '
                told += f'compiled in {cost.seconds:.0f} s'
                moved = sum(x['bytes'] for x in cost.collectives.values())
                told += f', {gigabytes(moved)} between chips' if moved else ''
            rows.append((name, told))
        if self.peak is not None:
            rows.append(('peak', f'{gigabytes(self.peak)} of {gigabytes(self.memory_bytes)}'))
        share = f'at {compile_only.UTILISATION:.0%} of peak'
        rows.append((share, f'{self.seconds:.3g} s a batch'))
        rows.append(('fits', 'yes' if self.fits else 'no'))
        title = f'sampling on {self.slice} ({self.chips} chips)'
        return '\n'.join([title] + [f'  {name:20} {value}' for name, value in rows])


def run(
    config: configs.Config,
    names: list[str],
    videos: int,
    *,
    classes: int | None = None,
    options: dict | None = None,
    search: bool = False,
    out: str | Path | None = None,
) -> list[SamplerReport]:
    """Compiles sampling for slices, and prints what it costs there.

    Args:
      config: of a run.
      names: of slices, such as 'v5e:1x1'.
      videos: at a time, on all chips.
      classes: of the run's data; None: see `compile_for.known_classes`.
      options: of sampling, see `parts.sampling_options`; the config's where nothing is given.
      search, out: see `compile_for.run`.

    Raises:
      UserError: an unknown slice, no TPU compiler, or videos that do not split over the slice.
    """
    slices = compile_only.find_all(names)
    if out:
        writable('--compile_report', Path(out).parent)
    # Programs for other machines cannot be read back from it.
    jax.config.update('jax_enable_compilation_cache', False)
    reports = []
    for place in slices:
        reports.append(measure(config, place, videos, classes, options, search))
        print(reports[-1].lines(), flush=True)
        if out:
            atomic.write(out, json.dumps([report.row() for report in reports], indent=1) + '\n')
    return reports


def measure(
    config: configs.Config,
    place: compile_only.Slice,
    videos: int,
    classes: int | None = None,
    options: dict | None = None,
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
        networks, called = calls(config, classes, videos, mesh, options)
        flops = {name: call.flops() for name, call in called.items()}
        costs = {}
        for name, call in called.items():
            try:
                costs[name] = compile_only.compile_program(call.lower(), search)[1]
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
        chip_flops=place.chip.flops,
        flops=flops,
        programs=costs,
    )


@dataclasses.dataclass(frozen=True)
class Call:
    """A program with its arguments, shapes in the place of arrays.

    Attributes:
      program: jitted.
      arrays: {argument: tree of shapes}.
      static: the other arguments.
    """

    program: typing.Any
    arrays: dict
    static: dict

    def lower(self):
        """As `jax.jit(...).lower` gives it."""
        return self.program.lower(**self.arrays, **self.static)

    def flops(self) -> int:
        """Floating-point operations of products."""
        return count(functools.partial(self.program, **self.static), **self.arrays).flops


def calls(
    config: configs.Config, classes: int, videos: int, mesh, options: dict | None = None
) -> tuple[dict[str, nnx.Module], dict[str, Call]]:
    """Abstract networks, and the calls that sampling consists of: 'content frame', 'motion latent'
    and 'video', each with what it takes of the ones before.

    Args:
      classes: 0: none; captions count as none.
      videos: at a time, on all devices of the mesh.
      options: see `run`.
    """
    text, source = config.condition == 'text', config.stable_diffusion.source
    dtype, batch = compute_dtype('auto'), batch_sharding(mesh)

    def shaped(make):
        return in_compute_dtype(frozen.shaped(nnx.eval_shape(lambda: make(make_rngs(0))), mesh))

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

    chosen = dict.fromkeys(('content', 'motion'), config)
    chosen = parts.sampling_options(chosen, bool(text or classes), **(options or {}))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), videos))
    keys = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=batch)
    frame, autoencoder = parts.frame_shape(config), networks['autoencoder']
    motion = autoencoder.motion_channels
    statistics = jax.ShapeDtypeStruct((motion,), jnp.float32, sharding=replicated(mesh))
    latent = config.data.frames, autoencoder.motion_tokens, motion
    return networks, {
        'content frame': Call(
            sampling.content_program,
            dict(
                model=networks['content'],
                keys=keys,
                condition=given['content'],
                null=given['content'],
            ),
            dict(
                process=parts.make_process(config.content.process),
                shape=frame,
                **chosen['content'],
            ),
        ),
        'motion latent': Call(
            sampling.motion_program,
            dict(
                model=networks['motion'],
                keys=keys,
                content=array(*frame),
                condition=given['motion'],
                null=given['motion'],
                statistics=dict.fromkeys(('mean', 'std'), statistics),
            ),
            dict(
                process=parts.make_process(config.motion.process),
                **chosen['motion'],
            ),
        ),
        'video': Call(
            sampling.decode_program,
            dict(autoencoder=autoencoder, vae=vae, content=array(*frame), motion=array(*latent)),
            dict(at_once=config.stable_diffusion.frames_at_once),
        ),
    }
