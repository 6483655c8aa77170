"""--config.a.b=value: sets keys of a config from text, by the types the keys have."""

import ast
import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ml_collections import ConfigDict

from sparse_experts.config import KEYS, paths, trust
from sparse_experts.errors import UserError

PREFIX = "--config."
# What people call a key elsewhere.
_ELSEWHERE = {
  "lr": "optimizer.learning_rate", "batch": "train.batch_size", "bs": "train.batch_size",
  "wd": "optimizer.weight_decay", "warmup": "optimizer.warmup_steps", "max_steps": "train.steps",
  "num_steps": "train.steps", "experts": "model.num_experts", "n_experts": "model.num_experts",
  "top_k": "model.router.k", "layers": "model.num_layers", "d_model": "model.embed_dim",
  "router": "model.router.name", "model": "model.name", "optimizer": "optimizer.name", "data": "data.source",
  "dataset": "data.source", "seq_len": "data.length"}
_TRUTH = {"true": True, "1": True, "false": False, "0": False}


def split(argv: Sequence[str]) -> tuple[list[tuple[str, str | None]], list[str]]:
  """Takes --config.KEY=VALUE, --config.KEY VALUE and --config.KEY out of argv: [(key, text)], the rest."""
  overrides: list[tuple[str, str | None]] = []
  rest = list(argv)
  for i in reversed(range(len(rest))):
    if not rest[i].startswith(PREFIX):
      continue
    key, equals, text = rest.pop(i).removeprefix(PREFIX).partition("=")
    has_next = i < len(rest) and not rest[i].startswith("--")
    overrides.append((key, text if equals else rest.pop(i) if has_next else None))
  return overrides[::-1], rest


def check_once(pairs: Iterable[tuple[str, str | None]]) -> None:
  """Refuses a flag that is given two values, of which one would be ignored."""
  given: dict[str, str | None] = {}
  for flag, text in pairs:
    if given.setdefault(flag, text) != text:
      one, other = ("nothing" if value is None else f"'{value}'" for value in (given[flag], text))
      raise UserError(f"{flag} is given twice, as {one} and as {other}; leave one of them out")


def key_meant(flag: str) -> str | None:
  """The key that a flag without --config. stands for: `--train.steps`, `--steps` and `--lr` have one."""
  name = flag.lstrip("-").replace("-", "_").removeprefix("config.")
  if name in KEYS:
    return name
  if name in _ELSEWHERE:
    return _ELSEWHERE[name]
  # Of several keys with that ending the shortest: the encoder's, where an encoder-decoder has two.
  return min((key for key in KEYS if key.endswith(f".{name}")), key=len, default=None)


def override(config: ConfigDict, key: str, text: str | None) -> None:
  """Sets config.KEY; without a text a key that is true or false becomes true."""
  *sections, name = key.split(".")
  section = config
  trust(text or "")
  for depth, part in enumerate(sections):
    if part not in section:
      raise UserError(f"unknown config key '{key}'{_nearest(config, key, sections[:depth], section)}")
    section = section[part]
    if not isinstance(section, ConfigDict):
      above = ".".join(sections[: depth + 1])
      raise UserError(f"--config.{key}: '{above}' is a value, not a section; write --config.{above}=VALUE")
  if name not in section and sections[-1:] == ["router"] and text is not None:
    with section.unlocked():  # an argument of some router; the router refuses what it lacks
      section[name] = _literal(text)
    return
  if name not in section:
    raise UserError(f"unknown config key '{key}'{_nearest(config, key, sections, section)}")
  if isinstance(section[name], ConfigDict):
    raise UserError(f"--config.{key} is a section, not a value; set one of its keys: "
                    + ", ".join(f"{key}.{k}" for k in sorted(section[name])))
  section[name] = _parse(key, section.get_type(name), text, section[name])


def _parse(key, kind, text, old):
  wanted, convert, example = _KINDS.get(kind, ("a Python literal", ast.literal_eval, "1"))
  if text is None and kind is bool:
    return True
  if (text or "").lower() == "none" and key in KEYS and KEYS[key].is_unset:
    return None
  try:
    if text is None:
      raise ValueError
    return convert(text)
  except (ValueError, SyntaxError, KeyError):
    got = "nothing" if text is None else f"'{text}'"
    example = example if old in (None, ()) else show(old)
    raise UserError(f"--config.{key} wants {wanted}, got {got}; write for example "
                    f"--config.{key}={example}") from None


def _literal(text: str) -> object:
  """A number, (1, 2), true, false or none; anything else is text."""
  words = {"true": True, "false": False, "none": None}
  try:
    return words[text.lower()] if text.lower() in words else ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


def _ints(text: str) -> tuple[int, ...]:
  inner = text.strip().strip("()[]").strip().rstrip(",")
  return tuple(int(item) for item in inner.split(",")) if inner else ()


# type -> what a message calls it, how text becomes it, an example
_KINDS: dict[type, tuple[str, Callable[[str], Any], str]] = {
  bool: ("true or false", lambda text: _TRUTH[text.lower()], "true"),
  int: ("a whole number", int, "1"),
  float: ("a number", float, "0.5"),
  str: ("text", str, "name"),
  tuple: ("whole numbers with commas between them", _ints, "1,3"),
}


def show(value: Any) -> str:
  """A value as text of --config.KEY=."""
  return ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def _nearest(config: ConfigDict, key: str, where: Sequence[str], section: ConfigDict) -> str:
  """'; did you mean PATH?': a key of the same name elsewhere, else one spelt alike; else what is there."""
  known = list(paths(config))
  if key in _ELSEWHERE:
    return f"; did you mean '{_ELSEWHERE[key]}'?"
  namesakes = [path for path in known if path.split(".")[-1] == key.split(".")[-1]]
  alike = difflib.get_close_matches(key, namesakes or known, n=1, cutoff=0.0 if namesakes else 0.6)
  if alike:
    return f"; did you mean '{alike[0]}'?"
  return f"; {'.'.join(where) or 'the config'} has {', '.join(sorted(section))}"
