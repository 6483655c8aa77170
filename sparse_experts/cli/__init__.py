"""The command line: `python -m sparse_experts VERB ...`, one file per verb.

A verb is a module with a docstring (its help), `add_flags(parser)` and `run(args)`. It imports jax and
what stands on jax inside `run`, after its arguments were understood: a mistake answers at once.
"""

import importlib
from collections.abc import Sequence
from types import ModuleType

from sparse_experts import host_memory, processes
from sparse_experts.cli import flags
from sparse_experts.errors import UserError, exit_code, nearest
from sparse_experts.version import versions

VERBS = ("train", "evaluate", "sample", "describe", "sweep", "compare", "trace", "compile", "benchmark",
         "convert", "report", "claim")
ALONE = ("describe", "compare", "compile", "report")  # verbs that need no device, so no other process either
MANY_STEPS = ("train", "evaluate", "sweep", "benchmark", "claim")


def main(argv: Sequence[str]) -> int:
  """Runs one command; returns its exit code: 0 done, 2 a user's mistake (one line on stderr).

  A verb may return its own, for a thing it could not do.
  """
  return exit_code(lambda: _run(argv))


def _run(argv: Sequence[str]) -> int | None:
  if not argv or argv[0] in ("-h", "--help", "help"):
    print(_usage())
    return 0
  if argv[0] == "--version":
    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    return 0
  verb, *rest = argv
  if verb not in VERBS:
    raise UserError(f"unknown verb '{verb}'{nearest(verb, VERBS)}")
  module = _module(verb)
  args = flags.parse(verb, module, rest)
  if args is None:
    return 0
  if verb in MANY_STEPS:
    host_memory.keep()
  if verb not in ALONE:
    processes.join()
  return module.run(args)


def _module(verb: str) -> ModuleType:
  return importlib.import_module(f"sparse_experts.cli.{verb}")


def _usage() -> str:
  lines = ["usage: python -m sparse_experts VERB [--flag=value ...]", ""]
  lines += [f"  {verb:<10} {flags.summary(_module(verb))}" for verb in VERBS]
  lines += ["", "`python -m sparse_experts VERB --help` shows a verb's flags and an example,",
            "`python -m sparse_experts --version` the versions of the package, jax and Python."]
  return "\n".join(lines)
