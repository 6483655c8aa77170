"""Flags the verbs share: --config=FILE[:arg], --workdir=DIR and --config.a.b=value overrides.

Not absl's flags: they print several lines for a mistake, and `evaluate` overrides a config that comes
from a work directory rather than from a file.
"""

import argparse
import ast
import copy
import difflib
import inspect
import json
import math
import textwrap
from collections.abc import Callable, Container, Iterable, Sequence
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from sparse_experts import terminal
from sparse_experts.cli import overrides, router_change
from sparse_experts.config import flat, load_config
from sparse_experts.config import read_config as read_config_of_run
from sparse_experts.config.key import INT32
from sparse_experts.errors import UserError, nearest
from sparse_experts.validation import validate


class Parser(argparse.ArgumentParser):
  """argparse that raises UserError instead of printing its usage and leaving."""

  def error(self, message: str):
    raise UserError(message.removeprefix("argument "))


def parse(verb: str, module: ModuleType, argv: Sequence[str]) -> argparse.Namespace | None:
  """The verb's flags, with `overrides` as a list of (key, text); None when help was asked for."""
  parser = Parser(
      prog=f"python -m sparse_experts {verb}", description=doc(module), allow_abbrev=False,
      epilog="--config.KEY=VALUE overrides a key of the config, for example --config.train.steps=100.",
      formatter_class=argparse.RawDescriptionHelpFormatter)
  module.add_flags(parser)
  if "-h" in argv or "--help" in argv:
    print(parser.format_help())
    return None
  keys, rest = overrides.split(argv)
  overrides.check_once((f"--config.{key}", text) for key, text in keys)
  args, unknown = parser.parse_known_intermixed_args(rest)
  if unknown and unknown[0].startswith("-"):
    raise UserError(f"unknown flag '{unknown[0].partition('=')[0]}' of {verb}{_flag_meant(unknown, parser)}")
  known = parser._option_string_actions
  overrides.check_once((flag, text) for flag, text in _given(rest) if flag in known)
  if unknown:
    raise UserError(f"unexpected '{unknown[0]}' after {verb}; flags are written --name=value")
  args.verb, args.overrides = verb, keys
  return args


def _given(argv: Sequence[str]) -> Iterable[tuple[str, str | None]]:
  """(flag, its value) of --flag=value and --flag value."""
  for i, text in enumerate(argv):
    if text.startswith("--"):
      flag, equals, value = text.partition("=")
      following = argv[i + 1] if i + 1 < len(argv) and not argv[i + 1].startswith("--") else None
      yield flag, value if equals else following


def _flag_meant(unknown: Sequence[str], parser: Parser) -> str:
  """'; did you mean FLAG?': one of the verb's that is spelt alike, or a key of the config."""
  (flag, equals, value), known = unknown[0].partition("="), parser._option_string_actions
  key = overrides.key_meant(flag) if parser.epilog else None  # without it the verb takes no overrides
  if key is None or difflib.get_close_matches(flag, known, n=1, cutoff=0.8):
    return nearest(flag, known)
  following = unknown[1] if len(unknown) > 1 and not unknown[1].startswith("-") else "VALUE"
  return f"; did you mean --config.{key}={value if equals else following}?"


def summary(of: ModuleType | type) -> str:
  """The first line of a docstring."""
  return doc(of).partition("\n")[0]


def doc(of: ModuleType | type) -> str:
  """A docstring; from the source file where `python -OO` left it out."""
  if found := inspect.getdoc(of):
    return found
  tree = ast.parse(textwrap.dedent(inspect.getsource(of)))
  node = tree if isinstance(of, ModuleType) else tree.body[0]
  return ast.get_docstring(node) or "" if isinstance(node, ast.Module | ast.ClassDef) else ""


def spelled(args: argparse.Namespace) -> dict[str, Any]:
  """{the verb, flags and overrides: their values}, of those that are set."""
  given = {f"--{name}": value for name, value in vars(args).items() if value not in (None, False)}
  overrides = {f"--config.{key}": text for key, text in given.pop("--overrides")}
  return {"the verb": given.pop("--verb"), **given, **overrides}


def add_config(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--config", metavar="FILE[:ARG]",
                      help="config file, one of the package: smoke.py, or a run's config.json")


