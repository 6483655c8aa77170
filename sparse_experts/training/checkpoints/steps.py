"""The steps in a folder of checkpoints, and reading them: nothing in the folder is touched."""

import os
import re
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from sparse_experts import storage
from sparse_experts.errors import UserError
from sparse_experts.models import names
from sparse_experts.small_files import Damaged, patiently, read_json, reason
from sparse_experts.training.checkpoints.arrays import read_arrays
from sparse_experts.training.checkpoints.checksums import checksums
from sparse_experts.training.checkpoints.meta import FORMAT, abstract_arrays, is_sealed
from sparse_experts.training.checkpoints.on_disk import is_complete
from sparse_experts.training.checkpoints.plain import PlainPath
from sparse_experts.training.state import TrainState

T = TypeVar("T")
STEP = re.compile("0|[1-9][0-9]*")


class Steps:
  """One folder per step: the state, and `meta` (config, data fingerprint, ...) as JSON.

  What is read is compared with checksums taken before it was written. Errors are of three kinds: Damaged, for
  what is not what was saved; UserError for a step in the wrong place, of another architecture or of a newer
  version, and for a machine that cannot read it now.
  """

  def __init__(self, folder: str):
    self._folder = storage.absolute(folder)
    self._plain = PlainPath(folder)

  def steps(self) -> list[int]:
    try:
      found = patiently(lambda: [
          int(name) for name in storage.names(self._folder)
          if STEP.fullmatch(name) and is_complete(os.path.join(self._folder, name))], self._folder)
    except FileNotFoundError:
      return []
    except NotADirectoryError:
      raise UserError(f"{self._folder} is a file; restore the folder, or name another workdir") from None
    return sorted(found)

  def latest(self) -> int | None:
    return max(self.steps(), default=None)

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

  def meta(self, step: int) -> dict[str, Any]:
    """What `save` was given, with `format` and `arrays` (shapes, types and checksums).

    Refuses a step that is another one by what it holds: folders that were renamed, swapped or linked.
    """
    path = self.path(step)
    meta = self.read(step, lambda: read_json(os.path.join(path, "meta", "metadata"), "restore it"))
    if not is_sealed(meta):
      raise self.damaged(step, "meta is not what was saved")
    if meta["format"] > FORMAT:
      raise UserError(f"checkpoint {path} has format {meta['format']}, this version reads up to {FORMAT}; "
                      "install the version of sparse_experts that wrote it, or a newer one")
    # The checksum of the one number `step` is that number.
    if (held := meta["arrays"].get("step", [[], "int32", step])[2]) != step:
      raise UserError(f"checkpoint {path} holds step {held}: it was renamed or swapped, or is a link; give "
                      "it its own name again, or remove it")
    return meta

  def tree(self, step: int) -> dict[str, Any]:
    """Shapes and types of the state's arrays, in nested dicts; no array is read."""
    return abstract_arrays(self.meta(step)["arrays"])

  def restore(self, abstract: TrainState, step: int) -> TrainState:
    """The state with the shardings of `abstract`, whatever mesh wrote it."""
    self.refuse_others(vars(abstract), step)
    return TrainState(**self.restore_part(vars(abstract), step))

  def refuse_others(self, here: dict[str, Any], step: int) -> None:
    """Refuses a step whose {"params": ..., ...} are not those of `here`, naming the first differences."""
    tree = self.tree(step)
    there = {field: tree.get(field, {}) for field in here}
    flat = lambda tree: {"/".join(path): tuple(x.shape) for path, x in names.by_path(tree).items()}
    types = lambda tree: {"/".join(path): str(x.dtype) for path, x in names.by_path(tree).items()}
    way_out = "use the config it was trained with, or another workdir"
    if differ := (names.difference(names.shapes(there["params"]), names.shapes(here["params"]))
                  or names.difference(flat(there), flat(here))):
      raise UserError(f"checkpoint {self.path(step)} is of another architecture: {differ}; {way_out}")
    if differ := names.difference(types(there), types(here)):
      way_out = "unset JAX_ENABLE_X64" if jax.config.jax_enable_x64 else way_out  # type: ignore[attr-defined]
      raise UserError(f"checkpoint {self.path(step)} has arrays of other types: {differ}; {way_out}")

  def restore_part(self, abstract: dict[str, Any], step: int) -> dict[str, Any]:
    """The arrays of the state that `abstract` names, {"params": ..., ...}; as `restore_arrays`."""
    found = self.restore_arrays(names.by_path(abstract), step)
    return jax.tree.unflatten(jax.tree.structure(abstract), found.values())

  def restore_arrays(self, wanted: dict[tuple[str, ...], jax.ShapeDtypeStruct],
                     step: int) -> dict[tuple[str, ...], jax.Array]:
    """Arrays of the state by path ("params", ...), in order, with the shardings of `wanted`.

    Nothing else is read; all must exist: see `tree`. Raises Damaged for arrays that are not what was saved.
    """
    facts, folder = self.meta(step)["arrays"], self.plain_path(step)
    paths = {"/".join(path): path for path in wanted}
    read = lambda: _checked(read_arrays(folder, {name: wanted[path] for name, path in paths.items()}))
    found, sums = self.read(step, read)
    for name, fact in sums.items():
      if fact != facts[name]:
        raise self.damaged(step, f"{name} is not what was saved")
    return {path: found[name] for name, path in paths.items()}

  def damaged(self, step: int, why: str) -> Damaged:
    """The error to raise for a step that is not what was saved, with the newest other step as the way out."""
    others = [s for s in self.steps() if s != step]
    way_out = f"choose step {others[-1]}" if others else "train the run again"
    return Damaged(f"checkpoint {self.path(step)} is damaged ({why}); {way_out}")

  def read(self, step: int, read: Callable[[], T]) -> T:
    """read(), where missing files and files of another form mean that the step is damaged."""
    try:
      return patiently(read, f"checkpoint {self.path(step)}")
    except Damaged as e:
      raise self.damaged(step, str(e).partition(";")[0]) from None
    except UserError:
      raise
    except OSError as e:
      raise self.damaged(step, f"{e.filename}: {reason(e)}") from None
    except ValueError as e:  # tensorstore's
      raise self.damaged(step, self._plain.shown(reason(e))) from None


def _checked(arrays: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], dict[str, list]]:
  return arrays, checksums(arrays) if arrays else {}
