"""Costs of a compiled train step per chip: memory, collectives and estimated time."""

import re
from typing import Any

from sparse_experts.aot import program as aot
from sparse_experts.aot.chips import Slice
from sparse_experts.profiling import hlo

# Scopes of a sparse layer: collectives in them are its own; gradients of its weights are not counted.
SPARSE = {"router", "dispatch", "all_to_all", "experts", "combine"}


def summary(program: aot.Program, where: Slice | None = None) -> dict[str, Any]:
  """What `compile --json` prints, defined in docs/measures.md. Without a slice: per device, and no rates."""
  plan, devices = program.plan, 1 if where is None else where.chip.devices
  counts, chips = plan.counts(), plan.mesh.size / devices
  memory = program.memory or plan.arguments()
  hbm: dict[str, float | None] = {name: devices * size / aot.GIB for name, size in memory.items()}
  hbm["peak"] = peak = None if program.peak is None else devices * program.peak / aot.GIB
  figures: dict[str, Any] = {
      "chips": int(chips), "params_total": counts["params_total"], "params_active": counts["params_active"],
      "hbm_per_chip_gib": hbm,
      "flops_per_chip": counts["flops"] / chips, "model_flops_per_chip": counts["model_flops"] / chips,
      "collectives": None, "per_sparse_layer": None, "compile_seconds": program.seconds}
  if program.collectives is not None:
    figures["collectives"] = by_kind(program.collectives, devices)
    figures["per_sparse_layer"] = per_sparse_layer(program, devices)
  if where is not None:
    hbm["usable"] = where.chip.usable_gib
    figures["fits"] = peak is not None and peak <= where.chip.usable_gib
    figures["estimated_step_seconds"] = estimate(program, where)
  return figures


def by_kind(sent: list[hlo.Collective], devices: int) -> dict[str, Any]:
  """{kind: count and bytes of a chip} per step; recomputation is counted separately."""
  kinds: dict[str, Any] = {}
  for c in sent:
    entry = kinds.setdefault(c.kind, {
        "count": 0, "bytes": 0.0, "recomputed_count": 0, "recomputed_bytes": 0.0, "at_least": False})
    prefix = "recomputed_" if c.phase == "recomputed" else ""
    entry[prefix + "count"] += c.count
    entry[prefix + "bytes"] += devices * c.sent
    entry["at_least"] |= not c.bounded
  return dict(sorted(kinds.items()))


def per_sparse_layer(program: aot.Program, devices: int) -> dict[str, Any]:
  """{kind: {phase: count and bytes}} in the scopes of sparse layers, per sparse layer and micro-batch."""
  layers = len(program.plan.model.sparse_layers) * program.plan.config.train.accumulate
  kinds: dict[str, Any] = {}
  for c in (program.collectives or ()) if layers else ():
    if SPARSE & set(re.split(r"[/():]+", c.op_name)):
      entry = kinds.setdefault(c.kind, {}).setdefault(c.phase, {"count": 0.0, "bytes": 0.0})
      entry["count"] += c.count / layers
      entry["bytes"] += devices * c.sent / layers
  return dict(sorted(kinds.items()))


def estimate(program: aot.Program, where: Slice) -> dict[str, float] | None:
  """A roofline in seconds per step, no measurement: each term at its published rate; see docs/measures.md.

  None for a program that does not fit.
  """
  plan, chip, m = program.plan, where.chip, program.memory
  if m is None or program.collectives is None:
    return None
  passes = 3 if plan.config.model.remat else 2  # forward and backward read every weight
  arguments = sum(plan.arguments().values()) + m["padding"]
  moved = 2 * arguments + passes * m["parameters"] + 2 * m["temporaries"] + m["outputs"]
  places, terms = plan.mesh.devices.ravel(), {"interconnect": 0.0, "dcn": 0.0}
  for c in program.collectives:
    group = [places[i] for i in c.groups[0]]  # the other groups have the same distances
    if c.kind == "send" or len({getattr(d, "slice_index", 0) for d in group}) > 1:
      terms["dcn"] += chip.devices * c.sent / chip.dcn
    elif len({tuple(d.coords) for d in group}) > 1:  # cores of one chip need no link
      hops = where.hops(group) if c.kind in ("all-to-all", "ragged-all-to-all", "collective-permute") else 1.0
      terms["interconnect"] += chip.devices * c.sent * hops / chip.ici
  terms = {"compute": plan.counts()["flops"] / where.chips / chip.flops,
           "hbm": chip.devices * moved / chip.hbm, **terms}
  return terms | {"overlapped": max(terms.values()), "serial": sum(terms.values())}
