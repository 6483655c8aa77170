"""A folder of checkpoints: saving train states, restoring them, choosing among them."""

import contextlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from sparse_experts import storage
from sparse_experts.errors import UserError
from sparse_experts.models import names
from sparse_experts.training.checkpoints.checksums import checksums
from sparse_experts.training.checkpoints.meta import FORMAT, abstract_arrays, first_line, meta_checksum, seal
from sparse_experts.training.checkpoints.plain import PlainPath
from sparse_experts.training.state import TrainState

_METRIC = "eval_loss"
_ASIDE = "damaged-"  # in front of the step, where orbax does not look


class Damaged(UserError):
  """A checkpoint that is not what was saved."""


class Checkpoints(contextlib.AbstractContextManager):
  """Folder of checkpoints, one per step: the state, and `meta` (config, data fingerprint, ...) as JSON.

  Saving continues in the background; an interrupted save leaves a folder that is ignored and later removed.
  Keeps the last `max_to_keep` and the one with the lowest evaluation loss. Arrays that are read are compared
  with checksums taken before they were written.
  """

  def __init__(self, folder: str, max_to_keep: int | None = None):
    """Without `max_to_keep` nothing in the folder is touched: for reading."""
    self._folder, self._max_to_keep = os.path.abspath(folder), max_to_keep
    self._plain = PlainPath(folder)
    self._saving: int | None = None  # the step whose save may still be running
    self._manager = self._open()

  def _open(self) -> ocp.CheckpointManager:
    writes = self._max_to_keep is not None
    loss = lambda metrics: metrics[_METRIC]
    lowest = keep.BestN(  # ascending, reversed: the lowest comes last, which is where it looks for the best
        get_metric_fn=loss, reverse=True, n=1, keep_checkpoints_without_metrics=False)
    options = ocp.CheckpointManagerOptions(
        best_fn=loss, best_mode="min",  # without it orbax writes no metrics
        preservation_policy=keep.AnyPreservationPolicy([keep.LatestN(n=self._max_to_keep), lowest]),
        enable_async_checkpointing=True, cleanup_tmp_directories=writes, create=writes,
        # Otherwise threads wait minutes for a folder that a failed save did not make.
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False))
    handlers = {"state": ocp.PyTreeCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
    try:
      if writes:
        os.makedirs(self._folder, exist_ok=True)
      return ocp.CheckpointManager(self._plain.path, options=options, item_handlers=handlers)
    except PermissionError as e:
      raise UserError(f"{self._folder} cannot be read ({e.strerror}); mend its permissions") from None

  def __exit__(self, *_):
    """Waits for the running save."""
    self.wait()
    self._manager.close()
    self._make_room()

  def steps(self) -> list[int]:
    return sorted(self._manager.all_steps())

  def latest(self) -> int | None:
    return self._manager.latest_step()

  def save(self, state: TrainState, meta: dict[str, Any], eval_loss: float | None = None) -> str | None:
    """Returns once the state is copied from the devices, before it is on disk.

    Returns why this save or the one before it failed, or None. A failed save (a full disk) leaves older
    checkpoints as they are, and the next save tries again.
    """
    failed = self.wait()
    self._saving = int(state.step)
    items = ocp.args.Composite(
        state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(seal(meta, checksums(state))))
    metrics = None if eval_loss is None else {_METRIC: eval_loss}
    try:
      self._manager.save(self._saving, args=items, metrics=metrics)
    except Exception as e:
      failed = self._failed(e)
    return failed

  def wait(self) -> str | None:
    """Waits until the last save is on disk; returns why it failed, or None."""
    try:
      self._manager.wait_until_finished()
    except Exception as e:  # orbax and tensorstore raise many types
      return self._failed(e)
    self._saving = None
    return None

  def trouble(self) -> str | None:
    """Why the running save has failed, if it has; does not wait."""
    return None if self._saving is None or self._manager.is_saving_in_progress() else self.wait()

  def _failed(self, error: Exception) -> str:
    """Removes what the failed save has written; returns what happened, in one line."""
    step, self._saving = self._saving, None
    for _ in range(2):  # the first may raise the same error again and close nothing
      with contextlib.suppress(Exception):
        self._manager.close()
    for thread in threading.enumerate():  # where one part fails, orbax leaves the others' threads behind
      if type(thread).__module__.startswith("orbax."):
        threading.Thread.join(thread)  # its own `join` raises what it has raised
    self._make_room()
    self._manager = self._open()
    return f"step {step} could not be saved in {self._folder} ({self._plain.shown(first_line(error))})"

  def _make_room(self) -> None:
    """Removes what failed saves have left, while none is running."""
    if self._max_to_keep is not None and jax.process_index() == 0 and os.path.isdir(self._folder):
      for name in os.listdir(self._folder):
        if name.endswith(".orbax-checkpoint-tmp"):
          shutil.rmtree(os.path.join(self._folder, name), ignore_errors=True)

  def restore(self, abstract: TrainState, step: int) -> TrainState:
    """The state with the shardings of `abstract`, whatever mesh wrote it.

    Raises UserError for another architecture and for files that cannot be read, Damaged for arrays that
    differ from what was saved.
    """
    self.refuse_others(vars(abstract), step)
    return TrainState(**self.restore_part(vars(abstract), step))

  def refuse_others(self, here: dict[str, Any], step: int) -> None:
    """Refuses a step whose {"params": ..., ...} are not those of `here`, naming the first differences."""
    tree = self.tree(step)
    there = {field: tree.get(field, {}) for field in here}
    flat = lambda tree: {"/".join(path): tuple(x.shape) for path, x in names.by_path(tree).items()}
    if differ := (names.difference(names.shapes(there["params"]), names.shapes(here["params"]))
                  or names.difference(flat(there), flat(here))):
      raise UserError(f"checkpoint {self.path(step)} is of another architecture: {differ}; use the config "
                      "it was trained with, or another workdir")

  def restore_part(self, abstract: dict[str, Any], step: int) -> dict[str, Any]:
    """The arrays of the state that `abstract` names, {"params": ..., ...}, with its shardings.

    Nothing else is read, and nothing where `abstract` has `...`. All named arrays must exist: see `tree`.
    """
    arrays = self.meta(step)["arrays"]
    placed = ocp.checkpoint_utils.construct_restore_args(abstract)
    item = ocp.args.PyTreeRestore(item=abstract, partial_restore=True, restore_args=placed)
    with self.reading(step):
      part = self._restore(step, state=item)["state"]
    for name, found in checksums(jax.tree.map(lambda x: None if x is ... else x, part)).items():
      if found != arrays[name]:
        raise self.damaged(step, f"{name} is not what was saved")
    return part

  def restore_arrays(self, wanted: dict[tuple[str, ...], jax.ShapeDtypeStruct],
                     step: int) -> dict[tuple[str, ...], jax.Array]:
    """Arrays of the state by path ("params", ...), with the shardings of `wanted`; as `restore_part`."""
    with self.reading(step):
      # The whole tree: orbax restores no part of a list, and the optimizer's state has lists.
      there = dict(self._manager.item_metadata(step)["state"].tree)
    there = {part: there[part] for part in {path[0] for path in wanted}}
    leaves = [wanted.get(path, ...) for path in names.by_path(there)]
    found = self.restore_part(jax.tree.unflatten(jax.tree.structure(there), leaves), step)
    return {path: x for path, x in names.by_path(found).items() if x is not ...}

  def tree(self, step: int) -> dict[str, Any]:
    """Shapes and types of the state's arrays, in nested dicts; no array is read."""
    return abstract_arrays(self.meta(step)["arrays"])

  def meta(self, step: int) -> dict[str, Any]:
    """What `save` was given, with `format` and `arrays` (shapes, types and checksums)."""
    for folder, _, files in os.walk(self.path(step), onerror=self._unreadable):
      for path in (folder, *(os.path.join(folder, f) for f in files)):
        if not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
          raise UserError(f"checkpoint file {path} cannot be read; mend its permissions")
    with self.reading(step):
      meta = self._restore(step, meta=ocp.args.JsonRestore())["meta"]
      form, check = meta["format"], meta.pop("check")
    if form > FORMAT:
      raise UserError(f"checkpoint {self.path(step)} has format {form}, this version reads up to {FORMAT}; "
                      "install the version of sparse_experts that wrote it, or a newer one")
    if check != meta_checksum(meta):
      raise self.damaged(step, "meta is not what was saved")
    return meta

  def restore_newest(self, abstract: TrainState, refuse: Callable[[dict], None],
                     say: Callable[[str], None]) -> TrainState | None:
    """The newest intact state, or None without a checkpoint; damaged ones are reported and renamed.

    refuse: is given its `meta` first, and may raise.
    """
    while (step := self.latest()) is not None:
      try:
        state, damage = None, None
        refuse(self.meta(step))
        state = self.restore(abstract, step)
      except Damaged as e:
        damage = str(e)
      if not _anywhere(damage is not None):
        return state
      self._set_aside(step)
      say(f"{damage or self.damaged(step, 'another process cannot read it')}; kept aside as {_ASIDE}{step}")
    if os.path.isdir(self._folder) and any(n.startswith(_ASIDE) for n in os.listdir(self._folder)):
      raise UserError(f"{self._folder} holds damaged checkpoints only; bring back a whole one, or remove "
                      f"{_ASIDE}* to begin at step 0")
    return None

  def _set_aside(self, step: int) -> None:
    if jax.process_index() == 0:
      aside = os.path.join(self._folder, f"{_ASIDE}{step}")
      shutil.rmtree(aside, ignore_errors=True)
      os.rename(self.path(step), aside)
    _anywhere(True)  # no process reads the folder before it is renamed
    self._manager.reload()

  def choose(self, step: int | None) -> int:
    """`step`, or the newest; refuses a step that does not exist."""
    steps = self.steps()
    if not steps:
      raise UserError(f"{self._folder} holds no checkpoint; train the run first, or name another workdir")
    if step is not None and step not in steps:
      raise UserError(f"{self._folder} has no step {step}; choose from {', '.join(map(str, steps))}")
    return steps[-1] if step is None else step

  def path(self, step: int) -> str:
    return os.path.join(self._folder, str(step))

  def plain_path(self, step: int) -> str:
    """The same folder by a path that orbax and tensorstore can read; see `plain`."""
    return os.path.join(self._plain.path, str(step))

  def damaged(self, step: int, why: str) -> Damaged:
    """The error to raise for a step that cannot be read, with the newest other step as the way out."""
    others = [s for s in self.steps() if s != step]
    way_out = f"choose step {others[-1]}" if others else "train the run again"
    return Damaged(f"checkpoint {self.path(step)} is damaged ({why}); {way_out}")

  @contextlib.contextmanager
  def reading(self, step: int) -> Iterator[None]:
    """Any error in the block means that the step is damaged, except that a disk is full."""
    try:
      yield
    except Exception as e:  # orbax and tensorstore raise many types
      if storage.is_full(e):
        raise
      raise self.damaged(step, self._plain.shown(first_line(e))) from None

  def _restore(self, step: int, **items: Any) -> Any:
    return self._manager.restore(step, args=ocp.args.Composite(**items))

  @staticmethod
  def _unreadable(error: OSError) -> None:
    raise UserError(f"checkpoint folder {error.filename} cannot be read ({error.strerror}); "
                    "mend its permissions")


def _anywhere(flag: bool) -> bool:
  """Whether the flag is set in any process; all wait for each other."""
  if jax.process_count() == 1:
    return flag
  return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))
