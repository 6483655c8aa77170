"""Ending a run when it is asked to: SIGTERM, which a cloud sends before it takes a machine, or Ctrl-C.

One process looks at its own signals. Several must all stop after the same step, whichever of them was
asked: JAX's preemption service takes SIGTERM for itself and agrees on one.
"""

import signal
import threading

import jax
from jax.experimental import multihost_utils


class Interrupt:
  """Within `with`, signals are remembered; `asked(step)` after each step says why to stop, or None.

  A second Ctrl-C ends the program at once.
  """

  def __init__(self):
    self._why: str | None = None
    self._before: dict[int, object] = {}

  def __enter__(self):
    # Elsewhere than in the main thread Python allows no handlers.
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
