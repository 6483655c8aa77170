"""Finds the smallest TPU slice, and a mesh on it, that fits a config's train step.

Candidates are the meshes of all slices, by size of the slice and then by estimated memory
(`aot/estimate.py`). Those whose estimate is above the chip's memory are left out. Of each slice at most two
are compiled. What they need more than was estimated is expected of the others too.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from sparse_experts.aot import chips, estimate
from sparse_experts.aot import program as aot
from sparse_experts.config import ConfigDict, replaced
from sparse_experts.errors import UserError
from sparse_experts.validation import validate

MOST = 4  # compiles of one search, of which each may take minutes


class Mesh(NamedTuple):
  """`config.mesh` of one slice."""

  data: int
  expert: int
  model: int
  fsdp: bool

  def __str__(self) -> str:
    return " ".join(f"{axis}={n}" for axis, n in self._asdict().items())


@dataclasses.dataclass(frozen=True)
class Try:
  """A compile of the search."""

  mesh: Mesh
  program: aot.Program
  where: chips.Slice

  @property
  def fits(self) -> bool:
    return self.program.peak is not None and self.gib <= self.where.chip.usable_gib

  @property
  def gib(self) -> float:
    """GiB that a chip needs, by the compiler; infinite if it does not say."""
    peak = self.program.peak or self.program.required
    return math.inf if peak is None else peak * self.where.chip.devices / aot.GIB

  def __str__(self) -> str:
    if self.program.peak is None:
      return f"{self.where.name} {self.mesh}: does not fit ({self.program.too_large})"
    return (f"{self.where.name} {self.mesh}: {self.gib:.2f} of {self.where.chip.usable_gib} GiB a chip, "
            + ("fits" if self.fits else "does not fit"))


def find(shapes: aot.Shapes, config: ConfigDict, chip: str, say: Callable[[str], None]) -> list[Try]:
  """The compiles made, in order; the last one fits if any does. `say` gets a line before and after each."""
  tries: list[Try] = []
  kept = estimate.kept(shapes, config)
  more = 1.0  # the compiler's figure over the estimate, the largest so far
  for topology in chips.slices(chip):
    where = chips.get_slice(topology)
    candidates = sorted(meshes(shapes, config, where, kept), key=lambda m: m[1])
    room = [(mesh, gib) for mesh, gib in candidates if more * gib <= where.chip.usable_gib]
    if not room:
      least = candidates and f"the least needs about {more * candidates[0][1]:.2f} GiB a chip"
      say(f"{topology}: no mesh is expected to fit ({least or 'training would accept none'})")
      continue
    # Prefer to shard experts; dense weights only if needed.
    preferred = min(room, key=lambda m: (m[0].model, m[0].fsdp, -m[0].expert))
    for mesh, gib in dict.fromkeys((preferred, room[0])):
      if len(tries) == MOST:
        return tries
      if more * gib > where.chip.usable_gib:
        continue  # as the compile before has shown
      say(f"{topology} {mesh}: {more * gib:.2f} GiB a chip expected; compiling")
      plan = shapes.plan(_with(config, mesh), where.devices)
      tries.append(Try(mesh, aot.compile_step(plan), where))
      say(str(tries[-1]))
      if tries[-1].fits:
        return tries
      if tries[-1].gib < math.inf:
        more = max(more, tries[-1].gib / gib)
  return tries


def meshes(shapes: aot.Shapes, config: ConfigDict, where: chips.Slice,
           kept: estimate.Kept) -> Iterator[tuple[Mesh, float]]:
  """(mesh, estimated GiB per chip) of every mesh that training would accept."""
  total = len(where.devices)
  divisors = [n for n in range(1, total + 1) if total % n == 0]
  for model in divisors:
    for expert in (n for n in divisors if total // model % n == 0):
      if expert > 1 and not shapes.model.sparse_layers:
        continue  # data does the same
      for fsdp in (False, True):
        mesh = Mesh(total // model // expert, expert, model, fsdp)
        if fsdp and model == total:
          continue
        try:
          validate(other := _with(config, mesh))
          plan = shapes.plan(other, where.devices)
        except UserError:
          continue
        yield mesh, where.chip.devices * estimate.peak(plan, kept) / aot.GIB


def _with(config: ConfigDict, mesh: Mesh) -> ConfigDict:
  return replaced(config, {f"mesh.{axis}": n for axis, n in mesh._asdict().items()})
