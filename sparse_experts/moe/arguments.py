"""Checks of arguments: an error names the argument, its value and the way out."""

from collections.abc import Collection
from typing import Any

from sparse_experts.errors import UserError, nearest


def check(holds: bool, name: str, value: Any, problem: str) -> None:
  """Raises UserError "NAME=VALUE PROBLEM" unless it holds; name: the config key."""
  if not holds:
    raise UserError(f"{name}={value} {problem}")


def check_known(name: str, value: str, known: Collection[str]) -> None:
  """Raises UserError, with the nearest name or all of them, unless `value` is among `known`."""
  check(value in known, name, f"'{value}'", f"is unknown{nearest(value, known)}")


def check_divides(name: str, value: int, num_experts: int) -> None:
  """Raises UserError unless the experts can be divided into that many equal parts."""
  check(value >= 1 and num_experts % value == 0, name, value,
        f"does not divide num_experts={num_experts}; choose a divisor")


def check_k(k: int, num_experts: int) -> None:
  """Raises UserError unless a token can choose k different experts."""
  check(1 <= k <= num_experts, "router.k", k,
        f"is not between 1 and num_experts={num_experts}; lower k or add experts")
