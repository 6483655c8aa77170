"""Capacity rules: how many slots an expert has in a group, as each published codebase counts them.

They differ in whether the k choices count, in rounding, and in the smallest number of slots; the same
capacity factor therefore means different things in different papers. `round` takes ties to even.
"""

import math
from collections.abc import Callable

from sparse_experts.moe.arguments import check, check_known


def _up_to_multiple_of_4(slots: int) -> int:
  return -(-slots // 4) * 4


# (tokens in the group, experts, k, factor) -> slots, and the smallest number of slots by default.
CAPACITY_RULES: dict[str, tuple[Callable[[int, int, int, float], int], int]] = {
    "mesh": (lambda t, e, k, f: min(t, int(t * f / e)), 4),
    "flaxformer": (lambda t, e, k, f: round(f * t / e), 4),
    "vmoe": (lambda t, e, k, f: _up_to_multiple_of_4(math.ceil(t * k * f / e)), 1),
    "vmoe_paper": (lambda t, e, k, f: round(k * t * f / e), 1),
    "lingvo": (lambda t, e, k, f: _up_to_multiple_of_4(int(t * f / e) or 4), 1),
    "megablocks": (lambda t, e, k, f: int(f * k * t / e), 1),
    "maxtext": (lambda t, e, k, f: int(math.ceil(t * k / e) * f), 1),
}


def expert_capacity(rule: str, group_size: int, num_experts: int, k: int, factor: float,
                    minimum: int | None = None) -> int:
  """Slots C per expert and group of `group_size` tokens; `minimum` None means the rule's own.

  At least 1, also where a published rule would round to none.
  Counts tokens of the static group, padding included, so it depends on neither data nor devices.
  """
  check_known("capacity_rule", rule, CAPACITY_RULES)
  check(not factor <= 0, "capacity_factor", factor,
        "leaves no slots; give a positive factor, or None for dropless")
  slots, least = CAPACITY_RULES[rule]
  return max(slots(group_size, num_experts, k, factor), least if minimum is None else minimum, 1)
