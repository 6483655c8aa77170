"""Stops a run on SIGTERM of a cloud that takes the machine, SIGHUP of a terminal that closes, or Ctrl-C.

A single process handles its own signals. Several must all stop after the same step, whichever of them got
the signal: JAX's preemption service handles SIGTERM and agrees on a step.
"""

import os
import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from sparse_experts import interrupts
from sparse_experts.errors import Stopped


class Interrupt:
  """Within `with`, signals are remembered; `asked(step)` after each step says why to stop, or None.

  Ctrl-C is remembered between `begin()` and `end()` only, while there are steps to lose; before, after and
  the second time its own handler is called. A signal that is ignored, as SIGHUP by nohup, stays ignored.

  After SIGTERM or SIGHUP the end of `with` calls the handler that the program had, if it had one, and raises
  `errors.Stopped`, as Ctrl-C raises KeyboardInterrupt: whoever trains in a loop must not go on with a run
  that is half trained.
  """

  def __init__(self):
    self._why: str | None = None
    self._stepping = False
    self._before: dict[int, Any] = {}  # what handled them

  def __enter__(self):
    if threading.current_thread() is not threading.main_thread():  # where Python allows no handlers
      return self
    alone = jax.process_count() == 1
    wanted = {signal.SIGHUP: self._note if alone else _as_sigterm}
    if alone:
      wanted |= {signal.SIGINT: self._note, signal.SIGTERM: self._note}
    for number, handler in wanted.items():
      if signal.getsignal(number) not in (signal.SIG_IGN, None):
        self._before[number] = signal.signal(number, handler)
    return self

  def __exit__(self, kind, *_):
    for number, handler in self._before.items():
      signal.signal(number, handler)
    if kind is None and self._why is not None and self._why != "SIGINT":
      if callable(handler := self._before.get(number := signal.Signals[self._why])):
        handler(number, None)
      raise Stopped(self._why)

  def begin(self) -> None:
    """The steps begin: from here on Ctrl-C waits for the end of one."""
    interrupts.check()
    self._stepping = True

  def end(self) -> None:
    """The steps are over, and saved or about to be."""
    self._stepping = False
    if self._why == "SIGINT":
      raise KeyboardInterrupt

  def _note(self, number: int, frame: FrameType | None) -> None:
    if number == signal.SIGINT and (self._why is not None or not self._stepping):
      before = self._before[number]
      (before if callable(before) else signal.default_int_handler)(number, frame)
    self._why = signal.Signals(number).name
    if number == signal.SIGINT:
      interrupts.note()

  def asked(self, step: int) -> str | None:
    if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
      self._why = "SIGTERM"
    return self._why


def _as_sigterm(number: int, frame: FrameType | None) -> None:
  os.kill(os.getpid(), signal.SIGTERM)
