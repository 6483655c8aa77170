"""Tells how far an evaluation is: records done and time left, in the words of training's progress line."""

import math
import time
from collections.abc import Callable

from sparse_experts.training.metrics import clock

EVERY = 5.0  # seconds from line to line


class Countdown:
  """`countdown(done)` after each batch of `records` records, of which there are `passes`.

  The first batch of a pass compiles, so its time is left out of the speed. Lines go to `say`, one at most in
  EVERY seconds: a short evaluation has none.
  """

  def __init__(self, records: int, say: Callable[[str], None], passes: int = 1):
    self._records, self._say, self._passes = records, say, passes
    self._timed, self._seconds = 0, 0.0  # records whose time counts, and that time
    self._last, self._told = (0, math.nan), time.perf_counter()
    self._behind, self._name = 0, ""

  def start(self, name: str) -> "Countdown":
    """The next pass begins; `name`: what it evaluates."""
    self._behind += self._records if self._name else 0
    self._name, self._last = name, (0, math.nan)
    return self

  def __call__(self, done: int) -> None:
    now = time.perf_counter()
    before, then = self._last
    self._last = done, now
    if before:
      self._timed, self._seconds = self._timed + done - before, self._seconds + now - then
    if not self._timed or done >= self._records or now - self._told < EVERY:
      return
    self._told = now
    left, speed = self._records * self._passes - self._behind - done, self._timed / self._seconds
    self._say(f"{self._name} {done:,}/{self._records:,} records  {speed:,.0f} records/s  "
              f"{clock(left / speed)} left")
