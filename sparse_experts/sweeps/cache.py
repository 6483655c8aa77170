"""The cache of a sweep, which is the runs themselves.

A run lies in RUNS/KEY, where the key is a hash of everything its result depends on (`recipe`). A baseline
therefore trains once for all sweeps, a change of code trains anew, and a sweep that was interrupted resumes
the run it was in.
"""

import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import pathlib
from importlib import metadata
from typing import Any

from ml_collections import ConfigDict

from sparse_experts import storage, version
from sparse_experts.config import INCIDENTAL, flat, get, replaced
from sparse_experts.results import Result, read_result
from sparse_experts.sweeps.sweep import RATE
from sparse_experts.tasks import task_of

# A change of these may change a result; analysis and the command line cannot.
_SOURCES = ("config", "partitioning.py", "moe", "models", "data", "tasks", "training", "sweeps/seeds.py")
_VERSIONS = ("jax", "jaxlib", "flax", "optax", "grain", "numpy")
_ROUTERS = ("model.router.name", "model.decoder.router.name")
DONE = "in the cache"


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
  """One run of a sweep, to be trained or already in the cache."""

  arm: str
  config: ConfigDict
  workdir: str
  recipe: dict[str, Any]
  tuning: bool

  @property
  def name(self) -> str:
    rate = f" learning rate {self.config.optimizer.learning_rate:g}" if self.tuning else ""
    return f"{self.arm}{rate} seed {self.config.train.seed}"

  def result(self) -> Result | None:
    """The run in the cache, finished or not; None before the first step."""
    return read_result(self.workdir) if storage.exists(os.path.join(self.workdir, "config.json")) else None

  def state(self) -> str:
    """DONE, or the progress of the run."""
    result = self.result()
    if result is None:
      return "to train"
    if not result.finished:
      return f"begun, at step {result.last.get('step', 0)} of {self.config.train.steps}"
    return DONE

  @property
  def finished(self) -> bool:
    return self.state() == DONE


class Cache:
  """The runs in a folder, each under the hash of its recipe."""

  def __init__(self, folder: str):
    """folder: `--runs`, a folder or a gs:// address."""
    storage.check_keeps_runs(folder, f"--runs={folder}")
    self.folder = folder
    self._fingerprints: dict[tuple[str, bool], str] = {}

  def job(self, arm: str, config: ConfigDict, seed: int, rate: float | None = None,
          tuning: bool = False) -> Job:
    """The run of `config` with this seed and, unless None, this learning rate."""
    rates = {} if rate is None else {RATE: float(rate)}
    config = replaced(config, {"train.seed": seed, **rates})
    made_of = recipe(config, self._fingerprint(config, tuning))
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
    return Job(arm, config, os.path.join(self.folder, key), made_of, tuning)

  def _fingerprint(self, config: ConfigDict, tuning: bool) -> str:
    """Reads the data once for all runs of the same source."""
    key = json.dumps(config.data.to_dict()), tuning
    if key not in self._fingerprints:
      self._fingerprints[key] = data_of(config, tuning).fingerprint
    return self._fingerprints[key]


def recipe(config: ConfigDict, fingerprint: str) -> dict[str, Any]:
  """Everything that a result depends on: resolved config, data, code, and versions of libraries.

  The mesh and the intervals of logging, evaluation and checkpoints are left out. The dispatch is included:
  results do not depend on it, but an arm may measure its speed. Another backend rounds differently and is
  another run.
  """
  import jax

  keys = flat(config, INCIDENTAL)
  if keys["data.source"].startswith("files:"):  # not their path: the fingerprint identifies them
    keys["data.source"] = "files"
  return {"config": keys, "data": fingerprint, "code": code_version(config), "backend": jax.default_backend(),
          "versions": {name: metadata.version(name) for name in _VERSIONS}}


def code_version(config: ConfigDict) -> str:
  """A hash of the sources that training runs, and of the file of a router from outside the package.

  Imports of such a router are not followed; the data's fingerprint covers a data function.
  """
  total = hashlib.sha256(package_version().encode())
  for key in _ROUTERS:
    module, colon, _ = (get(config, key) or "").partition(":")
    try:
      spec = importlib.util.find_spec(module) if colon else None
    except ImportError:
      spec = None  # training reports it
    if spec is not None and spec.origin and os.path.isfile(spec.origin):
      total.update(pathlib.Path(spec.origin).read_bytes())
  return total.hexdigest()[:16]


@functools.cache
def package_version() -> str:
  """A hash of the sources of the package that training runs."""
  return version.sources(*_SOURCES)


def data_of(config: ConfigDict, tuning: bool) -> Any:
  """The config's source. For tuning, only its training documents, some of them held out for validation."""
  task = task_of(config)
  source = task.open_source()
  return task.hold_out(source) if tuning else source
