"""Saving and restoring train states. The only file that names orbax, whose interface moves."""

import contextlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from jax.experimental import multihost_utils
from orbax.checkpoint import type_handlers
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from sparse_experts.errors import UserError
from sparse_experts.models import names
from sparse_experts.training.checksums import add_to_checksum, checksums
from sparse_experts.training.state import TrainState

FORMAT = 1  # of what a checkpoint holds; a change that older code cannot read makes it larger
_METRIC = "eval_loss"
_CHUNK = 1 << 23  # bytes of an array that `save_mapped` encodes at once; a few are under way
_ASIDE = "damaged-"  # in front of the step, where orbax does not look
# orbax tells of every file it writes, warns of every save without a loss, and of a failed one in 200 lines.
logging.getLogger("absl").setLevel(logging.CRITICAL)
logging.getLogger("asyncio").setLevel(logging.CRITICAL)


class Damaged(UserError):
  """A checkpoint that is not what was saved."""


class Checkpoints:
  """Folder of checkpoints, one per step: the state, and `meta` (config, data fingerprint, ...) as JSON.

  Saving goes on in the background; a save cut short leaves a folder that is ignored and removed later.
  Keeps the last `max_to_keep` and the one with the lowest evaluation loss. What is read is compared with
  checksums taken of the arrays before they were written.
  """

  def __init__(self, folder: str, max_to_keep: int | None = None):
    """Without `max_to_keep` nothing in the folder is touched: for reading."""
    self._folder, self._max_to_keep = os.path.abspath(folder), max_to_keep
    self._saving: int | None = None  # the step whose save has not been seen to end
    self._manager = self._open()

  def _open(self) -> ocp.CheckpointManager:
    writes = self._max_to_keep is not None
    loss = lambda metrics: metrics[_METRIC]
    lowest = keep.BestN(  # ascending, reversed: the lowest comes last, which is where it looks for the best
        get_metric_fn=loss, reverse=True, n=1, keep_checkpoints_without_metrics=False)
    options = ocp.CheckpointManagerOptions(
        best_fn=loss, best_mode="min",  # without it orbax writes no metrics
        preservation_policy=keep.AnyPreservationPolicy([keep.LatestN(n=self._max_to_keep), lowest]),
        enable_async_checkpointing=True, cleanup_tmp_directories=writes, create=writes)
    handlers = {"state": ocp.PyTreeCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
    try:
      return ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)
    except PermissionError as e:
      raise UserError(f"{self._folder} cannot be read ({e.strerror}); mend its permissions") from None

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def close(self) -> None:
    """Waits for the save that is under way."""
    self.wait()
    self._manager.close()
    self._make_room()

  def steps(self) -> list[int]:
    return sorted(self._manager.all_steps())

  def latest(self) -> int | None:
    return self._manager.latest_step()

  def best(self) -> int | None:
    """The step with the lowest evaluation loss."""
    return self._manager.best_step()

  def save(self, state: TrainState, meta: dict[str, Any], eval_loss: float | None = None) -> str | None:
    """Returns when the state is copied from the devices, before it is on disk.

    A save that fails (a full disk) leaves the older ones as they are and the next one free to try again;
    the answer is why this one or the one before it failed, or None.
    """
    failed = self.wait()
    self._saving = int(state.step)
    meta = meta | {"format": FORMAT, "arrays": checksums(state)}
    items = ocp.args.Composite(
        state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(meta | {"check": _check(meta)}))
    metrics = None if eval_loss is None else {_METRIC: eval_loss}
    try:
      self._manager.save(self._saving, args=items, metrics=metrics)
    except Exception as e:
      failed = self._failed(e)
    return failed

  def wait(self) -> str | None:
    """Until what was saved is on disk; why it is not, or None."""
    try:
      self._manager.wait_until_finished()
    except Exception as e:  # orbax and tensorstore raise many kinds
      return self._failed(e)
    self._saving = None
    return None

  def trouble(self) -> str | None:
    """Why the save under way has failed, if it has; does not wait."""
    return None if self._saving is None or self._manager.is_saving_in_progress() else self.wait()

  def _failed(self, error: Exception) -> str:
    """Makes room and forgets the failed save."""
    step, self._saving = self._saving, None
    with contextlib.suppress(Exception):  # it may raise the same error again
      self._manager.close()
    self._make_room()
    self._manager = self._open()
    return f"step {step} could not be saved in {self._folder} ({_first_line(error)})"

  def _make_room(self) -> None:
    """Removes what saves that failed have left, while none is under way; a thread of one may still write."""
    if self._max_to_keep is not None and jax.process_index() == 0 and os.path.isdir(self._folder):
      for name in os.listdir(self._folder):
        if name.endswith(".orbax-checkpoint-tmp"):
          shutil.rmtree(os.path.join(self._folder, name), ignore_errors=True)

  def restore(self, abstract: TrainState, step: int) -> TrainState:
    """The state laid out as `abstract` says, whatever mesh wrote it.

    Raises UserError for another architecture and for files that cannot be read, Damaged for arrays that
    are not what was saved.
    """
    self.refuse_others(vars(abstract), step)
    return TrainState(**self.restore_part(vars(abstract), step))

  def refuse_others(self, here: dict[str, Any], step: int) -> None:
    """Refuses a step whose {"params": ..., ...} are not those of `here`, naming the first differences."""
    tree = self.tree(step)
    there = {field: tree.get(field, {}) for field in here}
    flat = lambda tree: {"/".join(path): tuple(x.shape) for path, x in names.by_path(tree).items()}
    differ = (names.difference(names.shapes(there["params"]), names.shapes(here["params"]))
              or names.difference(flat(there), flat(here)))
    if differ:
      raise UserError(f"checkpoint {self._path(step)} is of another architecture: {differ}; use the config "
                      "it was trained with, or another workdir")

  def restore_part(self, abstract: dict[str, Any], step: int) -> dict[str, Any]:
    """Those arrays of the state that `abstract` has, {"params": ..., ...}, laid out as it says.

    Nothing else is read, and nothing where it has `...`. The caller has seen to it that all are there: see
    `tree`.
    """
    arrays = self.meta(step)["arrays"]
    item = ocp.args.PyTreeRestore(
        item=abstract, partial_restore=True,
        restore_args=ocp.checkpoint_utils.construct_restore_args(abstract))
    try:
      part = self._restore(step, state=item)["state"]
    except Exception as e:  # whatever a reader stumbles over: see `wait`
      raise Damaged(self._damaged(step, _first_line(e))) from None
    for name, found in checksums(jax.tree.map(lambda x: None if x is ... else x, part)).items():
      if found != arrays[name]:
        raise Damaged(self._damaged(step, f"{name} is not what was saved"))
    return part

  def restore_arrays(self, wanted: dict[tuple[str, ...], jax.ShapeDtypeStruct],
                     step: int) -> dict[tuple[str, ...], jax.Array]:
    """Arrays of the state by path ("params", ...), laid out as `wanted` says; as `restore_part`."""
    try:  # the whole tree: orbax restores no part of a list, and the optimizer's state has lists
      there = dict(self._manager.item_metadata(step)["state"].tree)
    except Exception as e:  # see `restore_part`
      raise Damaged(self._damaged(step, _first_line(e))) from None
    there = {part: there[part] for part in {path[0] for path in wanted}}
    leaves = [wanted.get(path, ...) for path in names.by_path(there)]
    found = self.restore_part(jax.tree.unflatten(jax.tree.structure(there), leaves), step)
    return {path: x for path, x in names.by_path(found).items() if x is not ...}

  def restore_mapped(self, parts: tuple[str, ...], step: int, folder: str) -> dict[str, np.ndarray]:
    """The arrays of params, buffers, ... by name ("params/..."), copied to files of `folder` and mapped.

    Memory holds a chunk at a time: all of an array (a device's share) that `save` wrote, less of one of
    `save_mapped`.
    """
    base, found = os.path.join(self._path(step), "state") + "/", {}
    ocdbt = os.path.exists(base + "manifest.ocdbt")
    for name, (shape, dtype, value) in self.meta(step)["arrays"].items():
      if name.split("/")[0] not in parts:
        continue
      path = name.replace("/", ".") + "/"
      kvstore = ({"driver": "ocdbt", "base": f"file://{base}", "path": path} if ocdbt else
                 {"driver": "file", "path": base + path})
      try:
        there = tensorstore.open({"driver": "zarr", "kvstore": kvstore}).result()
        mapped = np.memmap(os.path.join(folder, str(len(found))), dtype, "w+", shape=tuple(shape))
        chunk = there.chunk_layout.read_chunk.shape
        for at in np.ndindex(*(-(-n // size) for n, size in zip(shape, chunk, strict=True))):
          part = tuple(slice(i * size, min((i + 1) * size, n))
                       for i, size, n in zip(at, chunk, shape, strict=True))
          mapped[part] = there[part].read().result()
      except Exception as e:  # see `restore_part`
        raise Damaged(self._damaged(step, _first_line(e))) from None
      if add_to_checksum(0, mapped, 0) != value:
        raise Damaged(self._damaged(step, f"{name} is not what was saved"))
      found[name] = mapped
    return found

  def tree(self, step: int) -> dict[str, Any]:
    """Shapes and types of the state's arrays, in nested dicts; no array is read."""
    return _nested(self.meta(step)["arrays"])

  def meta(self, step: int) -> dict[str, Any]:
    """What `save` was given, with `format` and `arrays` (shapes, types and checksums)."""
    for folder, _, files in os.walk(self._path(step), onerror=self._unreadable):
      for path in (folder, *(os.path.join(folder, f) for f in files)):
        if not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
          raise UserError(f"checkpoint file {path} cannot be read; mend its permissions")
    try:
      meta = self._restore(step, meta=ocp.args.JsonRestore())["meta"]
      form, check = meta["format"], meta.pop("check")
    except Exception as e:  # see `restore`
      raise Damaged(self._damaged(step, _first_line(e))) from None
    if form > FORMAT:
      raise UserError(f"checkpoint {self._path(step)} has format {form}, this version reads up to {FORMAT}; "
                      "install the version of sparse_experts that wrote it, or a newer one")
    if check != _check(meta):
      raise Damaged(self._damaged(step, "meta is not what was saved"))
    return meta

  def restore_newest(self, abstract: TrainState, refuse: Callable[[dict], None],
                     say: Callable[[str], None]) -> TrainState | None:
    """The newest state that is whole, None without any; what is damaged is named and kept aside.

    refuse: looks at its `meta` first.
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
      say(f"{damage or self._damaged(step, 'another process cannot read it')}; kept aside as {_ASIDE}{step}")
    if os.path.isdir(self._folder) and any(n.startswith(_ASIDE) for n in os.listdir(self._folder)):
      raise UserError(f"{self._folder} holds damaged checkpoints only; bring back a whole one, or remove "
                      f"{_ASIDE}* to begin at step 0")
    return None

  def _set_aside(self, step: int) -> None:
    if jax.process_index() == 0:
      aside = os.path.join(self._folder, f"{_ASIDE}{step}")
      shutil.rmtree(aside, ignore_errors=True)
      os.rename(self._path(step), aside)
    _anywhere(True)  # nobody looks before it is done
    self._manager.reload()

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

  def _path(self, step: int) -> str:
    return os.path.join(self._folder, str(step))

  def _damaged(self, step: int, why: str) -> str:
    others = [s for s in self.steps() if s != step]
    way_out = f"choose step {others[-1]}" if others else "train the run again"
    return f"checkpoint {self._path(step)} is damaged ({why}); {way_out}"

  @staticmethod
  def _unreadable(error: OSError) -> None:
    raise UserError(f"checkpoint folder {error.filename} cannot be read ({error.strerror}); "
                    "mend its permissions")


def save_mapped(folder: str, state: TrainState, arrays: dict[str, list], meta: dict[str, Any]) -> None:
  """Saves a state of memory-mapped numpy arrays without reading any of them whole.

  arrays: what `checksums` would say of the state.
  """
  meta = meta | {"format": FORMAT, "arrays": arrays}
  handlers = type_handlers.create_type_handler_registry(
      (np.ndarray, type_handlers.NumpyHandler(deepcopy_host_arrays=False)))
  # With OCDBT all that is written stays in memory until the end.
  handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=handlers)
  chunked = jax.tree.map(lambda x: ocp.SaveArgs(chunk_byte_size=_CHUNK if x.nbytes > _CHUNK else None), state)
  with ocp.CheckpointManager(
      os.path.abspath(folder), item_handlers={"state": handler, "meta": ocp.JsonCheckpointHandler()},
      options=ocp.CheckpointManagerOptions(enable_async_checkpointing=False)) as manager:
    manager.save(int(state.step), args=ocp.args.Composite(
        state=ocp.args.PyTreeSave(state, save_args=chunked),
        meta=ocp.args.JsonSave(meta | {"check": _check(meta)})))


def _nested(arrays: dict[str, list]) -> dict[str, Any]:
  """{"params/decoder/...": [shape, dtype, ...]} as nested dicts of shapes and types."""
  tree: dict[str, Any] = {}
  for name, (shape, dtype, *_) in arrays.items():
    *folders, leaf = name.split("/")
    inner = tree
    for folder in folders:
      inner = inner.setdefault(folder, {})
    inner[leaf] = jax.ShapeDtypeStruct(shape, dtype)
  return tree


def _check(meta: dict[str, Any]) -> int:
  return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def _first_line(error: BaseException) -> str:
  text = " ".join(str(error).split()) or type(error).__name__
  return text if len(text) <= 200 else f"{text[:90]} ... {text[-100:]}"


def _anywhere(flag: bool) -> bool:
  """Whether the flag is up in any process; all wait for each other."""
  if jax.process_count() == 1:
    return flag
  return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))
