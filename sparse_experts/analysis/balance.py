"""How a run's experts share the load at the end of training, so that a collapsed router is seen."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from sparse_experts.config import layer_field
from sparse_experts.results import Result, layers_of


@dataclasses.dataclass(frozen=True)
class Balance:
  """Figures of a run's last logged interval of training, each of the sparse layer where it is worst.

  dropped: share of assignments without a slot. dead: experts, of `experts`, that got less than a tenth of an
  even share in the last 100 steps. max_vio: the fullest expert's load over the mean one, minus 1.
  """

  dropped: float
  dead: int
  experts: int
  max_vio: float

  @property
  def collapsed(self) -> bool:
    return 2 * self.dead > self.experts


def balance(run: Result) -> Balance | None:
  """None of a run without sparse layers, or before its first logged step."""
  row: dict[str, Any] = next((row for row in reversed(run.rows) if layers_of(row)), {})
  if not (layers := layers_of(row)):
    return None
  get = lambda layer, name: row.get(f"router/{layer}/{name}", 0)
  experts = {layer: num_experts(run.config, layer) for layer in layers}
  worst = max(layers, key=lambda layer: get(layer, "dead") / experts[layer])
  return Balance(
      max(get(layer, "dropped") for layer in layers), int(get(worst, "dead")), experts[worst],
      max(get(layer, "load_max_mean") for layer in layers) - 1)


def collapsed(runs: Iterable[Result]) -> str:
  """What is to be said of runs in which most experts of a layer are dead; empty if there are none."""
  found = [balance(run) for run in runs]
  lost = [b for b in found if b is not None and b.collapsed]
  if not lost:
    return ""
  worst = max(lost, key=lambda b: b.dead / b.experts)
  return f"{worst.dead} of {worst.experts} experts dead in {len(lost)} of {len(found)} runs"


def num_experts(config: ConfigDict, layer: str) -> int:
  """Of a layer by its name in the metrics, such as decoder/01."""
  return layer_field(config, layer, "num_experts")
