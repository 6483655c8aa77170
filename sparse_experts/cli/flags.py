"""Flags the verbs share: --config=FILE[:arg], --workdir=DIR and --config.a.b=value overrides.

Not absl's flags: they print several lines for a mistake, and `evaluate` overrides a config that comes
from a work directory rather than from a file.
"""

import argparse
import copy
import difflib
import inspect
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from sparse_experts.cli import overrides, router_change
from sparse_experts.config import load_config
from sparse_experts.config import read_config as read_config_of_run
from sparse_experts.errors import UserError, nearest
from sparse_experts.validation import validate


class Parser(argparse.ArgumentParser):
  """argparse that raises UserError instead of printing its usage and leaving."""

  def error(self, message: str):
    raise UserError(message.removeprefix("argument "))


def parse(verb: str, module: ModuleType, argv: Sequence[str]) -> argparse.Namespace | None:
  """The verb's flags, with `overrides` as a list of (key, text); None when help was asked for."""
  parser = Parser(
      prog=f"python -m sparse_experts {verb}", description=inspect.getdoc(module), allow_abbrev=False,
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
  return (inspect.getdoc(of) or "").partition("\n")[0]


def add_config(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--config", metavar="FILE[:ARG]", help="config file, or one of the package: smoke.py")


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


def at_least(low: int | float) -> Callable[[str], int | float]:
  """An argparse type: a finite number of the type of `low`, not below it."""
  kind = type(low)

  def convert(text):
    try:
      value = kind(text)
    except ValueError:
      value = math.nan
    if not low <= value < math.inf:
      name = "whole number" if kind is int else "number"
      raise argparse.ArgumentTypeError(f"wants a {name} of at least {low}, got '{text}'")
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


def may_only_change(args: argparse.Namespace, keys: Sequence[str], why: str) -> None:
  """Refuses overrides of keys that begin with none of `keys`: of all keys if there are none."""
  shown = ", ".join(key + "*" if key.endswith(".") else key for key in keys)
  way_out = f"it may change {shown}" if keys else "leave the override out"
  for key, _ in args.overrides:
    if not key.startswith(tuple(keys)):
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
    print(line, file=sys.stderr, flush=True)


def override(args: argparse.Namespace, config: ConfigDict) -> None:
  """Sets the keys of the command line's overrides."""
  for key, text in args.overrides:
    overrides.override(config, key, text)


def read_run_config(args: argparse.Namespace, may_change: Sequence[str]) -> ConfigDict:
  """The config a run was trained with; only keys that begin with one of `may_change` can be overridden."""
  config = read_config_of_run(need(args, "workdir", "runs/smoke"))
  override(args, config)
  may_only_change(args, may_change, f"{args.verb} cannot change what was trained")
  validate(config)
  return config


def on_these_devices(args: argparse.Namespace, config: ConfigDict) -> ConfigDict:
  """The run's config on a mesh that there are devices for; one that the command line sets stays."""
  from sparse_experts.training.run import on_these_devices

  return config if any(key.startswith("mesh.") for key, _ in args.overrides) else on_these_devices(config)
