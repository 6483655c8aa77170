"""Finds the smallest TPU slice, and a mesh on it, that fits a config's train step.

A lower bound of a mesh's memory is its arguments and gradients. Of the meshes whose bound fits on a slice at
most two are compiled; their temporaries give a better bound for the next slice.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

from sparse_experts.aot import chips
from sparse_experts.aot import program as aot
from sparse_experts.config import ConfigDict, replaced
from sparse_experts.errors import UserError
from sparse_experts.validation import validate

MOST = 6  # compiles of one search


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
    peak = self.program.peak
    return peak is not None and peak * self.where.chip.devices <= self.where.chip.usable_gib * aot.GIB

  def __str__(self) -> str:
    if self.program.peak is None:
      return f"{self.where.name} {self.mesh}: does not fit ({self.program.too_large})"
    needs = self.program.peak * self.where.chip.devices / aot.GIB
    return (f"{self.where.name} {self.mesh}: {needs:.2f} of {self.where.chip.usable_gib} GiB a chip, "
            + ("fits" if self.fits else "does not fit"))


def find(shapes: aot.Shapes, config: ConfigDict, chip: str, say: Callable[[str], None]) -> list[Try]:
  """The compiles made, in order; the last one fits if any does. `say` gets a line before and after each."""
  tries: list[Try] = []
  floor = 0.0  # GiB of temporaries, times chips: they shrink as the batch spreads
  for topology in chips.slices(chip):
    where = chips.get_slice(topology)
    options = sorted(meshes(shapes, config, where), key=lambda m: m[1])
    room = [(mesh, bound) for mesh, bound in options if bound + floor / where.chips <= where.chip.usable_gib]
    if not room:
      least = options and f"{options[0][1] + floor / where.chips:.2f} GiB a chip or more"
      say(f"{topology}: no mesh can fit ({least or 'training would accept none'})")
      continue
    # Prefer to shard experts; dense weights only if needed.
    preferred = min(room, key=lambda m: (m[0].model, m[0].fsdp, -m[0].expert))[0]
    for mesh in dict.fromkeys((preferred, room[0][0])):
      if len(tries) == MOST:
        return tries
      say(f"{topology} {mesh}: compiling")
      plan = shapes.plan(_with(config, mesh), where.devices)
      tries.append(Try(mesh, aot.compile_step(plan), where))
      say(str(tries[-1]))
      if tries[-1].fits:
        return tries
    needs = [t.program.memory for t in tries if t.where is where]
    temporaries = [memory["temporaries"] for memory in needs if memory]
    if len(temporaries) == len(needs):
      floor = min(temporaries) * where.chip.devices / aot.GIB * where.chips
  return tries


def meshes(shapes: aot.Shapes, config: ConfigDict, where: chips.Slice) -> Iterator[tuple[Mesh, float]]:
  """(mesh, GiB per chip of the arguments and gradients) of every mesh that training would accept."""
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
          parts = shapes.plan(other, where.devices).arguments()
        except UserError:
          continue
        yield mesh, where.chip.devices * (sum(parts.values()) + parts["parameters"]) / aot.GIB


def _with(config: ConfigDict, mesh: Mesh) -> ConfigDict:
  return replaced(config, {f"mesh.{axis}": n for axis, n in mesh._asdict().items()})
