"""python -m sparse_experts VERB ..."""

import contextlib
import io
import logging
import os
import signal
import sys
import traceback
from typing import Any

from sparse_experts import interrupts, processes, terminal


def quiet_unraisable() -> None:
  """Where one array of a save cannot be written, each of the others would end in a traceback of its own."""
  others = sys.unraisablehook  # that of Ctrl-C

  def hook(what: Any) -> None:
    if str(what.exc_value) != "Event loop is closed":
      others(what)

  sys.unraisablehook = hook


def run() -> int:
  """Runs the command line; returns its exit code, 1 for a fault of ours."""
  try:
    from sparse_experts import cli

    # The process is ours alone, and prints its own lines: orbax's report every file, and a full disk in 200;
    # gcsfs ends each request that it gives up in a traceback.
    for name in ("absl", "asyncio", "gcsfs"):
      logging.getLogger(name).setLevel(logging.CRITICAL)
    quiet_unraisable()
    code = cli.main(sys.argv[1:])
  except (Exception, KeyboardInterrupt) as e:
    if isinstance(e, KeyboardInterrupt) or interrupts.asked():  # while it was imported
      interrupts.arrived()
      terminal.tell("interrupted")
      return interrupts.CODE
    with contextlib.suppress(OSError, ValueError):
      traceback.print_exc()
    code = 1
  if code:
    processes.leave(code)
  return code


if __name__ == "__main__":
  terminal.open_closed_streams()
  if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may lack a letter: it is escaped then
    sys.stdout.reconfigure(errors="backslashreplace")
  interrupts.listen()
  code = run()
  signal.signal(signal.SIGINT, lambda *_: os._exit(code))  # all is done but what libraries do at the exit
  if code == interrupts.CODE:  # it may have interrupted a library that its exit relies on
    terminal.flush()
    os._exit(code)
  sys.exit(code)
