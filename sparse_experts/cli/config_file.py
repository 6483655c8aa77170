"""Loads a function from a Python file, get_config() above all; a mistake in it is one line with its place."""

import importlib.machinery
import importlib.util
import inspect
import os
from collections.abc import Callable

from ml_collections import ConfigDict

from sparse_experts.config import KEYS, paths
from sparse_experts.errors import UserError, call, nearest

_MODULE = "sparse_experts_config_file"


def load(spec: str) -> ConfigDict:
  """get_config(arg) of FILE[:arg], locked."""
  path, _, arg = (spec, "", "") if os.path.exists(spec) else spec.partition(":")
  get_config = function("get_config", path, f"--config={spec}", "configs/smoke.py")
  if arg and not inspect.signature(get_config).parameters:
    raise UserError(f"--config={spec}: get_config() in {path} takes no argument; leave out ':{arg}'")
  config = call(path, "get_config()", lambda: get_config(arg) if arg else get_config())
  if not isinstance(config, ConfigDict):
    raise UserError(f"--config={spec}: get_config() returned {type(config).__name__}, not a ConfigDict; "
                    "start from sparse_experts.config.default_config()")
  missing = sorted(KEYS.keys() - set(paths(config)))
  if missing:
    raise UserError(f"--config={spec}: key '{missing[0]}' is missing; start from default_config()")
  return config.lock()


def function(name: str, path: str, flag: str, example: str) -> Callable:
  """The function `name` of the Python file `path`; `flag` and `example` are for messages."""
  if not os.path.isfile(path):
    raise UserError(f"{flag}: {_no_file(path)}")
  loader = importlib.machinery.SourceFileLoader(_MODULE, path)
  spec = importlib.util.spec_from_loader(_MODULE, loader)
  assert spec  # it has a loader
  module = importlib.util.module_from_spec(spec)
  call(path, "importing it", lambda: loader.exec_module(module))
  found = getattr(module, name, None)
  if not callable(found):
    raise UserError(f"{flag}: {path} defines no {name}(); see {example} for one")
  return found


def _no_file(path: str) -> str:
  if os.path.isdir(path):
    return f"{path} is a folder; name a Python file in it"
  folder = os.path.dirname(path) or "."
  if not os.path.isdir(folder):
    return f"no folder {folder} here; run from the root of the repository or give the whole path"
  files = [name for name in os.listdir(folder) if name.endswith(".py")]
  return f"no file {path}" + (nearest(os.path.basename(path), files) if files else "; name a .py file")
