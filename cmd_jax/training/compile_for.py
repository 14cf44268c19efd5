"""What training would cost on a TPU slice that is not here: `train.py --compile_for`.

Builds the very step that training runs, compiles it with the TPU compiler for the devices of that
slice, and reads its cost off the compiled program.
"""

import dataclasses
import json
import math
from pathlib import Path

import jax
from absl import logging

from cmd_jax import atomic
from cmd_jax.errors import writable
from cmd_jax.parallel import compile_only
from cmd_jax.parallel.mesh import make_mesh
from cmd_jax.training import config as configs
from cmd_jax.training import frozen, program, stages

# Classes of the sources whose number is known without reading them.
CLASSES = {'ucf101': 101, 'moving_digits': 10}
REPLICATED = 1e6  # bytes of an array that should not lie on all chips


@dataclasses.dataclass(frozen=True)
class Report:
    """The cost of a stage's step on a slice.

    Attributes:
      stage, slice, chips: what was compiled, and for what.
      mesh: {axis: size}.
      batch_size: of the config.
      accumulation: parts of it.
      parameters: of the trained network.
      state_bytes: of parameters, their average, gradients' moments and counters, on a chip.
      frozen_bytes: of the networks that are not trained, on a chip.
      replicated: {path: bytes} of the state's and frozen arrays above 1 MB on all chips.
      memory_bytes: that a chip has.
      model_flops: of a step, on all chips.
      cost: of the program on a chip; None: it does not fit.
      needed: bytes, of a program that does not fit, where the compiler tells.
      largest_batch: that fits in one part; None: not looked for.
    """

    stage: str
    slice: str
    chips: int
    mesh: dict
    batch_size: int
    accumulation: int
    parameters: int
    state_bytes: int
    frozen_bytes: int
    replicated: dict
    memory_bytes: float
    chip_flops: float
    model_flops: float
    cost: compile_only.Cost | None
    needed: float | None = None
    largest_batch: int | None = None

    @property
    def fits(self) -> bool:
        return self.cost is not None and self.cost.peak <= self.memory_bytes

    @property
    def at_a_time(self) -> int:
        """Examples on a chip."""
        return self.batch_size // (self.mesh['data'] * self.mesh['fsdp'] * self.accumulation)

    @property
    def step_seconds(self) -> float:
        """Of a step at UTILISATION of the chips' peak."""
        return self.model_flops / self.chips / (compile_only.UTILISATION * self.chip_flops)

    @property
    def intensity(self) -> float:
        """Model FLOPs for each byte to or from a chip's memory, about."""
        return self.model_flops / self.chips / self.cost.traffic

    def row(self) -> dict:
        """For JSON."""
        return dataclasses.asdict(self) | {
            'fits': self.fits,
            'step_seconds': self.step_seconds,
            'intensity': self.intensity if self.cost else None,
        }

    def lines(self) -> str:
        """For people."""
        rows = [
            ('mesh', ', '.join(f'{k} {v}' for k, v in self.mesh.items())),
            ('batch', f'{self.batch_size}, {self.at_a_time} at a time on a chip'),
            ('parameters', f'{self.parameters / 1e6:.1f} M'),
            ('state on a chip', gigabytes(self.state_bytes)),
            ('frozen networks', gigabytes(self.frozen_bytes)),
        ]
        if self.cost is None:
            needed = f': it needs {gigabytes(self.needed)}' if self.needed else ''
            rows.append(('fits', f'no{needed} of {gigabytes(self.memory_bytes)}'))
        else:
            moved = [
                f'{x["count"]} {kind} ({gigabytes(x["bytes"])})'
                for kind, x in sorted(self.cost.collectives.items())
            ]
            rows += [
                ('activations', gigabytes(self.cost.work)),
                ('peak', f'{gigabytes(self.cost.peak)} of {gigabytes(self.memory_bytes)}'),
                ('fits', 'yes' if self.fits else 'no'),
                ('collectives', ', '.join(moved) or 'none'),
                ('intensity', f'{self.intensity:.0f} FLOPs a byte of memory traffic'),
                ('compiled in', f'{self.cost.seconds:.0f} s'),
            ]
        rows += [
            ('model FLOPs', f'{self.model_flops / 1e12:.4g} T a step'),
            ('on a chip', f'{self.model_flops / self.chips / 1e12:.4g} T a step'),
            (f'at {compile_only.UTILISATION:.0%} of peak', f'{self.step_seconds:.3g} s a step'),
        ]
        if self.largest_batch is not None:
            rows.append(('largest batch', str(self.largest_batch or 'none')))
        for path, x in self.replicated.items():
            rows.append(('on all chips', f'{path}: {x / 1e6:.1f} MB'))
        title = f'{self.stage} on {self.slice} ({self.chips} chips)'
        return '\n'.join([title] + [f'  {name:16} {value}' for name, value in rows])


def gigabytes(x: float) -> str:
    return f'{x / 2**30:.2f} GiB'


