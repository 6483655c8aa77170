"""A folder of checkpoints: saving train states, which of them stay, and the newest intact one."""

import contextlib
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from sparse_experts import storage
from sparse_experts.errors import UserError
from sparse_experts.small_files import ASIDE, Damaged, read_json, reason, set_aside
from sparse_experts.training.checkpoints.checksums import checksums
from sparse_experts.training.checkpoints.meta import seal
from sparse_experts.training.checkpoints.on_disk import committing, is_complete
from sparse_experts.training.checkpoints.steps import STEP, Steps
from sparse_experts.training.state import TrainState

_JOIN = 30  # seconds for a thread of a failed save to end
_METRIC = "eval_loss"  # in meta; before, the one key of a file of its own


class Checkpoints(Steps, contextlib.AbstractContextManager):
  """Saves steps in a folder; restores the newest.

  Saving continues in the background; an interrupted save leaves a folder that is ignored and later removed. A
  step is on the disk, or in the store, before it counts, and before an older one is removed.
  Keeps the last `max_to_keep` and the one with the lowest evaluation loss.
  `lost`: why the newest save failed, until one succeeds.
  """

  def __init__(self, folder: str, max_to_keep: int | None = None):
    """Without `max_to_keep` nothing in the folder is touched: for reading."""
    super().__init__(folder)
    self._max_to_keep = max_to_keep
    self._saving: int | None = None  # the step whose save may still be running
    self._losses: dict[int, float] = {}  # of the evaluations at the steps that had one
    self._unread: dict[int, str] = {}  # why the loss of a step is not known
    self.lost: str | None = None
    self._manager: Any = None if max_to_keep is None else self._open()

  def _open(self) -> ocp.CheckpointManager:
    # The same dictionary: a save may have failed in between, whose step counts nevertheless.
    self._losses |= {step: loss for step in self.steps() if (loss := self._loss(step)) is not None}
    self._make_room()
    # In a store orbax needs rights of the bucket's to remove, and does it in any order: see `_thin`.
    here = not storage.is_address(self._folder)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=_Kept(self._max_to_keep if here else None, self._losses),
        lightweight_initialize=True,  # it reads nothing of the steps that are there
        enable_async_checkpointing=True, cleanup_tmp_directories=here, create=True,
        temporary_path_class=committing(self._folder),
        # Otherwise threads wait minutes for a folder that a failed save did not make.
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False))
    handlers = {"state": ocp.PyTreeCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
    try:
      storage.make_folders(self._folder)
      return ocp.CheckpointManager(self._plain.path, options=options, item_handlers=handlers)
    except OSError as e:
      raise UserError(f"{self._folder} cannot be written ({e.strerror}); mend that and run the same command "
                      "again") from None

  def _loss(self, step: int) -> float | None:
    """The evaluation loss of a step; None where it had none or cannot be read."""
    try:
      meta = self.meta(step)
      with contextlib.suppress(FileNotFoundError):  # as it was saved before it was in meta
        meta = read_json(os.path.join(self.path(step), "metrics", "metrics"), "remove it") | meta
    except UserError as e:
      self._unread[step] = str(e)
      return None
    loss = meta.get(_METRIC)
    return loss if isinstance(loss, float) and math.isfinite(loss) else None

  def __exit__(self, *_):
    """Waits for the running save."""
    if self._manager is not None:
      self.wait()
    if self._manager is not None:
      self._manager.close()
      with contextlib.suppress(OSError):
        self._make_room()

  def save(self, state: TrainState, meta: dict[str, Any], eval_loss: float | None = None) -> str | None:
    """Returns once the state is copied from the devices, before it is on disk.

    Returns why this save or the one before it failed, or None. A failed save (a full disk) leaves older
    checkpoints as they are, and the next save tries again.
    """
    failed = self.wait()
    self._saving = int(state.step)
    if eval_loss is not None:
      meta, self._losses[self._saving] = meta | {_METRIC: eval_loss}, eval_loss
    items = ocp.args.Composite(
        state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(seal(meta, checksums(state))))
    try:
      if self._manager is None:
        self._manager = self._open()
      self._manager.save(self._saving, args=items, force=True)  # whatever other folders there are
    except Exception as e:
      failed = self._failed(e)
    return failed

  def wait(self) -> str | None:
    """Waits until the last save is on disk; returns why it failed, or None."""
    if self._saving is None:
      return None
    try:
      self._manager.wait_until_finished()
      self._thin()
    except Exception as e:  # orbax and tensorstore raise many types
      return self._failed(e)
    self._saving = self.lost = None
    return None

  def trouble(self) -> str | None:
    """Why the running save has failed, if it has; does not wait."""
    return None if self._saving is None or self._manager.is_saving_in_progress() else self.wait()

  def _failed(self, error: Exception) -> str:
    """Removes what the failed save has written; returns what happened, in one line."""
    step, self._saving = self._saving, None
    for _ in range(2):  # the first may raise the same error again and close nothing
      with contextlib.suppress(Exception):
        self._manager.close()  # or there is none
    for thread in threading.enumerate():  # where one part fails, orbax leaves the others' threads behind
      if type(thread).__module__.startswith("orbax."):
        threading.Thread.join(thread, _JOIN)  # its own `join` raises what it has raised
    self._manager = None
    with contextlib.suppress(OSError, UserError):  # the next save tries it again
      self._manager = self._open()
    why = str(error).partition(";")[0] if isinstance(error, UserError) else reason(error)
    self.lost = f"step {step} could not be saved in {self._folder} ({self._plain.shown(why)})"
    return self.lost

  def _make_room(self) -> None:
    """Removes what failed saves have left, while none is running."""
    if jax.process_index() == 0 and storage.is_folder(self._folder):
      for name in storage.names(self._folder):
        path = os.path.join(self._folder, name)
        if name.endswith(".orbax-checkpoint-tmp") or (STEP.fullmatch(name) and not is_complete(path)):
          storage.remove_folder(path)

  def _thin(self) -> None:
    """Removes the steps of a store that do not stay; on a disk orbax has done so."""
    steps = self.steps() if jax.process_index() == 0 and storage.is_address(self._folder) else []
    for step in set(steps) - stay(steps, self._max_to_keep, self._losses):
      storage.remove_folder(self.path(step))

  def restore_newest(self, abstract: TrainState, refuse: Callable[[int], Any],
                     say: Callable[[str], None]) -> TrainState | None:
    """The newest intact state, or None without a checkpoint; damaged ones are reported and renamed.

    refuse: is given its step first, and may raise.
    """
    while (step := self.latest()) is not None:
      state, error = None, None
      try:
        refuse(step)
        state = self.restore(abstract, step)
      except UserError as e:
        error = e
      damaged = isinstance(error, Damaged)
      if _anywhere(error is not None and not damaged):
        raise error or UserError(f"another process cannot read checkpoint {self.path(step)}; see its message")
      if not _anywhere(damaged):
        for other, why in self._unread.items():
          if other < step:
            say(f"{why}; it does not count as the step with the lowest loss")
        return state
      aside = self._set_aside(step)
      say(f"{error or self.damaged(step, 'another process cannot read it')}; kept aside as {aside}")
    if storage.is_folder(self._folder) and any(n.startswith(ASIDE) for n in storage.names(self._folder)):
      raise UserError(f"{self._folder} holds damaged checkpoints only; bring back a whole one, or remove "
                      f"{ASIDE}* to begin at step 0")
    return None

  def _set_aside(self, step: int) -> str:
    aside = set_aside(self.path(step)) if jax.process_index() == 0 else f"{ASIDE}{step}"
    _anywhere(True)  # no process reads the folder before it is renamed
    self._manager.reload()
    return aside


class _Kept:
  """An orbax policy: the newest `number` stay, and the one with the lowest loss."""

  def __init__(self, number: int | None, losses: dict[int, float]):
    self._number, self._losses = number, losses

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    steps = [checkpoint.step for checkpoint in checkpoints]
    kept = stay(steps, self._number, self._losses)
    return [step in kept for step in steps]


def stay(steps: Sequence[int], number: int | None, losses: Mapping[int, float]) -> set[int]:
  """The newest `number` of the steps, all if it is None, and the one with the lowest loss."""
  known = [step for step in steps if math.isfinite(losses.get(step, math.inf))]
  return {*steps[-(number or len(steps)):], *sorted(known, key=losses.__getitem__)[:1]}


def _anywhere(flag: bool) -> bool:
  """Whether the flag is set in any process; all wait for each other."""
  if jax.process_count() == 1:
    return flag
  return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))
