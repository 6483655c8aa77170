"""Starts a run from another run's weights: `config.init_from`, DIR or DIR@step, and `config.init_take`.

Parameters meet by their names (`models/names.py`), so the two runs may stack their layers in other
segments. Only arrays that are taken are read, each with this run's sharding.

With `config.init_upcycle`, a sparse layer may meet a dense one (Komatsuzaki et al. 2022, Sparse Upcycling):
each expert is a copy of the dense FFN and the router starts fresh. While gates sum to 1 and nothing drops
(`router.gate=renormalized`), the new model is the old one; `router.k` is then 2 or more, or the router would
learn nothing. Raw gates scale the FFN's output by their sum.
`init_optimizer` handles the optimizer's state.
"""

import dataclasses
import hashlib
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sparse_experts import partitioning, processes, storage
from sparse_experts.config import ConfigDict, read_config
from sparse_experts.data import Vocabulary
from sparse_experts.errors import UserError
from sparse_experts.models import Params, names
from sparse_experts.training import identity, init_optimizer
from sparse_experts.training import workdir as wd
from sparse_experts.training.checkpoints import Checkpoints
from sparse_experts.training.optimizer import state_axes
from sparse_experts.training.selection import choose, select, trained
from sparse_experts.training.state import TrainState

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Given:
  """Arrays of another run, and the sources of each array here. Paths start with the part of the state.

  arrays: by their paths there. sources: path here -> for each of its rows (one, if it stacks nothing) the
  place there, or None: fresh. copied: paths here of experts that are each a copy of a dense FFN's array.
  step: from which this run continues.
  """

  arrays: dict[Path, Array]
  sources: dict[Path, list[names.Place | None]]
  copied: frozenset[Path] = frozenset()
  step: int = 0

  @property
  def moved(self) -> dict[Path, Array]:
    """The arrays that become an array here unchanged: their memory can be reused."""
    return {at: self.arrays[at] for at in map(self._whole, self.sources) if at is not None}

  def put_into(self, state: TrainState, arrays: dict[Path, Array]) -> TrainState:
    """`state` with the given arrays in place of its own; `arrays` are `self.arrays` as tracers."""
    own = {part: getattr(state, part) for part in (*names.PARTS, init_optimizer.PART)}
    flat = names.by_path(own).items()
    new = [self._put(path, x, arrays) if path in self.sources else x for path, x in flat]
    return state.replace(step=state.step + self.step, **jax.tree.unflatten(jax.tree.structure(own), new))

  def _put(self, path: Path, own: Array, arrays: dict[Path, Array]) -> Array:
    if (whole := self._whole(path)) is not None:
      return arrays[whole]
    return jnp.stack([own[r] if at is None else jnp.broadcast_to(arrays[at.path][at.repeat], own.shape[1:])
                      for r, at in enumerate(self.sources[path])])

  def _whole(self, path: Path) -> Path | None:
    """Path of the array there that equals the one at `path` here, if there is one."""
    first, *others = self.sources[path]
    if first is None or path in self.copied:
      return None
    same = first.repeat is None or [first, *others] == [
        names.Place(first.path, r) for r in range(len(self.arrays[first.path]))]
    return first.path if same else None


def read(config: ConfigDict, abstract: TrainState, axes: Any, tokenizer: Vocabulary) -> Given:
  """Reads what this run takes from `config.init_from`. Refuses arrays that are missing or have other shapes.

  axes: the model's logical ones.
  """
  folder, step = parse(config.init_from)
  here = {part: getattr(abstract, part) for part in names.PARTS}
  moments = {init_optimizer.PART: abstract.opt_state}
  with Checkpoints(wd.checkpoints(folder)) as checkpoints:
    step, kept = checkpoints.choose(step), read_config(folder)
    processes.compare("init_from", lambda: {
        "the step of init_from": step,
        "the run of init_from": hashlib.sha256(str(checkpoints.meta(step)).encode()).hexdigest()[:12]})
    identity.check(checkpoints, step, folder, kept, wd.read_tokenizer(folder, kept))
    there = checkpoints.tree(step)
    taken = choose("init_take", config.init_take, names.state_places(here))
    upcycled, fresh = _upcycle(config, there, here, taken)
    taken -= fresh
    _compare(config, there, here, taken - upcycled.keys())
    axes_of = _by_path(here["params"], axes, ("params",))
    tables = {"/".join(path[1:]) for path, of in axes_of.items() if {"vocab", "classes"} & set(of)}
    _check_tokenizer(config, folder, tokenizer, tables & taken)
    place_there, place_here = names.state_places(there), names.state_places(here)
    sources: dict[Path, list] = {}
    for name, place in place_here.items():
      sources.setdefault(place.path, []).append(
          place_there[upcycled.get(name, name)] if name in taken else None)
    sources = {path: rows for path, rows in sources.items() if any(rows)}
    of_optimizer = init_optimizer.sources(config, folder, step, there, here | moments, sources)
    sources |= of_optimizer
    axes_of |= _by_path(moments, state_axes(abstract.opt_state, abstract.params, axes))
    arrays_here, arrays_there = names.by_path(here | moments), names.by_path(there)
    wanted, copied = {}, set()
    for path, rows in sources.items():
      for at in filter(None, rows):
        # Rows have the same sharding in both and the axis of rows has none: the sharding here fits there.
        x, shape = arrays_here[path], arrays_there[at.path].shape
        sharding = x.sharding
        if len(shape) < len(x.shape):
          copied.add(path)
          of_one = tuple(name for name in axes_of[path] if name != "expert")
          sharding = partitioning.shardings(of_one, sharding.mesh, config.mesh.fsdp)
        wanted[at.path] = jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding)
    arrays = checkpoints.restore_arrays(wanted, step)
  return Given(arrays, sources, frozenset(copied), step if of_optimizer else 0)


