"""Arms x seeds: which runs a sweep is made of, which of them are in the cache, and training the rest.

The cache is the runs themselves: a run lives in RUNS/KEY, where the key is a hash of everything its result
depends on (`recipe`). A baseline therefore trains once for all sweeps, a change of code trains anew, and a
sweep that was interrupted goes on inside the run it was in.

A learning-rate budget: every arm tries the same rates, each with one run of the tuning seed, scored on
documents held out of the training split. Neither a seed nor a document that is reported chooses anything.
"""

import copy
import dataclasses
import functools
import hashlib
import importlib.util
import json
import math
import os
import pathlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

from ml_collections import ConfigDict

from sparse_experts import storage
from sparse_experts.config.dotted import flat, get
from sparse_experts.config.schema import INCIDENTAL
from sparse_experts.errors import UserError, nearest
from sparse_experts.results import Result, keep_verdict, read_result
from sparse_experts.tasks import task_of

# A change of these may change a result; analysis and the command line cannot.
_SOURCES = ("config", "partitioning.py", "moe", "models", "data", "tasks", "training", "sweeps/seeds.py")
_VERSIONS = ("jax", "jaxlib", "flax", "optax", "grain", "numpy")
_ROUTERS = ("model.router.name", "model.decoder.router.name")
RATE = "optimizer.learning_rate"
DONE = "in the cache"


@dataclasses.dataclass(frozen=True)
class Arm:
  """One way of doing it: FILE[:ARG] of a config, and keys of it with other values, as --config.KEY=VALUE."""

  config: str
  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Sweep:
  """What `get_sweep()` of a sweep file returns.

  baseline: the arm that others are compared with; None: the first one.
  learning_rates: each arm tries all of them on `tuning_seed` and trains its seeds with its best; without
    them an arm trains with the rate of its config.
  seeds_together: so many seeds of an arm are one program (`sweeps/seeds.py`); None: as many as fit, which is
    one on a CPU or a mesh.
  """

  arms: Mapping[str, Arm]
  seeds: Sequence[int] = range(5)
  baseline: str | None = None
  learning_rates: Sequence[float] = ()
  tuning_seed: int = 1000
  seeds_together: int | None = None

  def __post_init__(self):
    if not isinstance(self.arms, Mapping) or not self.arms:
      raise UserError("a sweep needs arms; write Sweep(arms={'name': Arm('configs/smoke.py')})")
    for name, arm in self.arms.items():
      if not isinstance(arm, Arm):
        raise UserError(f"arm '{name}' is of type {type(arm).__name__}; write Arm('configs/smoke.py')")
      if not re.fullmatch(r"\w[\w.+-]*", name):
        raise UserError(f"arm '{name}' becomes a folder's name; use letters, digits, and any of _ . + -")
    seeds = list(self.seeds)
    if not seeds or any(not isinstance(s, int) or s < 0 for s in seeds) or len(set(seeds)) < len(seeds):
      raise UserError(f"seeds={self.seeds!r}: give different whole numbers from 0 on, for example range(5)")
    if self.baseline is not None and self.baseline not in self.arms:
      raise UserError(f"baseline='{self.baseline}' is no arm{nearest(self.baseline, self.arms)}")
    if self.seeds_together is not None and self.seeds_together < 1:
      raise UserError(f"seeds_together={self.seeds_together} is out of range; choose 1 or more")
    rates = list(self.learning_rates)
    if any(not 0 < rate < math.inf for rate in rates) or len(set(rates)) < len(rates):
      raise UserError(f"learning_rates={self.learning_rates!r}: give different numbers above 0")
    if rates and self.tuning_seed in seeds:
      raise UserError(f"tuning_seed={self.tuning_seed} is one of the seeds that are reported; choose another")

  @property
  def base(self) -> str:
    return self.baseline or next(iter(self.arms))


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
  """One run of a sweep: to be trained, or found in the cache."""

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
    """What is in the cache, finished or not; None before the first step."""
    begun = os.path.exists(os.path.join(self.workdir, "config.json"))
    return read_result(self.workdir) if begun else None

  def state(self) -> str:
    """DONE, or how far it is."""
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
  """The runs in a folder by the hash of what they were made of."""

  def __init__(self, folder: str):
    self.folder, self._fingerprints = folder, {}

  def job(self, arm: str, config: ConfigDict, seed: int, rate: float | None = None,
          tuning: bool = False) -> Job:
    """The run of `config` with this seed and, unless None, this learning rate."""
    config = copy.deepcopy(config).unlock()
    config.train.seed = seed
    if rate is not None:
      config.optimizer.learning_rate = float(rate)
    config.lock()
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
  """Everything that a result depends on: resolved config, data, code, and the libraries under it.

  The mesh and how often a run logs, evaluates and saves are left out. The dispatch is not: results do not
  depend on it, but an arm may ask how fast it is. Another backend rounds otherwise and is another run.
  """
  import jax

  keys = flat(config, INCIDENTAL)
  if keys["data.source"].startswith("files:"):  # wherever they lie: the fingerprint tells them apart
    keys["data.source"] = "files"
  return {"config": keys, "data": fingerprint, "code": code_version(config), "backend": jax.default_backend(),
          "versions": {name: metadata.version(name) for name in _VERSIONS}}


