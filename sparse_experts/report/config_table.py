"""The config of a run as rows: what differs from the default, what each key means, and foreign keys."""

import json
import os
from typing import Any

from ml_collections import ConfigDict

from sparse_experts.config import KEYS, default_config, flat, from_json, layer_field, read_config
from sparse_experts.errors import UserError
from sparse_experts.small_files import read_json


def read(workdir: str) -> tuple[ConfigDict, dict[str, Any], list[str]]:
  """(config, {key: value} that this version does not know, keys that config.json lacks).

  Raises UserError where `config.read_config` does for other reasons than an unknown key.
  """
  path = os.path.join(workdir, "config.json")
  try:
    config: ConfigDict | None = read_config(workdir)
    refused = None
  except UserError as e:
    config, refused = None, e
  try:
    saved = read_json(path, "restore it")
  except (FileNotFoundError, UserError):
    raise refused or UserError(f"{path} is changed while it is read; try again") from None
  unknown: dict[str, Any] = {}
  if config is None:
    config = from_json(json.dumps(_known(default_config(), saved, "", unknown)), path)
  written = _paths(saved, "")
  return config, unknown, [key for key in KEYS if key not in written]


def _known(config: ConfigDict, saved: dict[str, Any], prefix: str, unknown: dict[str, Any]) -> dict[str, Any]:
  """`saved` without the keys that a config does not have; those go to `unknown`. Routers may add keys."""
  kept = {}
  for name, value in saved.items():
    if name not in config and not prefix.endswith("router."):
      unknown[prefix + name] = value
    elif isinstance(value, dict) and isinstance(config.get(name), ConfigDict):
      kept[name] = _known(config[name], value, f"{prefix}{name}.", unknown)
    else:
      kept[name] = value
  return kept


def _paths(saved: dict[str, Any], prefix: str) -> set[str]:
  found: set[str] = set()
  for name, value in saved.items():
    if isinstance(value, dict):
      found |= _paths(value, f"{prefix}{name}.")
    else:
      found.add(prefix + name)
  return found


def rows(config: ConfigDict, unknown: dict[str, Any]) -> list[dict[str, Any]]:
  """A row per key: key, value and default as text, whether they differ, and the schema's meaning."""
  defaults, values = flat(default_config()), flat(config)
  table = [{"key": key, "value": show(value), "default": show(defaults.get(key)),
            "differs": value != defaults.get(key), "affects": KEYS[key].affects if key in KEYS else "",
            "meaning": KEYS[key].meaning if key in KEYS else "an argument of the router"}
           for key, value in values.items()]
  table += [{"key": key, "value": show(value), "default": "", "differs": True, "affects": "",
             "meaning": "unknown to this version of sparse_experts"} for key, value in unknown.items()]
  return table


def show(value: Any) -> str:
  """A value as a reader would write it; text may be long."""
  if value is None:
    return "unset"
  if isinstance(value, str):
    return value if value else "''"
  if isinstance(value, float):
    return f"{value:.10g}"
  return json.dumps(list(value) if isinstance(value, tuple) else value)


def experts_of(config: ConfigDict, layer: str) -> tuple[int, int]:
  """(number of experts, experts per token that the config sets; 1 if it leaves that to the router)."""
  number, k = (layer_field(config, layer, name) for name in ("num_experts", "router.k"))
  return int(number or 0), int(k or 1)
