"""Exceptions for mistakes a user can mend and for a training that was stopped; exit codes of commands."""

import difflib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import Any

from sparse_experts import full_disk, interrupts, terminal


class UserError(ValueError):
  """A mistake in a command, config or input: the command line prints it as one line and exits with 2.

  The message names the thing, its value and the way out.
  """


class Stopped(SystemExit):
  """SIGTERM or SIGHUP ended a training, after what was trained is saved: 143 or 129, as of a shell."""

  def __init__(self, name: str):
    super().__init__(128 + signal.Signals[name])


def call(path: str, what: str, f: Callable[[], Any]) -> Any:
  """f(), where an exception of a user's file becomes a UserError with the file's line."""
  try:
    return f()
  except UserError:
    raise
  except Exception as e:
    frames = traceback.extract_tb(sys.exc_info()[2])
    lines = [frame.lineno for frame in frames if os.path.abspath(frame.filename) == os.path.abspath(path)]
    line = e.lineno if isinstance(e, SyntaxError) else lines[-1] if lines else None
    place = f"{path}:{line}" if line else path
    raise UserError(f"{place}: {what} raised {type(e).__name__}: {e}; mend the file") from e


def exit_code(go: Callable[[], int | None], interrupted: str = "interrupted", forgiving: bool = False) -> int:
  """Exit code of a command: what `go()` returns (None: 0), 2 after a UserError or on a full disk, 130 if
  interrupted.

  Messages that cannot be written are lost. So are results if `forgiving`; else the command ends: with 141 if
  the reader of a pipe has left, otherwise as after a UserError.
  """
  with terminal.guarded(forgiving):
    try:
      code = go() or 0
      sys.stdout.flush()
      interrupts.check()
      return code
    except (Exception, KeyboardInterrupt) as e:
      if isinstance(e, KeyboardInterrupt) or interrupts.asked():
        interrupts.arrived()
        terminal.tell(interrupted)
        return interrupts.CODE
      if isinstance(e, terminal.Lost) and e.closed:
        return terminal.BROKEN_PIPE
      if isinstance(e, OSError) and full_disk.is_full(e):
        e = UserError(f"no space left on the disk of {e.filename or 'what was written'}; make room and run "
                      "the same command again")
      elif isinstance(e, OSError) and "://" in str(e.filename):  # of a store, wherever it was met
        e = UserError(f"{e.filename}: {e.strerror}; mend that and run the same command again")
      if not isinstance(e, UserError | terminal.Lost):
        raise
      terminal.tell("error: " + " ".join(str(e).split()))
      return 2


def nearest(name: str, known: Iterable[str]) -> str:
  """'; did you mean X?' for the closest known name, else '; known: A, B, C', or none."""
  known = sorted(known)
  close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
  return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(known) or 'none'}"