def code_version(config: ConfigDict) -> str:
  """A hash of the sources that training runs, and of the file of a router from outside the package.

  What such a router imports is not followed; the fingerprint covers what a data function gives.
  """
  total = hashlib.sha256(_package_version().encode())
  for key in _ROUTERS:
    name = get(config, key) or ""
    module = name.partition(":")[0] if ":" in name else ""
    try:
      found = importlib.util.find_spec(module) if module else None
    except ImportError:
      found = None  # training says so
    if found is not None and found.origin and os.path.isfile(found.origin):
      total.update(pathlib.Path(found.origin).read_bytes())
  return total.hexdigest()[:16]


@functools.cache
def _package_version() -> str:
  root, total = pathlib.Path(__file__).parent.parent, hashlib.sha256()
  for name in _SOURCES:
    path = root / name
    for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
      total.update(f"{file.relative_to(root)} ".encode() + file.read_bytes())
  return total.hexdigest()


def data_of(config: ConfigDict, tuning: bool) -> Any:
  """The config's source. For tuning, its training documents alone, a share of them held out to choose on."""
  task = task_of(config)
  source = task.open_source()
  return task.hold_out(source) if tuning else source


def tuning_jobs(sweep: Sweep, configs: Mapping[str, ConfigDict], cache: Cache) -> list[Job]:
  return [cache.job(arm, config, sweep.tuning_seed, rate, tuning=True)
          for rate in sweep.learning_rates for arm, config in configs.items()]


def best_rates(tuning: Sequence[Job]) -> dict[str, float]:
  """{arm: the learning rate with the lowest loss on held-out documents} of arms that have tried them all.

  A diverged run has an infinite loss; of equals the lowest rate is taken.
  """

  def order(job):
    value = job.result().primary
    return math.inf if value is None else value, job.config.optimizer.learning_rate

  by_arm: dict[str, list[Job]] = {}
  for job in tuning:
    by_arm.setdefault(job.arm, []).append(job)
  return {arm: min(jobs, key=order).config.optimizer.learning_rate for arm, jobs in by_arm.items()
          if all(job.finished for job in jobs)}


def seed_jobs(sweep: Sweep, configs: Mapping[str, ConfigDict], cache: Cache,
              tuning: Sequence[Job]) -> list[Job]:
  """The runs that are reported, of arms whose learning rate is known.

  One seed of every arm comes before the next seed, so that an early look is a paired one.
  """
  rates = best_rates(tuning)
  jobs = [cache.job(arm, config, seed, rates.get(arm)) for seed in sweep.seeds
          for arm, config in configs.items() if arm in rates or not tuning]
  owner: dict[str, str] = {}
  for job in jobs:
    if owner.setdefault(job.workdir, job.arm) != job.arm:
      raise UserError(f"arms '{owner[job.workdir]}' and '{job.arm}' are the same runs: their configs differ "
                      "in nothing that a result depends on; change one or leave it out")
    if job.recipe["data"] != jobs[0].recipe["data"]:
      raise UserError(f"arms '{jobs[0].arm}' and '{job.arm}' have other data, {jobs[0].recipe['data']} and "
                      f"{job.recipe['data']}: their losses do not compare; give both one data.source")
    a, b = (task_of(c).measure() for c in (jobs[0].config, job.config))
    if a != b:
      raise UserError(f"arms '{jobs[0].arm}' and '{job.arm}' have other measures, '{a}' and '{b}': their "
                      "losses do not compare; give both one data.length, data.objective and eval.min_bytes")
  return jobs