def add_workdir(parser: argparse.ArgumentParser, what: str) -> None:
  parser.add_argument("--workdir", metavar="DIR", help=what)


def add_run(parser: argparse.ArgumentParser) -> None:
  """The flags of a verb that reads a trained run."""
  add_workdir(parser, "folder of a trained run")
  parser.add_argument("--step", metavar="N", type=at_least(0), help="checkpoint; default: the newest")


def add_json(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--json", action="store_true", help="last line of the output is one JSON object")


def print_json(args: argparse.Namespace, result: Any) -> None:
  """The last line of the output, where --json asks for it."""
  if args.json:
    print(json.dumps(result))


def at_least(low: int | float, most: int = INT32) -> Callable[[str], int | float]:
  """An argparse type: a number of the type of `low`, not below it, and at most `most`."""
  kind = type(low)

  def convert(text):
    try:
      value = kind(text)
    except ValueError:
      value = math.nan
    if not low <= value <= most:
      name = "whole number" if kind is int else "number"
      bound = f"at most {most:,}" if value > most else f"at least {low}"
      raise argparse.ArgumentTypeError(f"wants a {name} of {bound}, got '{text:.50}'")
    return value

  return convert


def need(args: argparse.Namespace, flag: str, example: str) -> str:
  """The value of a flag the verb cannot do without."""
  value = getattr(args, flag)
  if not value:
    raise UserError(f"{args.verb} needs --{flag}; write for example --{flag}={example}")
  return value


def one_of(flag: str, value: str | None, known: Iterable[str]) -> None:
  """Refuses the value of a flag that is none of `known`."""
  if value is not None and value not in known:
    raise UserError(f"--{flag}={value} is unknown{nearest(value, known)}")


def whole_numbers(flag: str, text: str, why: str, example: str, low: int = 0) -> list[int]:
  """The numbers of a flag that takes several, with commas between them, in ascending order."""
  if not all(n.isdecimal() and int(n) >= low for n in text.split(",")):
    raise UserError(f"--{flag}={text} {why}; write for example --{flag}={example}")
  return sorted({int(n) for n in text.split(",")})


def may_only_change(args: argparse.Namespace, keys: Sequence[str], why: str,
                    repeated: Container[str] = ()) -> None:
  """Refuses overrides of keys that begin with none of `keys`: of all keys if there are none.

  repeated: keys whose override is the value that they had.
  """
  shown = ", ".join(key + "*" if key.endswith(".") else key for key in keys)
  way_out = f"it may change {shown}" if keys else "leave the override out"
  for key, _ in args.overrides:
    if not key.startswith(tuple(keys)) and key not in repeated:
      raise UserError(f"--config.{key}: {why}; {way_out}")


def read_config(args: argparse.Namespace) -> ConfigDict:
  """The config of --config=FILE with its overrides, validated and locked.

  `args.notes` is what is to be said of it once it is known to work: a mistake is one line.
  """
  config = load_config(need(args, "config", "configs/smoke.py"))
  before = copy.deepcopy(config)
  override(args, config)
  args.notes = router_change.apply(config, before, [key for key, _ in args.overrides])
  validate(config)
  return config


def print_notes(args: argparse.Namespace) -> None:
  for line in args.notes:
    terminal.tell(line)


def override(args: argparse.Namespace, config: ConfigDict) -> None:
  """Sets the keys of the command line's overrides."""
  for key, text in args.overrides:
    overrides.override(config, key, text)


def read_run_config(args: argparse.Namespace, may_change: Sequence[str]) -> ConfigDict:
  """The config a run was trained with; only keys that begin with one of `may_change` can be overridden.

  Others can be repeated, which lets the code that they name be loaded.
  """
  config = read_config_of_run(need(args, "workdir", "runs/smoke"))
  kept = flat(config)
  override(args, config)
  now = flat(config)
  repeated = [key for key, _ in args.overrides if key in kept and kept[key] == now[key]]
  may_only_change(args, may_change, f"{args.verb} cannot change what was trained", repeated)
  validate(config)
  return config


def on_these_devices(args: argparse.Namespace, config: ConfigDict) -> ConfigDict:
  """The run's config on a mesh that there are devices for; one that the command line sets stays."""
  from sparse_experts.training.run import on_these_devices

  return config if any(key.startswith("mesh.") for key, _ in args.overrides) else on_these_devices(config)
