"""Ctrl-C of a command: the first raises KeyboardInterrupt, wherever it is; the second ends the process."""

import contextlib
import os
import signal
import sys
import threading
from types import FrameType

CODE = 130
_listening = _asked = _swallowed = _arrived = False


def listen() -> None:
  """Handles Ctrl-C from here on, in the main thread of a process that is ours alone.

  Left alone where the shell has it ignored, as of a command in the background of a script.
  """
  global _listening
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _handle)
    sys.unraisablehook = _unraisable
    _listening = True


def note() -> None:
  """Counts a Ctrl-C that somebody else handles: the next is the second."""
  global _asked
  _asked = _listening


def asked() -> bool:
  """Whether Ctrl-C was pressed: any error after it may be what a library made of it."""
  return _asked


def check() -> None:
  """Raises KeyboardInterrupt if an earlier one was swallowed, as libraries do that catch everything."""
  if _asked:
    raise KeyboardInterrupt


def arrived() -> None:
  """The KeyboardInterrupt has reached the command, which ends: it is not raised again."""
  global _arrived
  _arrived = _listening


def _handle(number: int, frame: FrameType | None) -> None:
  global _asked, _swallowed
  if _arrived and _swallowed:
    _swallowed = False
    return
  if _asked and not _swallowed:
    with contextlib.suppress(OSError):
      os.write(2, b"interrupted again: ended at once\n")  # a print may be under way
    os._exit(CODE)
  _asked, _swallowed = True, False
  raise KeyboardInterrupt


def _press() -> None:
  main = threading.main_thread().ident
  if main is not None:
    signal.pthread_kill(main, signal.SIGINT)  # a real signal: the thread may wait for something


def _unraisable(what: "sys.UnraisableHookArgs") -> None:
  """Where Python ignores exceptions, as in callbacks of the garbage collector, Ctrl-C is raised once more."""
  global _swallowed
  if what.exc_type is not None and issubclass(what.exc_type, KeyboardInterrupt):
    _swallowed = True
    again = threading.Timer(0.01, _press)  # raised here and now it would be ignored too
    again.daemon = True
    again.start()
  else:
    sys.__unraisablehook__(what)
