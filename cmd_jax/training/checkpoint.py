"""Checkpoints of a stage: RUN/STAGE/checkpoints/STEP/{train, model, data}.

`train` is what training needs to go on (parameters, optimizer, counters), `model` what sampling
needs (the averaged parameters and, for the motion stage, the statistics of the motion latent),
`data` the position in the training data (an imported network has none).
"""

import dataclasses
from pathlib import Path

import grain
import jax
import orbax.checkpoint as ocp
from absl import logging

from cmd_jax.errors import UserError
from cmd_jax.parallel.mesh import path_name
from cmd_jax.training.state import TrainState


class Checkpoints:
    """The checkpoints of one stage; a context manager that waits for unfinished saves."""

    def __init__(self, folder: Path, keep: int = 1):
        self.folder = Path(folder).resolve()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        handlers = {
            'train': ocp.StandardCheckpointHandler(),
            'model': ocp.StandardCheckpointHandler(),
            'data': grain.checkpoint.CheckpointHandler(),
        }
        self.manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.manager.close()

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint, or None."""
        return self.manager.latest_step()

    def save(self, state: TrainState, statistics: dict | None, data):
        """Saves in the background; `data` is the Grain iterator of the training data, or None."""
        train = {k.name: getattr(state, k.name) for k in dataclasses.fields(state)}
        model = {'ema': train.pop('ema')} | ({'statistics': statistics} if statistics else {})
        items = {
            'train': ocp.args.StandardSave(train),
            'model': ocp.args.StandardSave(model),
        }
        if data is not None:
            items['data'] = grain.checkpoint.CheckpointSave(data)
        self.manager.save(int(state.step), args=ocp.args.Composite(**items), force=True)

    def restore(self, state: TrainState, statistics: dict | None, data):
        """The newest checkpoint as (state, statistics), given their ShapeDtypeStructs.

        Arrays land on the shardings asked for; the iterator `data` moves to its stored position, or
        stays at its beginning where none is stored.

        Raises:
          UserError: if the stored arrays have other names or shapes.
        """
        train = {k.name: getattr(state, k.name) for k in dataclasses.fields(state)}
        model = {'ema': train.pop('ema')} | ({'statistics': statistics} if statistics else {})
        self._check('train', train)
        items = {
            'train': ocp.args.StandardRestore(train),
            'model': ocp.args.StandardRestore(model),
        }
        if (self.folder / str(self.latest) / 'data').exists():
            items['data'] = grain.checkpoint.CheckpointRestore(data)
        else:
            logging.info('%s holds no position in the data: from its beginning', self.folder)
        out = self.manager.restore(self.latest, args=ocp.args.Composite(**items))
        return TrainState(**out['train'], ema=out['model']['ema']), out['model'].get('statistics')

    def restore_model(self, model: dict) -> dict:
        """The newest checkpoint's `model` item, like the given tree of ShapeDtypeStructs."""
        self._check('model', model)
        items = ocp.args.Composite(model=ocp.args.StandardRestore(model))
        return self.manager.restore(self.latest, args=items)['model']

    def _check(self, item: str, expected):
        stored = self.manager.item_metadata(self.latest)[item]
        stored = getattr(stored, 'tree', stored)
        old, new = shapes(stored), shapes(expected)
        names = [k for k in old | new if old.get(k) != new.get(k)]
        wrong = '; '.join(f'{k}: {old.get(k)} -> {new.get(k)}' for k in names[:3])
        if names:
            raise UserError(
                f'checkpoint {self.folder / str(self.latest)} does not fit this config '
                f'({len(names)} arrays of other shape, stored -> expected: {wrong}): '
                'use the config that it was trained with, or another workdir'
            )


def shapes(tree) -> dict[str, tuple[int, ...]]:
    """{path: shape}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path): tuple(x.shape) for path, x in leaves}
