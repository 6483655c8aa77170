"""config.json: what the folder of a run keeps of its config."""

import json
import os
from typing import Any

from ml_collections import ConfigDict

from sparse_experts import storage
from sparse_experts.config.code_names import note_saved
from sparse_experts.config.dotted import paths
from sparse_experts.config.schema import default_config
from sparse_experts.errors import UserError, nearest
from sparse_experts.small_files import Damaged, patiently, read_text

_RESTORE = "restore it or start in another work directory"

# {argument: {router: what it was}}, of arguments that a config.json lacks which is older than they are.
_BEFORE = {"scope": {"noisy_top_k": "group", "hierarchical": "group", "limoe": "group"}}


def to_json(config: ConfigDict) -> str:
  """What a work directory keeps as config.json; tuples become lists."""
  return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text: str, path: str = "config.json") -> ConfigDict:
  """The config that `to_json` wrote, locked; `path` is for messages. Routers may have added keys.

  Code that it names is not loaded before the user repeats the name (`config/code_names.py`).
  """
  config = default_config()
  try:
    saved = json.loads(text)
    if not isinstance(saved, dict):
      raise ValueError("not an object")
  except (ValueError, RecursionError) as e:
    raise Damaged(f"{path} is not a config ({e}); {_RESTORE}") from None
  _update(config, saved, "", path)
  for router, given in ((config.model.router, _at(saved, "model", "router")),
                        (config.model.decoder.router, _at(saved, "model", "decoder", "router"))):
    name = router.get("of") if router.name == "permuted" else router.name
    for argument, before in _BEFORE.items():
      if name in before and argument not in given:
        router[argument] = before[name]
  note_saved(config, path)
  return config.lock()


def check_config(config: Any) -> None:
  """Refuses what is no config, such as the name of a file."""
  if not isinstance(config, ConfigDict):
    way_out = f"give sparse_experts.load_config({config!r})" if isinstance(config, str) else (
        "start from sparse_experts.config.default_config()")
    raise UserError(f"config={config!r:.80} is of type {type(config).__name__}, not a ConfigDict; {way_out}")


def check_workdir(workdir: str) -> None:
  """Refuses an address where no run can be kept, and bytes that are no text, which messages cannot hold."""
  try:
    workdir.encode()
  except UnicodeEncodeError:
    raise UserError(f"workdir {workdir!r} is not UTF-8; choose another name") from None
  storage.check_keeps_runs(workdir, f"workdir {workdir}")


def read_config(workdir: str) -> ConfigDict:
  """The config of the run in `workdir`."""
  check_workdir(workdir)
  path = os.path.join(workdir, "config.json")
  way_out = "name the folder of a trained run"
  if not patiently(lambda: storage.is_folder(workdir), f"workdir {workdir}"):
    what = "is a file" if storage.exists(workdir) else "does not exist"
    raise UserError(f"workdir {workdir} {what}; {way_out}")
  try:
    return from_json(read_text(path, _RESTORE), path)
  except FileNotFoundError:
    raise UserError(f"workdir {workdir} has no config.json; {way_out}") from None


def _at(saved: dict, *sections: str) -> dict:
  for section in sections:
    saved = saved.get(section, {})
  return saved


def _update(config, saved, prefix, path):
  for name, value in saved.items():
    key = prefix + name
    if name not in config and not prefix.endswith("router."):
      raise Damaged(f"{path} holds the unknown key '{key}'{nearest(key, paths(config, prefix))}")
    if isinstance(value, dict) and isinstance(config.get(name), ConfigDict):
      _update(config[name], value, key + ".", path)
      continue
    try:
      with config.unlocked():
        config[name] = tuple(value) if isinstance(value, list) else value
    except TypeError:
      raise Damaged(f"{path}: '{key}'={value!r:.80} should be {config.get_type(name).__name__}; "
                    f"{_RESTORE}") from None
