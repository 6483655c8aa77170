"""python -m sparse_experts VERB ..."""

import logging
import sys
import traceback
from typing import Any

from sparse_experts import processes
from sparse_experts.cli import main


def _unraisable(what: Any) -> None:
  """Where one array of a save cannot be written, each of the others would end in a traceback of its own."""
  if str(what.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(what)


if __name__ == "__main__":
  # The process is ours alone, and prints its own lines: orbax's report every file, and a full disk in 200.
  for name in ("absl", "asyncio"):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  sys.unraisablehook = _unraisable
  try:
    code = main(sys.argv[1:])
  except Exception:
    traceback.print_exc()
    code = 1
  if code:
    processes.leave(code)
  sys.exit(code)
