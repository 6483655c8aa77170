"""What is compared: every router and mixture layer with its defaults, and the arms that need arguments."""

from collections.abc import Iterable
from typing import Any

from sparse_experts.config import LAYERS, ROUTERS

Arm = tuple[str, dict[str, Any]]  # name of a router or layer, its arguments

ORACLE, RANDOM, SWITCH, DENSE = "true cluster", "random", "top_k", "dense"  # what others are measured by
RATES = (3e-3, 1e-2, 3e-2, 1e-1)  # tried by each arm, each with one run
TUNING_SEED = 1000  # reported nowhere
SEEDS = range(5)

# Arms with another name than their router's, or with arguments.
SPECIAL: dict[str, Arm] = {
    ORACLE: ("task", {}),
    RANDOM: ("random", dict(draw="token")),
    DENSE: (DENSE, {}),  # one FFN as wide as an expert, and no router
    "top_k of 2": ("top_k", dict(k=2, gate="renormalized")),
    "expert_threshold": ("expert_threshold", dict(decay=0.99, warmup_steps=200)),  # of 1000 steps
    "token_rounding": ("token_rounding", dict(tile=8)),  # groups are smaller than its own
    "limoe": ("limoe", dict(local_weights=(1e-2,) * 8, global_weights=(0.0,) * 8)),  # clusters as modalities
}


def arms(names: Iterable[str]) -> dict[str, Arm]:
  """The special arms, and one with its defaults (its paper's k and losses) for each other name."""
  return SPECIAL | {name: (name, {}) for name in names if name not in SPECIAL and name != SPECIAL[ORACLE][0]}


ARMS = arms((*ROUTERS, *LAYERS))
