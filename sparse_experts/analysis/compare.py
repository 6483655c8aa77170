"""Compares two groups of runs over the same seeds: means, standard deviations, and the paired difference.

Standard deviations and intervals are over seeds, not batches. Runs of equal seed see the same data in the
same order; the interval is that of their differences.
"""

import dataclasses
import math
import os
from collections.abc import Iterable, Sequence

import numpy as np
from scipy import special

from sparse_experts import storage
from sparse_experts.analysis.balance import collapsed, mean_dropped, unequal_drops
from sparse_experts.config import INCIDENTAL, SEEDS, differences
from sparse_experts.errors import UserError
from sparse_experts.results import Result, read_result
from sparse_experts.small_files import Damaged, read_json
from sparse_experts.tasks import task_of

LEVEL = 0.95
_SEED_KEYS = {"train.seed", *(f"seed.{name}" for name in SEEDS)}


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
  """Runs of one config that differ in their seeds: {seed: its run}, in order."""

  name: str
  runs: dict[int, Result]

  @property
  def values(self) -> dict[int, float]:
    """Final primary figure by seed, of the runs that did not diverge."""
    return {seed: run.primary for seed, run in self.runs.items() if run.primary is not None}

  @property
  def unit(self) -> str:
    """Unit of the values, such as nats per byte."""
    run = next(iter(self.runs.values()), None)
    return task_of(run.config).unit if run else "nats"

  @property
  def diverged(self) -> int:
    return sum(bool(run.diverged) for run in self.runs.values())


@dataclasses.dataclass(frozen=True)
class Spread:
  """Mean, standard deviation (n - 1 in its denominator) and half the mean's t-interval of `n` values.

  The mean of no values, and the deviation of one, are None: unknown, not zero.
  """

  n: int
  mean: float | None
  deviation: float | None
  half: float | None

  @property
  def interval(self) -> tuple[float, float] | None:
    return None if self.mean is None or self.half is None else (self.mean - self.half, self.mean + self.half)


def spread(values: Iterable[float], level: float = LEVEL) -> Spread:
  """Half of the interval is t((1 + level) / 2, n - 1) x deviation / sqrt(n) (Student 1908)."""
  x = np.asarray(list(values), np.float64)
  n = len(x)
  if n < 2:
    return Spread(n, float(x[0]) if n else None, None, None)
  deviation = float(x.std(ddof=1))
  return Spread(n, float(x.mean()), deviation, quantile(n, level) * deviation / math.sqrt(n))


def quantile(n: int, level: float = LEVEL) -> float:
  """Of Student's t with n - 1 degrees of freedom: half an interval of n values, in standard errors."""
  return float(special.stdtrit(n - 1, (1 + level) / 2))


def difference(group: Group, baseline: Group) -> Spread:
  """The paired difference group minus baseline, over seeds on which neither diverged."""
  a, b = group.values, baseline.values
  return spread(a[seed] - b[seed] for seed in a if seed in b)


def check(groups: Sequence[Group]) -> None:
  """Refuses runs that are not finished or were evaluated on different data or metrics."""
  runs = [run for group in groups for run in group.runs.values()]
  for run in runs:
    if not run.finished:
      raise UserError(f"run {run.workdir} is not finished: it is at step {run.last.get('step', 0)} of "
                      f"{run.config.train.steps}; train it to the end first")
  scored = [run for run in runs if not run.diverged]
  for key, what, way_out in (("data_fingerprint", "data", "on one data source"),
                             ("measure", "metrics", "on one metric")):
    for run in scored:
      if key not in run.last:
        raise UserError(f"run {run.workdir} has no {key}, as an older version trained it; train it again")
      if run.last[key] != scored[0].last[key]:
        one, other = (_evaluated(each, key) for each in (scored[0], run))
        raise UserError(f"runs {scored[0].workdir} and {run.workdir} do not compare: their {what} differ, "
                        f"{one} and {other}; compare runs {way_out}")


def _evaluated(run: Result, key: str) -> str:
  """What a run was evaluated on, in words: its data by name, with the fingerprint of what they held."""
  if key != "data_fingerprint":
    return str(run.last[key])
  data, given = run.config.data, run.config.given.data
  source = f"data given as {given}" if given else f"data.source='{data.source}'"
  return f"{source} with data.valid_share={data.valid_share:g} ({run.last[key]})"


def check_pairs(a: Group, b: Group) -> None:
  if not a.runs.keys() & b.runs.keys():
    raise UserError(f"{a.name} has seeds {_list(a.runs)} and {b.name} has {_list(b.runs)}: no pair to "
                    "compare; train both on the same seeds")


