"""The ledger as a table: each claim, what was published, what we found, and how sure that is."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from sparse_experts.analysis.table import aligned
from sparse_experts.ledger import verdict
from sparse_experts.ledger.claim_file import Claim

HEAD = ("claim", "what is claimed", "published", "ours", "verdict", "seeds", "power", "minutes")
NOT_RUN = "not run"


def markdown(claims: Mapping[str, Claim]) -> str:
  """The table and a paragraph of what it amounts to."""
  rows = [row for claim in claims.values() for row in rows_of(claim)]
  return "\n\n".join([aligned([HEAD, *rows]), summary(claims)])


def rows_of(claim: Claim) -> Sequence[tuple[str, ...]]:
  """A row per scale that has a result; one row of a claim that has none."""
  about = (claim.name, claim.fixed["statement"], claim.fixed["published"])
  rows = []
  for scale, result in claim.newest_of_each.items():
    found = ours(claim, result), said(claim, result, scale)
    rows.append((*about, *found, *plan_of(claim, scale), f"{result['minutes']:g}"))
  if not rows:
    scale = next(iter(claim.fixed["scales"]), "")
    rows.append((*about, "", said(claim, None, scale), *plan_of(claim, scale), price(claim)))
  return rows


def ours(claim: Claim, result: Mapping[str, Any]) -> str:
  """The figure with its interval, in words."""
  if not claim.paired:
    return f"{result['inside']} of {result['of']} published numbers inside our intervals"
  if "mean" not in result:
    return result["why"]
  low, high = result["interval"]
  return f"{result['mean']:+.4g} ({low:+.4g} to {high:+.4g}) {claim.fixed['metric']}"


def said(claim: Claim, result: Mapping[str, Any] | None, scale: str) -> str:
  if result is None:
    return NOT_RUN if "cpu" in claim.fixed["scales"] else verdict.OUT_OF_REACH
  text = result["verdict"]
  if text == verdict.UNDERPOWERED and "why" not in result:
    text += f", {result['seeds_needed']} seeds would do"
  elif "why" in result:
    text += f": {result['why']}"
  return text if scale == "cpu" else f"{text} ({scale})"


def plan_of(claim: Claim, scale: str) -> tuple[str, str]:
  plan = claim.fixed["scales"].get(scale, {})
  return (str(len(plan["seeds"])), f"{plan['power']:.0%}") if "seeds" in plan else ("-", "-")


def price(claim: Claim) -> str:
  """What it would cost at each scale that is planned, minutes."""
  return "; ".join(f"{plan['minutes']:,g} on {scale}" for scale, plan in claim.fixed["scales"].items())


def summary(claims: Mapping[str, Claim]) -> str:
  """How many claims were tested, what became of them, and how many verdicts chance alone would make wrong."""
  found = [(claim, result) for claim in claims.values() for result in claim.newest_of_each.values()]
  counts = Counter(result["verdict"] for _, result in found)
  decided = sum(claim.paired and result["verdict"] != verdict.UNDERPOWERED for claim, result in found)
  words = ", ".join(f"{number} {name}" for name, number in counts.most_common())
  return (f"{len(claims)} claims, {len(found)} tested{': ' + words if words else ''}. Of {decided} verdicts "
          f"from paired seeds, at an error of 5% each, about {0.05 * decided:.1f} should be expected to be "
          "wrong even if every test's assumptions hold.")


def details(claim: Claim) -> str:
  """What `claim show` prints: all that is fixed, then each result with every figure."""
  lines = [f"{claim.name}: {claim.fixed['statement']}", *_lines(facts(claim.fixed))]
  for i, result in enumerate(claim.results):
    lines.append(f"result {i + 1}, {result['scale']}: {ours(claim, result)}: {result['verdict']}")
    lines += _lines(facts(result))
  return "\n".join(lines if claim.results else [*lines, f"{NOT_RUN} yet; it costs {price(claim)} minutes"])


def facts(of: Mapping[str, Any]) -> list[tuple[str, str]]:
  """(name, value in words) of all that is fixed, or of a result, but for what a heading says."""
  return [(key, _words(value)) for key, value in of.items() if key not in ("statement", "scale", "verdict")]


def _lines(facts: Sequence[tuple[str, str]]) -> list[str]:
  return [f"  {key}: {value}" for key, value in facts]


def _words(value: Any) -> str:
  if isinstance(value, Mapping):
    return "; ".join(f"{key} {_words(each)}" for key, each in value.items())
  if isinstance(value, Sequence) and not isinstance(value, str):
    return ", ".join(map(_words, value))
  return f"{value:.4g}" if isinstance(value, float) else str(value)
