"""Sources that are mixed: `data.source='mixture:NAME RATE SOURCE; NAME RATE SOURCE'`."""

import math
import re
from typing import NamedTuple

from sparse_experts.errors import UserError

HEAD = "mixture:"
PARTS = 1000  # rates are whole numbers of these
_EXAMPLE = "mixture:code 0.7 embedded; books 0.3 files:PATH"
# A name stands in front of its figures, where these mean something else.
_TAKEN = ("router", "final", "capacity", "rerouted", "few_shot")


class Component(NamedTuple):
  rate: float
  source: str


def parse(source: str) -> dict[str, Component]:
  """{name: its rate and source} of `data.source`, in order; empty if that is no mixture.

  Raises UserError for what is not NAME RATE SOURCE, a name twice, and rates that are no thousandths with a
  sum of 1.
  """
  if not source.startswith(HEAD):
    return {}
  found: dict[str, Component] = {}
  for item in _items(source):
    name, rate, its = [*item.split(None, 2), "", ""][:3] if item else ("", "", "")
    try:
      number = float(rate)
    except ValueError:
      number = math.nan
    if not its or number != number:
      raise _wrong(source, f"'{item}' is not NAME RATE SOURCE; write for example {_EXAMPLE}")
    if not re.fullmatch(r"[A-Za-z][\w-]*", name) or name in _TAKEN:
      raise _wrong(source, f"'{name}' is no name for figures; choose letters and digits, none of {_TAKEN}")
    if name in found:
      raise _wrong(source, f"'{name}' is there twice; choose another name")
    if its.startswith(HEAD):
      raise _wrong(source, f"'{name}' is a mixture itself; name its sources here")
    if not 0 < number <= 1 or abs(number * PARTS - round(number * PARTS)) > 1e-6:
      raise _wrong(source, f"{name} has rate {rate}; choose thousandths from 0.001 to 1")
    found[name] = Component(number, its)
  if (total := sum(round(of.rate * PARTS) for of in found.values())) != PARTS:
    raise _wrong(source, f"the rates sum to {total / PARTS:g}; make that 1")
  return found


def sources(source: str) -> list[str]:
  """The sources that a text names if it is a mixture, however wrong the rest of it is."""
  parts = [item.split(None, 2) for item in _items(source)] if source.startswith(HEAD) else []
  return [part[2] for part in parts if len(part) == 3]


def _items(source: str) -> list[str]:
  return [item.strip() for item in source.removeprefix(HEAD).split(";")]


def _wrong(source: str, why: str) -> UserError:
  return UserError(f"data.source='{source}': {why}")
