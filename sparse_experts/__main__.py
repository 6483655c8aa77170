"""python -m sparse_experts VERB ..."""

import sys
import traceback

from sparse_experts import processes
from sparse_experts.cli import main

if __name__ == "__main__":
  try:
    code = main(sys.argv[1:])
  except Exception:
    traceback.print_exc()
    code = 1
  if code:
    processes.leave(code)
  sys.exit(code)
