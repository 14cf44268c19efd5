"""What every protocol says of the run that it measures: its clips, its cost, how it was sampled."""

import dataclasses
import time

from cmd_jax.errors import UserError
from cmd_jax.memory import peak_memory_gb


def clip_sizes(generator, source: str, protocol: str) -> dict[str, int]:
    """frames, height and width of the clips that the generator's run was trained on.

    Raises:
      UserError: they are of another source than the protocol can judge.
    """
    data = generator.config['autoencoder'].data
    if data.source.partition(':')[0] != source:
        raise UserError(
            f'data.source={data.source!r} of this run: protocol={protocol} judges {source} only, '
            'give the workdir of a run trained on them'
        )
    return {name: getattr(data, name) for name in ('frames', 'height', 'width')}


def cost(generator, started: float) -> dict[str, float | None]:
    """What training took, and the evaluation that started at time.perf_counter() == `started`.

    Returns:
      seconds_training (all stages), seconds_STAGE, seconds_evaluation, and memory_gb: the most that
      a stage or this process held. A run without the cost of every stage has no total (None): a
      partial sum would flatter it.
    """
    stages = generator.cost
    complete = all(stages.values()) and set(generator.steps) <= set(stages)
    held = [peak_memory_gb(), *(stage['memory_gb'] for stage in stages.values() if stage)]
    return {
        'seconds_training': sum(s['seconds'] for s in stages.values()) if complete else None,
        'memory_gb': max(held) if complete else None,
        **{f'seconds_{name}': stage['seconds'] for name, stage in stages.items() if stage},
        'seconds_evaluation': time.perf_counter() - started,
    }


def settings(generator, **options) -> dict[str, str | int | float]:
    """How the stages that were loaded were sampled, OPTION_STAGE, and their checkpoints.

    `options`: see `Generator.__call__`; None is what the run's config says.
    """
    return {
        f'{option}_{stage}': value
        for stage, used in sorted(generator.options(**options).items())
        for option, value in dataclasses.asdict(used['sampling']).items()
    } | {f'checkpoint_{stage}': step for stage, step in generator.steps.items()}
