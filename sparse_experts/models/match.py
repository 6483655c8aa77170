"""Find widths that match two configs in FLOPs or parameters: the overrides for a fair comparison.

Only the hidden widths of FFNs change: nothing else depends on them, and both parameters and FLOPs are affine
in each of them, so two evaluations of a count give the width that is wanted. To match in both at once the
number of experts changes too.
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


def match_both(config: ConfigDict, targets: dict[str, float],
               counts: Callable[[ConfigDict], dict[str, float]]) -> dict[str, Match]:
  """{measure: its Match}, of one set of overrides, that bring all counts of a sparse config near `targets`.

  The width of the experts and their number are solved for: experts of another width (MH-MoE's, fine-grained
  ones) match in FLOPs by the first and in parameters by the second. Chosen is the pair whose worse difference
  is least; the experts' width is a multiple of 8, or of 4, 2 or 1 where those are not equal, and of
  `mesh.model`, their number one of `mesh.expert`.
  counts, targets: of FLOPs and of parameters, in that order. FLOPs are affine in the width and in the number;
  parameters are affine in the number, with a slope that is affine in the width.
  """
  step = math.lcm(MULTIPLES[-1], config.mesh.model)
  number, k = config.model.num_experts, config.model.router.k or 1
  flops, params = targets
  at = lambda width, experts: counts(replaced(config, {
      "model.expert_dim": width, "model.num_experts": experts}))
  low, wide, many = at(step, number), at(2 * step, number), at(step, 2 * number)
  per_width, per_expert = (wide[flops] - low[flops]) / step, (many[flops] - low[flops]) / number
  expert_size, slope = (many[params] - low[params]) / number, (wide[params] - low[params]) / (step * number)

  def excess(width: int, experts: int) -> float:
    wider, more = width - step, experts - number
    f = low[flops] + wider * per_width + more * per_expert
    p = low[params] + more * expert_size + wider * slope * experts
    return max(abs(f / targets[flops] - 1), abs(p / targets[params] - 1))

  most = number + (targets[params] - low[params]) / expert_size  # experts, at the least width
  choices: list[tuple[float, int, int]] = []
  for multiple in (math.lcm(m, config.mesh.model) for m in (8, 4, 2, 1)):
    for experts in range(config.mesh.expert, max(int(most), number) + 1, config.mesh.expert):
      if experts >= k:
        wanted = step + (targets[flops] - low[flops] - (experts - number) * per_expert) / per_width
        below = math.floor(wanted / multiple)
        choices += [(excess(width, experts), experts, width)
                    for width in (multiple * max(below, 1), multiple * max(below + 1, 1))]
    if min(choices)[0] <= EQUAL:
      break
  start = counts(config)
  least, experts, width = min(choices)
  overrides = {"model.expert_dim": width, "model.num_experts": experts}
  if max(abs(start[m] / targets[m] - 1) for m in targets) <= least:
    overrides = {}
  reached = counts(replaced(config, overrides)) if overrides else start
  return {m: Match(overrides, start[m], targets[m], reached[m]) for m in targets}
