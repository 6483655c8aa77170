"""Keys by their dotted names: `model.router.k`."""

import copy
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict


def paths(config: ConfigDict, prefix: str = "") -> Iterator[str]:
  """Dotted names of all keys that hold a value."""
  for name in config:
    if isinstance(config[name], ConfigDict):
      yield from paths(config[name], f"{prefix}{name}.")
    else:
      yield prefix + name


def get(config: ConfigDict, key: str) -> Any:
  """The value or section of that name."""
  for part in key.split("."):
    config = config[part]
  return config


def flat(config: ConfigDict, leave_out: Collection[str] = ()) -> dict[str, Any]:
  """{dotted key: value} of all keys but `leave_out`; tuples as lists, as JSON has them."""
  found = {key: get(config, key) for key in paths(config) if key not in leave_out}
  return {key: list(value) if isinstance(value, tuple | list) else value for key, value in found.items()}


def differences(a: ConfigDict, b: ConfigDict, leave_out: Collection[str] = ()) -> dict[str, list]:
  """{key: [value in a, value in b]} of all keys that differ or are in one only."""
  one, other = flat(a, leave_out), flat(b, leave_out)
  keys = sorted(one.keys() | other.keys())
  return {key: [one.get(key), other.get(key)] for key in keys if one.get(key) != other.get(key)}


def replaced(config: ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
  """A copy of `config` with these keys set; locked."""
  config = copy.deepcopy(config).unlock()  # ConfigDict(config) would share its sections
  config.update_from_flattened_dict(overrides)
  return config.lock()
