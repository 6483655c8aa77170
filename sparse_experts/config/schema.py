"""All config keys, and what follows from their rows: defaults, checks, and what may be set anew."""

from typing import Any

from ml_collections import ConfigDict, config_dict

from sparse_experts.config import keys_model, keys_run
from sparse_experts.config.dotted import get
from sparse_experts.config.key import LOG, PLACE, RESULT, RESUME, Key

# {name: its row}, in the order of a config.
KEYS: dict[str, Key] = {key.name: key for key in (*keys_run.START, *keys_model.KEYS, *keys_run.DATA,
                                                  *keys_run.TRAIN, *keys_run.MESH)}
MAY_CHANGE_ON_RESUME = frozenset(name for name, key in KEYS.items() if RESUME in key.may_change)
# A sweep's cache and `compare` ignore these: two runs that differ in nothing else have the same result.
INCIDENTAL = frozenset(name for name, key in KEYS.items() if key.affects in (PLACE, LOG))
# What given weights compute, dropless, does not depend on these.
NOT_IN_OUTPUTS = frozenset(name for name, key in KEYS.items() if key.affects != RESULT)


def default_config() -> ConfigDict:
  """A small decoder-only language model with Switch routing on the embedded text; locked.

  Config files start from it. A key without a value is None.
  """
  config: dict[str, Any] = {}
  for key in KEYS.values():
    *sections, name = key.name.split(".")
    section = config
    for part in sections:
      section = section.setdefault(part, {})
    section[name] = config_dict.placeholder(key.default) if key.is_unset else key.default
  return ConfigDict(config).lock()


def may_change(by: str) -> tuple[str, ...]:
  """What RESUME, EVALUATE or CONVERT may set anew: names of keys, and whole sections as `mesh.`"""
  allowed = [name for name, key in KEYS.items() if by in key.may_change]

  def prefix(name):
    sections = (name[:i + 1] for i, letter in enumerate(name) if letter == ".")
    return next((s for s in sections if all(n in allowed for n in KEYS if n.startswith(s))), name)

  return tuple(dict.fromkeys(map(prefix, sorted(allowed, key=lambda name: name.startswith("model.")))))


def check_values(config: ConfigDict) -> None:
  """Refuses the first value that its key does not take."""
  for name, key in KEYS.items():
    key.check(get(config, name))