def config_differences(a: Result, b: Result) -> dict[str, list]:
  """{key: [value of a, value of b]} of the keys in which two runs differ, except seeds and the mesh."""
  return differences(a.config, b.config, INCIDENTAL | _SEED_KEYS)


def read_group(path: str) -> Group:
  """The runs of `path`: a run, a folder of runs, or an arm of a sweep (its runs.json names the folders)."""
  return make_group(path, run_folders(path))


def run_folders(path: str) -> list[str]:
  """The folders of the runs that `read_group` reads."""
  index = os.path.join(path, "runs.json")
  if storage.exists(os.path.join(path, "config.json")) or not storage.is_folder(path):
    return [path]
  if storage.exists(index):
    way_out = "run the sweep again, it writes it anew"
    folders = read_json(index, way_out).get("runs")
    if not isinstance(folders, list) or not all(isinstance(folder, str) for folder in folders):
      raise Damaged(f"{index} does not name the folders of runs; {way_out}")
    return [storage.join(path, folder) for folder in folders]
  below = [os.path.join(path, name) for name in storage.names(path) if not name.startswith(".")]
  if folders := [folder for folder in below if storage.exists(os.path.join(folder, "config.json"))]:
    return folders
  raise UserError(f"{path} holds no run; name a run, a folder of runs, or an arm of a sweep")


def make_group(name: str, folders: Sequence[str]) -> Group:
  """The runs of `folders` as one group. Refuses two runs of one seed and runs of two configs."""
  return group_of(name, [read_result(folder) for folder in folders])


def group_of(name: str, results: Sequence[Result]) -> Group:
  """Runs that were read already, as `make_group`."""
  runs: dict[int, Result] = {}
  for run in results:
    if differ := config_differences(results[0], run):
      key, (one, other) = next(iter(differ.items()))
      raise UserError(f"{name} holds runs of two configs: {key}={one!r} in {results[0].workdir} and "
                      f"{other!r} in {run.workdir}; name a folder of one config's runs")
    if run.seed in runs:
      raise UserError(f"{name} holds two runs of seed {run.seed}, {runs[run.seed].workdir} and "
                      f"{run.workdir}; name a folder of one config's runs")
    runs[run.seed] = run
  return Group(name, dict(sorted(runs.items())))


def report(a: Group, b: Group) -> str:
  """What `compare` prints."""
  paired = difference(a, b)
  lines = []
  for group in (a, b):
    of = spread(group.values.values())
    sd = f", standard deviation {of.deviation:.4f}" if of.n > 1 else ""
    diverged = f"; {group.diverged} more diverged" if group.diverged else ""
    seeds = f"{of.n} seed{'s' * (of.n != 1)}"
    lines.append(f"{group.name}: {number(of.mean)} {group.unit}{sd} over {seeds}{diverged}")
    if dead := collapsed(group.runs.values()):
      lines.append(f"{group.name}: {dead}")
  lines.append(f"difference {describe_difference(paired)}")
  if unpaired := a.values.keys() ^ b.values.keys():
    lines.append(f"left out of the difference, as only one of the two has a figure: seed {_list(unpaired)}")
  if drops := unequal_drops({group.name: map(mean_dropped, group.runs.values()) for group in (a, b)}):
    lines.append(drops)
  keys = config_differences(*(next(iter(group.runs.values())) for group in (a, b)))
  shown = [f"{k} ({one!r} and {other!r})" for k, (one, other) in list(keys.items())[:8]]
  more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
  lines.append(f"their configs differ in {', '.join(shown)}{more}" if keys else "their configs do not differ")
  return "\n".join(lines)


def as_json(a: Group, b: Group) -> dict:
  """For scripts: `a`, `b` and `difference`, with `values` by seed; unknown figures are null."""
  of = lambda s: {"n": s.n, "mean": s.mean, "deviation": s.deviation, "interval": s.interval}
  return {**{name: of(spread(g.values.values())) | {"diverged": g.diverged, "values": g.values}
             for name, g in (("a", a), ("b", b))}, "difference": of(difference(a, b))}


def describe_difference(paired: Spread) -> str:
  if not paired.n:
    return "unknown: no seed on which both finished without diverging"
  if paired.interval is None:
    return f"{paired.mean:+.4f}, without an interval, which needs two pairs; train more seeds"
  low, high = paired.interval
  return f"{paired.mean:+.4f}, 95% interval {low:+.4f} to {high:+.4f}, over {paired.n} pairs of equal seed"


def number(value: float | None, form: str = ".4f") -> str:
  return "none" if value is None else format(value, form)


def _list(seeds: Iterable[int]) -> str:
  return ", ".join(map(str, sorted(seeds)))
