"""python -m sparse_experts VERB ..."""

import sys

from sparse_experts.cli import main

if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
