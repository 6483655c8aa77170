"""Capacity of each codebase, against golden values."""

import pytest

from sparse_experts.errors import UserError
from sparse_experts.moe import expert_capacity

COLUMNS = ("mesh", "flaxformer", "vmoe", "vmoe_paper", "lingvo", "megablocks", "maxtext")
ROWS = [
    (4096, 64, 2, 1.25, (80, 80, 160, 160, 80, 160, 160)),
    (400, 32, 2, 1.05, (13, 13, 28, 26, 16, 26, 26)),
    (2048, 128, 1, 1.25, (20, 20, 20, 20, 20, 20, 20)),
    (8192, 128, 1, 1.25, (80, 80, 80, 80, 80, 80, 80)),
    (64, 8, 1, 1.0, (8, 8, 8, 8, 8, 8, 8)),
    (10, 4, 1, 1.0, (4, 4, 4, 2, 4, 2, 3)),
    (16, 8, 2, 1.25, (4, 4, 8, 5, 4, 5, 5)),
]


@pytest.mark.parametrize("tokens, experts, k, factor, slots", ROWS)
def test_golden_capacities(tokens, experts, k, factor, slots):
  assert tuple(expert_capacity(rule, tokens, experts, k, factor) for rule in COLUMNS) == slots


def test_edges_of_the_rules():
  """By hand: Lingvo's 4 where the share is 0; Mesh never more than the group; never less than 1."""
  assert expert_capacity("lingvo", 4, 8, 1, 1.25) == 4
  assert expert_capacity("mesh", 6, 8, 1, 16.0) == 6
  assert expert_capacity("vmoe_paper", 4, 32, 1, 1.0) == 1


def test_minimum_replaces_the_rules_own():
  assert expert_capacity("flaxformer", 10, 4, 1, 1.0, minimum=1) == 2
  assert expert_capacity("megablocks", 10, 4, 1, 1.0, minimum=6) == 6


def test_mistakes():
  with pytest.raises(UserError, match="did you mean 'lingvo'"):
    expert_capacity("linvgo", 10, 4, 1, 1.0)
  with pytest.raises(UserError, match="capacity_factor=0 leaves no slots"):
    expert_capacity("mesh", 10, 4, 1, 0)