def run(
    config: configs.Config,
    names: list[str],
    *,
    largest: bool = False,
    search: bool = False,
    out: str | Path | None = None,
) -> list[Report]:
    """Compiles the stages of `config.stage` for slices, and prints what they cost there.

    Args:
      config: of a run.
      names: of slices, such as 'v5e:8x8'.
      largest: look for the largest batch that fits, too; compiles a few times more.
      search: see `compile_only.compile_program`.
      out: a file for the reports as JSON.

    Raises:
      UserError: an unknown slice, no TPU compiler, or a config that does not suit the slice.
    """
    slices = compile_only.find_all(names)
    if out:
        writable('--compile_report', Path(out).parent)
    # Programs for other machines cannot be read back from it.
    jax.config.update('jax_enable_compilation_cache', False)
    reports = []
    for stage in configs.STAGES if config.stage == 'all' else (config.stage,):
        for place in slices:
            report = measure(stage, config, place, search)
            if largest:
                found = largest_batch(stage, config, place, report, search)
                report = dataclasses.replace(report, largest_batch=found)
            print(report.lines(), flush=True)
            reports.append(report)
            if out:  # each, as the next one may take minutes and fail
                rows = [report.row() for report in reports]
                atomic.write(out, json.dumps(rows, indent=1) + '\n')
    return reports


def measure(
    name: str, config: configs.Config, place: compile_only.Slice, search: bool = False
) -> Report:
    """The cost of one stage on one slice."""
    section = getattr(config, name)
    train = section.train
    mesh = make_mesh(**vars(config.mesh), devices=place.devices, batch=train.batch_size)
    classes = known_classes(config)
    stages.check(name, config, classes, mesh)
    with jax.set_mesh(mesh):
        made = program.make(stages.make(name, config, classes, mesh))
        given, shapes = frozen.abstract(name, config, mesh)
        batch = program.abstract_batch(shapes, mesh)
        common = dict(
            stage=name,
            slice=place.name,
            chips=len(place.devices),
            mesh=dict(mesh.shape),
            batch_size=train.batch_size,
            accumulation=made.stage.accumulation,
            parameters=sum(math.prod(x.shape) for x in jax.tree.leaves(made.stacks.params)),
            state_bytes=bytes_on_chip(made.abstract),
            frozen_bytes=bytes_on_chip(given.networks),
            replicated=replicated({'state': made.abstract, 'frozen': given.networks}),
            memory_bytes=place.chip.memory,
            chip_flops=place.chip.flops,
            model_flops=made.flops(given.networks, batch),
        )
        logging.info('%s: compiling for %s', name, place.name)
        key = program.abstract_key(mesh)
        lowered = made.step.lower(made.abstract, given.networks, batch, key)
        try:
            cost = compile_only.compile_program(lowered, search)[1]
        except compile_only.DoesNotFit as e:
            return Report(**common, cost=None, needed=e.needed)
    return Report(**common, cost=cost)


def known_classes(config: configs.Config) -> int:
    """The number of classes of a config's data, which is not there; 0 where text is the condition,
    or where it is not known."""
    kind = config.data.source.partition(':')[0]
    if config.condition == 'text':
        return 0
    if kind not in CLASSES:
        logging.warning('classes of data.source=%r: not known, taken as none', config.data.source)
    return CLASSES.get(kind, 0)


def bytes_on_chip(tree) -> int:
    """Of the parts of arrays that lie on one chip."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def replicated(tree) -> dict[str, int]:
    """{path: bytes} of large arrays that lie on every chip, whole."""
    found = {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        size = math.prod(x.shape) * x.dtype.itemsize
        if size > REPLICATED and x.sharding.is_fully_replicated and x.sharding.num_devices > 1:
            found[jax.tree_util.keystr(path, simple=True, separator='/')] = size
    return found


def largest_batch(
    name: str, config: configs.Config, place: compile_only.Slice, report: Report, search: bool
) -> int:
    """The largest batch that fits in one part, a multiple of the chips that the config's is split
    over; 0 where not even the smallest one does.

    Memory grows about linearly with the batch: what two sizes need tells which one to try next.
    """
    unit = report.mesh['data'] * report.mesh['fsdp']
    mesh, room = configs.Mesh(**report.mesh), place.chip.memory

    def needed(found: Report) -> float:
        return found.cost.peak if found.cost else max(found.needed or math.inf, room + 1)

    known = {report.at_a_time: needed(report)} if report.accumulation == 1 else {}
    while True:
        low = max((n for n, x in known.items() if x <= room), default=0)
        high = min((n for n, x in known.items() if x > room), default=None)
        if high is not None and high - low <= 1:
            return low * unit
        guess = (2 * low or report.at_a_time) if high is None else (low + high) // 2
        finite = sorted((abs(x - room), n, x) for n, x in known.items() if x < math.inf)[:2]
        # Where it is not linear, halving comes to an end sooner.
        if len(finite) == 2 and finite[0][2] != finite[1][2] and (high is None or len(known) < 5):
            (_, a, x), (_, b, y) = finite
            guess = a + math.floor((room - x) * (b - a) / (y - x))
        guess = max(guess, low + 1)
        guess = guess if high is None else min(guess, high - 1)
        section = getattr(config, name)
        train = dataclasses.replace(section.train, batch_size=guess * unit, device_batch=0)
        section = dataclasses.replace(section, train=train)
        changed = dataclasses.replace(config, **{name: section, 'mesh': mesh})
        known[guess] = needed(measure(name, changed, place, search))
