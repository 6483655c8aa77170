"""What the commands of all experiments share: help, mistakes on one line, exit codes."""

import argparse
import inspect
from collections.abc import Callable, Sequence

from sparse_experts import host_memory
from sparse_experts.cli.flags import Parser
from sparse_experts.errors import exit_code


def parser(name: str, description: str) -> Parser:
  """Of `python -m experiments.NAME`; description: the module's docstring."""
  return Parser(prog=f"python -m experiments.{name}", description=inspect.cleandoc(description),
                formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, add_help=False)


def main(parser: Parser, go: Callable[[argparse.Namespace], int | None], argv: Sequence[str]) -> int:
  """The exit code: that of `go(args)` (None: 0), 2 after a user's mistake, 130 if interrupted."""

  def run():
    if "-h" in argv or "--help" in argv:
      print(parser.format_help())
      return 0
    args = parser.parse_args(argv)
    host_memory.keep()
    return go(args)

  return exit_code(run, "interrupted; the same command resumes from here")
