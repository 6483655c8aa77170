"""Loads a function from a Python file, get_config() above all; a mistake in it is one line with its place."""

import difflib
import importlib.machinery
import importlib.util
import inspect
import os
from collections.abc import Callable, Sequence

from ml_collections import ConfigDict

from sparse_experts.config import shipped
from sparse_experts.config.dotted import paths
from sparse_experts.config.files import read_config
from sparse_experts.config.schema import KEYS
from sparse_experts.errors import UserError, call

_MODULE = "sparse_experts_config_file"


def load_config(spec: str) -> ConfigDict:
  """The config of FILE[:ARG], as --config takes it: get_config(ARG) of the file; locked.

  FILE is a path, or the name of a config that comes with the package, such as `configs/smoke.py`. It may also
  be the config.json of a run. Raises UserError, one line that names the file and the way out.
  """
  if os.path.basename(spec) == "config.json":
    return read_config(os.path.dirname(spec) or ".")
  path, _, arg = (spec, "", "") if os.path.exists(spec) else spec.partition(":")
  path = _find(path, f"--config={spec}")
  get_config = _function("get_config", path, f"--config={spec}", "configs/smoke.py")
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


def _find(path: str, flag: str) -> str:
  """The path, or the file of the shipped config of this name, with configs/ before it or without."""
  known, name = shipped.paths(), path.removeprefix(f"{shipped.FOLDER}/")
  if name in known and not os.path.exists(path):
    return known[name]
  _check_file(path, flag, [path.removesuffix(name) + other for other in known],
              "`python -m sparse_experts describe --configs` lists those that come with the package")
  return path


def function(name: str, path: str, flag: str, example: str) -> Callable:
  """The function `name` of the Python file `path`; `flag` and `example` are for messages."""
  _check_file(path, flag)
  return _function(name, path, flag, example)


def _function(name: str, path: str, flag: str, example: str) -> Callable:
  loader = importlib.machinery.SourceFileLoader(_MODULE, path)
  spec = importlib.util.spec_from_loader(_MODULE, loader)
  assert spec  # it has a loader
  module = importlib.util.module_from_spec(spec)
  call(path, "importing it", lambda: loader.exec_module(module))
  found = getattr(module, name, None)
  if not callable(found):
    raise UserError(f"{flag}: {path} defines no {name}(); see {example} for one")
  return found


def _check_file(path: str, flag: str, others: Sequence[str] = (), way_out: str = "") -> None:
  """Refuses what is no file and names one of the same name among `others`, or the most similar one of all."""
  if os.path.isfile(path):
    return
  if os.path.isdir(path):
    raise UserError(f"{flag}: {path} is a folder; name a Python file in it")
  folder = os.path.dirname(path)
  here = [os.path.join(folder, name) for name in os.listdir(folder or ".") if name.endswith(".py")] if (
      os.path.isdir(folder or ".")) else []
  namesakes = [other for other in others if os.path.basename(other) == os.path.basename(path)]
  if alike := namesakes or difflib.get_close_matches(path, [*here, *others], n=1):
    way_out = f"did you mean '{alike[0]}'?"
  elif not way_out:
    way_out = f"{folder or 'this folder'} has {', '.join(map(os.path.basename, here))}" if here else (
        "run from the root of the repository or give the whole path")
  raise UserError(f"{flag}: no file {path}; {way_out}")
