"""Find widths that match two configs in FLOPs or parameters: the overrides for a fair comparison.

Only the hidden widths of FFNs change: nothing else depends on them, and both parameters and FLOPs are affine
in each of them, so two evaluations of a count give the width that is wanted.
"""

import dataclasses
import math
from collections.abc import Callable

from sparse_experts.config import ConfigDict, replaced

EQUAL = 0.01  # relative difference that docs/measures.md calls equal
MULTIPLES = (128, 64, 32, 16, 8)  # of a width; the first that is equal wins, as large ones run faster

Count = Callable[[ConfigDict], float]


@dataclasses.dataclass(frozen=True)
class Match:
  """`overrides` take the count from `start` to `reached`; `narrowest`: the least width is too large."""

  overrides: dict[str, int]
  start: float
  target: float
  reached: float
  narrowest: bool = False

  @property
  def excess(self) -> float:
    """Relative difference from the target, positive if the config is larger."""
    return self.reached / self.target - 1

  @property
  def is_equal(self) -> bool:
    return abs(self.excess) <= EQUAL


def match(config: ConfigDict, target: float, count: Count) -> Match:
  """The overrides of `config` that bring `count(config)` nearest to `target`; none if it is equal already.

  count: affine and rising in `model.mlp_dim` and in `model.expert_dim`. Tried in order, the first that is
  equal wins: the width of the experts, which does not change the dense layers; `model.mlp_dim`, which the
  experts have too unless `model.expert_dim` is set; both, the experts at their narrowest. A dense
  config has one width, unless it sets `model.expert_dim`. Widths are multiples of 128, or else of 64, 32, 16
  or 8, and of `mesh.model`.
  """
  start = count(config)
  best = Match({}, start, target, start)
  dense = not config.model.num_experts and not config.model.decoder.num_experts
  one_width = dense and config.model.expert_dim is None
  for keys in [["mlp_dim"]] if one_width else [["expert_dim"], ["mlp_dim"], ["expert_dim", "mlp_dim"]]:
    if best.is_equal:
      break
    found = Match({}, start, target, start)
    for key in keys:
      found = _move(f"model.{key}", config, found, count)
    best = min(best, found, key=lambda m: abs(m.excess))  # the former, if they are as good
  return best


def _move(key: str, config: ConfigDict, found: Match, count: Count) -> Match:
  """`found` with one more key, at the multiple that comes nearest."""
  at = lambda width: count(replaced(config, found.overrides | {key: width}))
  least = math.lcm(MULTIPLES[-1], config.mesh.model)
  low = at(least)
  slope = (at(2 * least) - low) / least
  if not slope:  # no layer has this width
    return found
  wanted = least + (found.target - low) / slope
  choices = []
  for multiple in MULTIPLES:
    step = math.lcm(multiple, config.mesh.model)
    width = max(round(wanted / step), 1) * step
    excess = abs((low + (width - least) * slope) / found.target - 1)
    choices.append((excess if excess > EQUAL else 0.0, -step, width))
  width = min(choices)[-1]
  return Match(found.overrides | {key: width}, found.start, found.target, at(width), wanted < least)
