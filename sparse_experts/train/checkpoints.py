"""Saving and restoring train states. The only file that names orbax, whose interface moves."""

import logging
import os
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from sparse_experts.errors import UserError
from sparse_experts.train.state import TrainState

_METRIC = "eval_loss"
# orbax tells of every file it writes, and warns of every save without a loss.
logging.getLogger("absl").setLevel(logging.ERROR)


class Checkpoints:
  """Folder of checkpoints, one per step: the state, and `meta` (config, data fingerprint, step) as JSON.

  Saving goes on in the background; a save cut short leaves a folder that is ignored and removed later.
  Keeps the last `max_to_keep` and the one with the lowest evaluation loss.
  """

  def __init__(self, folder: str, max_to_keep: int | None = None):
    """Without `max_to_keep` nothing in the folder is touched: for reading."""
    folder, writes = os.path.abspath(folder), max_to_keep is not None
    loss = lambda metrics: metrics[_METRIC]
    lowest = keep.BestN(  # ascending, reversed: the lowest comes last, which is where it looks for the best
        get_metric_fn=loss, reverse=True, n=1, keep_checkpoints_without_metrics=False)
    options = ocp.CheckpointManagerOptions(
        best_fn=loss, best_mode="min",  # without it orbax writes no metrics
        preservation_policy=keep.AnyPreservationPolicy([keep.LatestN(n=max_to_keep), lowest]),
        enable_async_checkpointing=True, cleanup_tmp_directories=writes, create=writes)
    handlers = {"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
    self._folder = folder
    self._manager = ocp.CheckpointManager(folder, options=options, item_handlers=handlers)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def close(self) -> None:
    """Waits for the save that is under way."""
    self._manager.wait_until_finished()
    self._manager.close()

  def steps(self) -> list[int]:
    return sorted(self._manager.all_steps())

  def latest(self) -> int | None:
    return self._manager.latest_step()

  def best(self) -> int | None:
    """The step with the lowest evaluation loss."""
    return self._manager.best_step()

  def save(self, state: TrainState, meta: dict[str, Any], eval_loss: float | None = None) -> None:
    """Returns when the state is copied from the devices, before it is on disk."""
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
    metrics = None if eval_loss is None else {_METRIC: eval_loss}
    self._manager.save(int(state.step), args=items, metrics=metrics)

  def wait(self) -> None:
    self._manager.wait_until_finished()

  def restore(self, abstract: TrainState, step: int) -> TrainState:
    """The state laid out as `abstract` says, whatever mesh wrote it."""
    return self._restore(step, state=ocp.args.StandardRestore(abstract))["state"]

  def tree(self, step: int) -> dict[str, Any]:
    """Shapes and types of the state's arrays, in nested dicts; no array is read."""
    return self._manager.item_metadata(step)["state"].tree

  def restore_part(self, abstract: dict[str, Any], step: int) -> dict[str, Any]:
    """Those arrays of the state that `abstract` has, {"params": ..., ...}, laid out as it says."""
    each = ocp.checkpoint_utils.construct_restore_args(abstract)
    args = ocp.args.PyTreeRestore(item=abstract, restore_args=each, partial_restore=True)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
      return reader.restore(os.path.join(self._folder, str(step), "state"), args=args)

  def meta(self, step: int) -> dict[str, Any]:
    return self._restore(step, meta=ocp.args.JsonRestore())["meta"]

  def choose(self, step: int | None) -> int:
    """`step`, or the newest; refuses a step that is not there."""
    steps = self.steps()
    if not steps:
      raise UserError(f"{self._folder} holds no checkpoint; train the run first, or name another workdir")
    if step is not None and step not in steps:
      raise UserError(f"{self._folder} has no step {step}; choose from {', '.join(map(str, steps))}")
    return steps[-1] if step is None else step

  def _restore(self, step: int, **items: Any) -> Any:
    return self._manager.restore(step, args=ocp.args.Composite(**items))