def parse(run: str, key: str = "init_from") -> tuple[str, int | None]:
  """(folder, step or None) of DIR or DIR@step, the value of `key`; a folder may have @ in its name."""
  storage.check_keeps_runs(run, f"{key}={run}")
  if storage.is_folder(run):
    return run, None
  folder, at, step = run.rpartition("@")
  if not at or not storage.is_folder(folder):
    raise UserError(f"{key}={run}: there is no folder {folder if step.isdecimal() else run}; write DIR or "
                    "DIR@step of a trained run")
  if not step.isdecimal():
    raise UserError(f"{key}={run}: '{step}' is no step; write DIR or DIR@step")
  return folder, int(step)


def summary(config: ConfigDict, params: Params, given: Given | None) -> str:
  """A message with the numbers of parameters taken, fresh and frozen; empty if all are fresh and train."""
  total, messages = sum(math.prod(x.shape) for x in jax.tree.leaves(params)), []
  if given:
    sizes = {("params", *path): math.prod(x.shape) for path, x in names.by_path(params).items()}
    taken = sum(sizes[path] // len(rows) * sum(at is not None for at in rows)
                for path, rows in given.sources.items() if path in sizes)
    messages.append(f"{taken:,} parameters from {config.init_from}, {total - taken:,} fresh")
    if given.step:
      with_what = ", with its moments" * (config.init_optimizer == "moments")
      messages.append(f"continues from its step {given.step}{with_what}")
  trains = sum(x.size for x in jax.tree.leaves(select(trained(config, params), params)))
  if trains < total:
    messages.append(f"{trains:,} parameters train, {total - trains:,} are frozen")
  return "; ".join(messages)


def _by_path(tree: Any, axes: Any, start: Path = ()) -> dict[Path, tuple]:
  """Logical axes of a tree's arrays by path."""
  flat = [of for of in jax.tree.leaves(axes, is_leaf=partitioning.is_axes) if partitioning.is_axes(of)]
  return {(*start, *path): of for path, of in zip(names.by_path(tree), flat, strict=True)}


def _upcycle(config: ConfigDict, there: dict[str, Any], here: dict[str, Any],
             taken: set[str]) -> tuple[dict[str, str], set[str]]:
  """({an experts' array: the dense FFN's there}, what starts fresh) of layers that are sparse here only."""
  if not config.init_upcycle:
    return {}, set()
  of_all, own, dense = names.state_shapes(there), names.state_shapes(here), {}
  for name in sorted(taken - of_all.keys()):
    layer, _, part = name.partition("/ffn/experts/")
    if (source := f"{layer}/ffn/{part}") in of_all:
      dense[name] = source
      if own[name][1:] != of_all[source]:
        of_both = (" x ".join(map(str, shape)) for shape in (of_all[source], own[name][1:]))
        raise UserError(f"init_from={config.init_from}: {source} is {next(of_both)} there, and an expert's "
                        f"{name} {next(of_both)} here; set model.expert_dim and widths to the dense run's")
  layers = {name.partition("/ffn/")[0] for name in dense}
  if not layers:
    raise UserError(f"init_upcycle=True, but {config.init_from} has no dense FFN in a layer that is sparse "
                    "here; name a dense run, or leave it out")
  inside = {name for name in taken if name.partition("/ffn/")[0] in layers and "/ffn/" in name}
  return dense, inside - dense.keys()


def _compare(config: ConfigDict, there: dict[str, Any], here: dict[str, Any], taken: set[str]) -> None:
  own, others = ({name: shape for name, shape in names.state_shapes(tree).items() if name in taken}
                 for tree in (here, there))
  if differ := names.difference(others, own):
    leave_out = f"{config.init_take},-{differ.partition(' is ')[0]}"
    raise UserError(f"init_from={config.init_from}: {differ}; exclude what is to start fresh, for example "
                    f"with init_take='{leave_out}', or use a config of the same architecture")


def _check_tokenizer(config: ConfigDict, folder: str, tokenizer: Vocabulary, tables: set[str]) -> None:
  """Refuses tables of another vocabulary: the shapes may fit, but rows are other tokens or classes."""
  theirs = wd.read_tokenizer(folder, read_config(folder))
  if tables and theirs is not None and theirs.fingerprint != tokenizer.fingerprint:
    leave_out = ",".join(f"-{table}" for table in sorted(tables))
    if "classes" in (theirs.name, tokenizer.name):
      raise UserError(f"init_from={config.init_from}: {min(tables)} was trained on other classes; leave it "
                      f"out with init_take='{config.init_take},{leave_out}'")
    name = "bytes" if theirs.name == "bytes" else os.path.join(folder, "tokenizer.model")
    raise UserError(
        f"init_from={config.init_from}: {min(tables)} was trained with another tokenizer; set data.tokenizer="
        f"{name}, or leave it out with init_take='{config.init_take},{leave_out}'")
