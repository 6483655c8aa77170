"""python -m sparse_experts VERB ..."""

import io
import logging
import sys
import traceback

from sparse_experts import processes
from sparse_experts.cli import main

if __name__ == "__main__":
  # The process is ours alone, and prints its own lines: orbax's report every file, and a full disk in 200.
  for name in ("absl", "asyncio"):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may lack a letter: it is escaped then
    sys.stdout.reconfigure(errors="backslashreplace")
  try:
    code = main(sys.argv[1:])
  except Exception:
    traceback.print_exc()
    code = 1
  if code:
    processes.leave(code)
  sys.exit(code)
