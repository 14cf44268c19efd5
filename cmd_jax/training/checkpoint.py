"""Checkpoints of a stage: RUN/STAGE/checkpoints/STEP/{train, model, data, manifest.0-of-1.json}.

`train` is what training needs to go on (parameters, optimizer, counters), `model` what sampling
needs (the averaged parameters and, for the motion stage, the statistics of the motion latent),
`data` the position in the training data (an imported network has none). The manifest, written last,
has the sizes and hashes of all files: what does not agree with it is never restored. STEP.unsealed
is there until then: a save that was cut short is no damage, and is deleted by the next one.
"""

import contextlib
import dataclasses
import errno
import os
import re
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from cmd_jax.errors import UserError
from cmd_jax.parallel.distributed import any_process
from cmd_jax.parallel.mesh import path_name
from cmd_jax.training import disk_errors, integrity
from cmd_jax.training.state import TrainState

HANDLERS = {
    'train': ocp.StandardCheckpointHandler,
    'model': ocp.StandardCheckpointHandler,
    'data': ocp.JsonCheckpointHandler,
}
UNKNOWN = object()
OTHERS_SECONDS = 1200.0  # that process 0 waits for the others to hash their files


class Checkpoints:
    """The checkpoints of one stage; a context manager.

    Closing waits for the save under way, and raises what has kept it from being done. Nothing is
    written before the first save.
    """

    def __init__(
        self, folder: Path, keep: int = 1, keep_every: int = 0, *, model_only: bool = False
    ):
        """Nothing is read yet.

        Args:
          folder: of the checkpoints; it may be missing.
          keep: the newest ones that are kept, >= 1.
          keep_every: keep those whose step is a multiple of it besides; 0: none.
          model_only: for `restore_model` alone: no other item's content is read, not even to
            verify it.
        """
        if keep < 1:
            raise UserError(f'keep_checkpoints={keep}: keep 1 or more')
        self.folder = Path(folder).resolve()
        self._keep, self._keep_every, self._model_only = keep, keep_every, model_only
        self._latest = UNKNOWN
        self._manager = self._thread = self._failure = None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        try:
            self.close()
        except Exception as e:
            if error is None:
                raise
            # What ended the body is the news; a failed save may well be the same.
            if e is not error:
                logging.error('%s', e)

    def close(self):
        """Waits for the save under way.

        Raises:
          UserError: it has failed.
        """
        self._join()
        manager, self._manager = self._manager, None
        if manager is not None:
            try:
                manager.close()
            except Exception:  # of a save that failed before: `check` raises its reason
                if self._failure is None:
                    raise
        self.check()

    @property
    def latest(self) -> int | None:
        """The step of the newest whole checkpoint, or None where there never was one.

        Waits for the save under way. Those that are damaged, or whose saving was interrupted, are
        passed over with a warning. All processes find the same one; each reads a share of the
        files.

        Raises:
          UserError: there are damaged checkpoints, and none is whole; or a save has failed.
        """
        self.wait()
        if self._latest is UNKNOWN:
            self._latest = self._find()
        return self._latest

    def check(self):
        """Raises UserError if a save in the background has failed; costs nothing."""
        if self._failure is not None:
            raise self._failure

    def wait(self):
        """Waits for the save under way; raises what `check` raises."""
        self._join()
        self.check()

    def tidy(self):
        """Leaves in the folder what the last save would have left, had it not been killed behind
        its last file; where there is nothing more to be saved."""
        latest = self.latest
        if latest is not None and jax.process_index() == 0:
            self._clear(latest)
            self._delete_old()

    def save(self, state: TrainState, statistics: dict | None, position: int | None):
        """Saves in the background; what it replaces is deleted when it is whole.

        Args:
          state: to save.
          statistics: of the motion latent, or None.
          position: samples of the training sequence that were read; None: nothing is stored.

        Raises:
          UserError: this save or the one before cannot be done.
        """
        if self._model_only:
            raise ValueError('opened for restore_model alone')
        step = int(state.step)
        train, model = _items(state, statistics)
        items = {'train': ocp.args.StandardSave(train), 'model': ocp.args.StandardSave(model)}
        if position is not None:
            items['data'] = ocp.args.JsonSave({'position': position})
        latest = self.latest  # waits
        try:
            if self._manager is None:
                self._prepare(latest)
            elif not os.path.isdir(self.folder):
                raise FileNotFoundError(errno.ENOENT, 'the folder is gone')
            if jax.process_index() == 0:
                # Before Orbax's barriers, behind which it gives the folder its name.
                integrity.begin(self.folder / str(step))
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        except Exception as e:
            self._fail(step, e)
            self.check()
        self._thread = threading.Thread(target=self._finish, args=(step,), name='checkpoint')
        self._thread.start()

    def restore(
        self, state: TrainState, statistics: dict | None
    ) -> tuple[TrainState, dict | None, int | None]:
        """The newest whole checkpoint as (state, statistics, position in the data).

        `state` and `statistics` are given as ShapeDtypeStructs; arrays land on the shardings asked
        for. The position is None where none is stored.

        Raises:
          UserError: if the stored arrays have other names or shapes, or as `latest` does.
        """
        if self._model_only:
            raise ValueError('opened for restore_model alone')
        train, model = _items(state, statistics)
        items = {'train': ocp.args.StandardRestore(train), 'model': ocp.args.StandardRestore(model)}
        if (self.folder / str(self.latest) / 'data').exists():
            items['data'] = ocp.args.JsonRestore()
        out = self._restore('train', train, items)
        position = out['data']['position'] if 'data' in items else None
        state = TrainState(**out['train'], ema=out['model']['ema'])
        return state, out['model'].get('statistics'), position

    def restore_model(self, model: dict) -> dict:
        """The newest checkpoint's `model` item, like the given tree of ShapeDtypeStructs.

        Raises:
          UserError: as `restore` does.
        """
        items = {'model': ocp.args.StandardRestore(model)}
        return self._restore('model', model, items)['model']

    def _restore(self, item: str, expected, items: dict):
        if self.latest is None:
            raise UserError(f'{self.folder} holds no checkpoint: train first')
        # Orbax looks into all items that it has a handler for, and not all may be verified.
        with contextlib.closing(self._open(items)) as manager:
            try:
                self._check(manager, item, expected)
                return manager.restore(self.latest, args=ocp.args.Composite(**items))
            except UserError:
                raise
            except Exception as e:
                path = self.folder / str(self.latest)
                fault = integrity.fault(path, self.latest)
                if fault is None:
                    raise
                raise UserError(
                    f'checkpoint {path} has changed while it was read ({fault}): is the run being '
                    'trained? Run this again'
                ) from e

    def _check(self, manager: ocp.CheckpointManager, item: str, expected):
        stored = manager.item_metadata(self.latest)[item]
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

    # --- Finding ------------------------------------------------------------------------------

    def _steps(self) -> list[int]:
        """All steps that Orbax has finalised, whole or not, newest first."""
        try:
            found = [p for p in self.folder.iterdir() if re.fullmatch('0|[1-9][0-9]*', p.name)]
        except FileNotFoundError:
            found = []
        except OSError as e:
            raise UserError(
                f'{self.folder} cannot be read ({e.strerror}): mend it, or use another workdir'
            ) from e
        return sorted((int(p.name) for p in found if os.path.isdir(p)), reverse=True)

    def _find(self) -> int | None:
        faults, damaged = {}, []
        while True:
            steps = _of_process_0(self._steps())
            new = [step for step in steps if step not in faults]
            if not new:
                break
            for step in new:
                path = self.folder / str(step)
                if any_process(integrity.interrupted(path)):
                    faults[step] = 'its saving was interrupted, or is still under way'
                else:
                    fault = integrity.fault(
                        path,
                        step,
                        'model' if self._model_only else None,
                        jax.process_index(),
                        jax.process_count(),
                    )
                    if not any_process(fault is not None):
                        return step
                    faults[step] = fault or 'another process found a fault'
                    damaged.append(step)
                logging.warning('checkpoint %s is passed over: %s', path, faults[step])
            # A training that saves at the same time may have put a newer one in their place.
        damaged = [step for step in damaged if step in steps]
        if not damaged:
            return None
        listed = '; '.join(f'{step}/{faults[step]}' for step in damaged[:3])
        raise UserError(
            f'{self.folder}: none of {len(steps)} checkpoints is whole ({listed}): put back a copy '
            'of the files, or delete the folder to begin anew'
        )

    # --- Saving -------------------------------------------------------------------------------

    def _open(self, items: Iterable[str] = HANDLERS, saving: bool = False) -> ocp.CheckpointManager:
        # Orbax deletes nothing: it would count those that are not whole, and does not know of
        # manifests. Steps' metadata may be damaged, and is not read.
        options = ocp.CheckpointManagerOptions(
            create=False,
            save_root_metadata=False,
            lightweight_initialize=True,
            cleanup_tmp_directories=saving,
        )
        handlers = {item: HANDLERS[item]() for item in items}
        return ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def _prepare(self, latest: int | None):
        """Makes the folder; what was damaged is moved aside, what was interrupted deleted.

        Only now: a reader opens the folder, too, while training writes to it.
        """
        disk_errors.hush()
        self.folder.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            self._clear(latest)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices('checkpoints moved aside')
        self._manager = self._open(saving=True)

    def _clear(self, latest: int | None):
        """Deletes what was interrupted, and moves aside what is damaged."""
        for step in self._steps():
            path = self.folder / str(step)
            if integrity.interrupted(path):
                logging.info('%s, whose saving was interrupted, is deleted', path)
                shutil.rmtree(path)
            elif latest is None or step > latest:
                _move_aside(path)
        # Of what was killed before the folder had its name, or after its last manifest.
        for path in self.folder.glob(f'*{integrity.UNSEALED}'):
            path.unlink()

    def _finish(self, step: int):
        """In the background: from Orbax's last word to the deletion of what is replaced."""
        process, processes = jax.process_index(), jax.process_count()
        folder = self.folder / str(step)
        try:
            # Until the folder has its name, in all processes.
            self._manager.wait_until_finished()
            integrity.seal(folder, step, process, processes)
            if process == 0:
                integrity.await_seals(folder, processes, OTHERS_SECONDS)
                integrity.end(folder)
            self._latest = step
            if process == 0:
                self._delete_old()
        except BaseException as e:
            self._fail(step, e)

    def _delete_old(self):
        for step in self._steps()[self._keep :]:
            if not (self._keep_every and step % self._keep_every == 0):
                path = self.folder / str(step)
                try:
                    shutil.rmtree(path)
                except OSError as e:
                    logging.warning('checkpoint %s cannot be deleted (%s)', path, e.strerror)

    def _fail(self, step: int, error: BaseException):
        failure = error
        try:
            failure = self._told(step, error)
        finally:  # whatever happens; and once, as another thread looks at it
            self._failure = failure

    def _told(self, step: int, error: BaseException) -> BaseException:
        reason = disk_errors.reason(error)
        if reason is None:  # a defect, or told already
            return error
        whole = self._latest
        # pathlib's is_dir raises where the folder cannot be looked into.
        if whole in (None, UNKNOWN) or not os.path.isdir(self.folder / str(whole)):
            whole = 'no checkpoint is whole'
        else:
            whole = f'the newest whole checkpoint is of step {whole}'
        failure = UserError(
            f'checkpoint {self.folder / str(step)} cannot be saved ({reason}); {whole}: make room '
            'or mend the folder, and start again'
        )
        failure.__cause__ = error
        return failure

    def _join(self):
        if self._thread is not None:
            self._thread.join()
            self._thread = None


def shapes(tree) -> dict[str, tuple[int, ...]]:
    """{path: shape}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path): tuple(x.shape) for path, x in leaves}


def _items(state: TrainState, statistics: dict | None) -> tuple[dict, dict]:
    """The items `train` and `model`."""
    train = {k.name: getattr(state, k.name) for k in dataclasses.fields(state)}
    return train, {'ema': train.pop('ema')} | ({'statistics': statistics} if statistics else {})


def _move_aside(path: Path):
    number, target = 0, path.with_name(f'{path.name}.broken')
    while target.exists():
        number += 1
        target = path.with_name(f'{path.name}.broken-{number}')
    path.rename(target)
    logging.warning('checkpoint %s, which was passed over, is now %s', path, target.name)


def _of_process_0(steps: list[int]) -> list[int]:
    if jax.process_count() == 1:
        return steps
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
    padded = np.resize(np.array(steps or [0], np.int32), count)
    return [int(step) for step in multihost_utils.broadcast_one_to_all(padded)]
