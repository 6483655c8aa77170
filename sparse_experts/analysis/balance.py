"""How a run's experts share the load at the end of training, so that a collapsed router is seen."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from sparse_experts.config import layer_field
from sparse_experts.results import Result, layers_of

UNEQUAL = 0.01  # shares of dropped assignments that are farther apart are said


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


def mean_dropped(run: Result) -> float | None:
  """Share of assignments without a slot, mean over the logged rows of training, in the layer where it is
  largest; None of a run without sparse layers. A run that starts unbalanced drops most before its last row.
  """
  shares: dict[str, list[float]] = {}
  for row in run.rows:
    for layer in layers_of(row):
      shares.setdefault(layer, []).append(row.get(f"router/{layer}/dropped", 0.0))
  return max((sum(of) / len(of) for of in shares.values()), default=None)


def unequal_drops(shares: Mapping[str, Iterable[float | None]]) -> str:
  """What is to be said of groups whose runs dropped different shares of assignments; empty if they did not.

  shares: `mean_dropped` of each group's runs.
  """
  known = {name: [x for x in of if x is not None] for name, of in shares.items()}
  means = sorted((sum(of) / len(of), name) for name, of in known.items() if of)
  if len(means) < 2 or means[-1][0] - means[0][0] < UNEQUAL:
    return ""
  (low, fewest), (high, most) = means[0], means[-1]
  return (f"dropped in training: {fewest} {low:.1%}, {most} {high:.1%} of assignments: drops have a part "
          "in the difference; model.capacity_factor sets the capacity of both, 0 drops nothing")


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
