"""Stops a run on SIGTERM, which a cloud sends before it takes a machine, or on Ctrl-C.

A single process handles its own signals. Several must all stop after the same step, whichever of them got
the signal: JAX's preemption service handles SIGTERM and agrees on a step.
"""

import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils


class Interrupt:
  """Within `with`, signals are remembered; `asked(step)` after each step says why to stop, or None.

  A second Ctrl-C ends the program at once.
  """

  def __init__(self):
    self._why: str | None = None
    self._before: dict[int, Any] = {}  # what handled them

  def __enter__(self):
    # Python allows handlers in the main thread only.
    if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
      self._before = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
    return self

  def __exit__(self, *_):
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _note(self, number: int, frame: object) -> None:
    if self._why is not None and number == signal.SIGINT:
      raise KeyboardInterrupt
    self._why = signal.Signals(number).name

  def asked(self, step: int) -> str | None:
    if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
      return "SIGTERM"
    return self._why
