"""The ledger of claims as one HTML page: verdicts, intervals as pictures, and every figure behind them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sparse_experts.report import page

REACH = 6.0  # deltas that a picture shows on each side
_HALF = 200  # half the width of a picture, in its own units
_EDGE = 2


def render(papers: Sequence[Mapping[str, Any]], summary: str) -> str:
  """The page. A paper: name, paper (author, year, number) and its claims, each what `claim` makes."""
  return page.fill("ledger.html", papers=papers, summary=summary, reach=f"{REACH:g}")


def claim(name: str, fixed: Mapping[str, Any], result: Mapping[str, Any] | None, verdict: str, ours: str,
          facts: Sequence[tuple[str, str]]) -> dict[str, Any]:
  """What the template shows of a claim. result: its newest one; verdict, ours, facts: in words."""
  figures = {} if result is None else result.get("figures", {})
  return {"name": name, "statement": fixed["statement"], "published": fixed["published"], "verdict": verdict,
          "ours": ours, "facts": facts, "sign": fixed.get("sign", 0),
          "bar": bar(result, fixed["delta"]) if result and "mean" in result else None,
          "figures": _by_seed(figures) if isinstance(figures, Mapping) else _published(figures)}


def bar(result: Mapping[str, Any], delta: float) -> dict[str, Any]:
  """Where the parts of an interval's picture lie. The mean is None where it lies beyond the picture."""
  low, high = result["interval"]
  place = lambda value: round(_HALF + min(max(value / delta / REACH, -1.0), 1.0) * (_HALF - _EDGE), 1)
  inside = abs(result["mean"]) <= REACH * delta
  return {"low": place(low), "high": place(high), "mean": place(result["mean"]) if inside else None,
          "band": (place(-delta), place(delta)), "beyond_low": low < -REACH * delta,
          "beyond_high": high > REACH * delta,
          "label": f"mean {result['mean']:.4g}, 95% from {low:.4g} to {high:.4g}, delta {delta:g}"}


def _by_seed(figures: Mapping[str, Mapping[str, float | None]]) -> dict[str, Any]:
  arms = list(figures)
  seeds = list(dict.fromkeys(seed for of in figures.values() for seed in of))
  return {"head": ["seed", *arms],
          "rows": [[seed, *(_figure(figures[arm].get(seed)) for arm in arms)] for seed in seeds]}


def _published(figures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  keys = ("published", "ours", "low", "high")
  return {"head": ["number", *keys],
          "rows": [[of["name"], *(_figure(of[key]) for key in keys)] for of in figures]}


def _figure(value: float | None) -> str:
  return "diverged" if value is None or not math.isfinite(value) else f"{value:.5g}"
