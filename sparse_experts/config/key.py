"""What is known of one config key. `keys_model.py` and `keys_run.py` have a row for each."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from sparse_experts.errors import UserError, nearest

# What a key affects.
RESULT = "result"  # also what given weights compute
TRAINING = "training"  # the weights, or which tokens are dropped; not what given weights compute dropless
SPEED = "speed"  # time or memory; the result is the same
PLACE = "place"  # where a run computes and where its files are
LOG = "log"  # what a run writes, and when
# What may set a key anew that was trained otherwise.
RESUME, EVALUATE, CONVERT = "resume", "evaluate", "convert"
_ALWAYS = {RESUME: (SPEED, PLACE, LOG), EVALUATE: (PLACE,), CONVERT: (PLACE, LOG)}

# `within`, as messages say it -> whether a number is.
RANGES: dict[str, Callable[[float], bool]] = {
    "0 or more": lambda x: 0 <= x < math.inf,
    "1 or more": lambda x: 1 <= x < math.inf,
    "2 or more": lambda x: 2 <= x < math.inf,
    "-1000 or more": lambda x: -1000 <= x < math.inf,
    "from 0 to below 1": lambda x: 0 <= x < 1,
    "from above 0 to below 1": lambda x: 0 < x < 1,
    "above 0 to 1": lambda x: 0 < x <= 1,
    "above 0 to 1 (no crop)": lambda x: 0 < x <= 1,
    "0 to 1": lambda x: 0 <= x <= 1,
    "2 to 16": lambda x: 2 <= x <= 16,
    "0 to 30": lambda x: 0 <= x <= 30,
}


INT32 = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Key:
  """One key. Its name ends in the constructor argument that it feeds.

  default: a value, or a type: not set (None), which means the default of what the key feeds.
  choices: the names it takes. open_to: a form that is welcome besides, which has a colon.
  within: one of RANGES, for a number. most: its upper bound, which messages give where it is another one.
  also: RESUME, EVALUATE or CONVERT, where those may set it anew in spite of what it affects.
  """

  name: str
  default: Any
  meaning: str
  affects: str = RESULT
  choices: tuple[str, ...] = ()
  open_to: str = ""
  within: str = ""
  most: int = INT32
  also: tuple[str, ...] = ()

  @property
  def value(self) -> Any:
    """The value that the default config has: None where none is set."""
    return None if self.is_unset else self.default

  @property
  def range(self) -> str:
    """The numbers that it takes in words; empty for what is no number."""
    return self.within + (f", at most {self.most:,}" if self.most != INT32 else "")

  @property
  def type(self) -> type:
    return self.default if self.is_unset else type(self.default)

  @property
  def is_unset(self) -> bool:
    return isinstance(self.default, type)

  @property
  def may_change(self) -> tuple[str, ...]:
    """Which of RESUME, EVALUATE and CONVERT may set it anew."""
    return tuple(by for by, affects in _ALWAYS.items() if self.affects in affects or by in self.also)

  def check(self, value: Any) -> None:
    """Refuses a value, None aside, that is none of the choices or out of range."""
    if value is None:
      return
    if self.choices and value not in self.choices and not (self.open_to and ":" in value):
      way_out = nearest(value, self.choices) + (f" or give {self.open_to}" if self.open_to else "")
      raise UserError(f"{self.name}='{value}' is unknown{way_out}")
    if self.within and not (RANGES[self.within](value) and value <= self.most):
      at_most = f", at most {self.most:,}" if value > self.most else ""
      raise UserError(f"{self.name}={value} is out of range; choose {self.within}{at_most}")