class Clock:
  """What is left of a sweep, from how long its runs took: here, or as noted in the cache."""

  def __init__(self):
    self._seconds: dict[str, list[float]] = {}

  def add(self, job: Job) -> None:
    if seconds := _noted(job):
      self._seconds.setdefault(job.arm, []).append(seconds)

  def seconds(self, jobs: Sequence[Job]) -> float | None:
    """Of `jobs`, an arm that was never measured taking as long as the others; None: nothing is known yet."""
    means = {arm: sum(s) / len(s) for arm, s in self._seconds.items()}
    if not means:
      return None
    others = sum(means.values()) / len(means)
    return sum(means.get(job.arm, others) for job in jobs)

  def in_words(self, jobs: Sequence[Job]) -> str:
    from sparse_experts.training.metrics import clock

    seconds = self.seconds(jobs)
    time_left = "no run was timed yet" if seconds is None else f"about {clock(seconds)}"
    return f"{len(jobs)} run{'s' * (len(jobs) != 1)} to train, {time_left}"


def train_jobs(jobs: Sequence[Job], clock: Clock, say: Callable[[str], None],
               together: int | None = 1) -> bool:
  """Trains those that are not finished. A run that diverges is noted and the rest go on.

  together: seeds of an arm that are trained as one program; None: as many as fit.
  False if it was asked to stop (SIGTERM): what it trained is saved, and the same call goes on from there.
  """
  left = [job for job in jobs if not job.finished]
  while left:
    arm = [job for job in left if job.arm == left[0].arm]
    now = arm[:_number(arm, together)]
    say(f"{', '.join(job.name for job in now)}: {clock.in_words(left)}")
    _train(now)
    if not all(job.finished for job in now):
      return False
    for job in now:
      clock.add(job)
    left = [job for job in left if job not in now]
  return True


def _number(arm: Sequence[Job], together: int | None) -> int:
  """Learning rates are constants of a program: tuning runs are trained one by one."""
  if arm[0].tuning or len(arm) == 1:
    return 1
  if together is None:
    from sparse_experts.sweeps.seeds import seeds_that_fit

    return seeds_that_fit(arm[0].config, arm[0].workdir, len(arm))
  return together


def _train(jobs: Sequence[Job]) -> None:
  """One run, or several of one arm together."""
  from sparse_experts.sweeps import seeds
  from sparse_experts.training import loop
  from sparse_experts.training.session import NonFinite

  start, (job, *others) = time.perf_counter(), jobs
  note_divergence = lambda workdir, e: keep_verdict(workdir, str(e))
  for each in jobs:
    os.makedirs(each.workdir, exist_ok=True)
  try:
    if others:
      seeds.train_seeds([j.config for j in jobs], [j.workdir for j in jobs], note_divergence)
    else:
      loop.train(job.config, job.workdir, data=data_of(job.config, tuning=True) if job.tuning else None)
  except NonFinite as e:
    note_divergence(job.workdir, e)
  finally:
    for each in jobs:
      _note(each, _noted(each) + (time.perf_counter() - start) / len(jobs))


def _note(job: Job, seconds: float) -> None:
  """recipe.json: what the key was made of, and how long the run took, interruptions aside."""
  storage.write_json(os.path.join(job.workdir, "recipe.json"), job.recipe | {"seconds": seconds})


def _noted(job: Job) -> float:
  try:
    with open(os.path.join(job.workdir, "recipe.json"), encoding="utf-8") as f:
      return float(json.load(f)["seconds"])
  except (OSError, ValueError, KeyError):
    return 0.0

