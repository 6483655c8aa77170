"""Reads metrics.jsonl of any length, line by line, into a bounded number of points.

Rows are taken together in buckets of equally many; a point has the mean of its bucket, and of the figures of
the whole run also the smallest and the largest value, so that no spike is lost. What is not finite or no
number enters no point and is counted. Of large buckets the layers' figures are means over some rows, evenly
spaced: parsing all of 100,000 rows with their loads took two thirds of the time.
"""

import array
import collections
import dataclasses
import json
import math
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from sparse_experts import storage
from sparse_experts.errors import UserError
from sparse_experts.results import own_seconds

POINTS = 600
CURVES = ("loss", "learning_rate", "grad_norm", "tokens_per_second")
# {figure of a page: the metric of a layer that it is made of}
LOGGED = {"max_vio": "load_max_mean", "dead": "dead", "effective_share": "effective_share",
          "dropped": "dropped", "experts_per_token": "experts_per_token", "entropy": "entropy"}
SAMPLED = 25  # rows of a bucket, at least, whose figures of layers are read
SHOWN_NON_FINITE = 40  # steps whose value is not finite that are named
_NUMBERS = re.compile(rb'"(step|seconds_per_step|seeds_together|%s)": (-?[0-9.eE+-]+)[,}]'
                      % "|".join(CURVES).encode())
_ALWAYS_WHOLE = (b'"eval/', b'"changed"', b'"run"', b'"skipped"', b"NaN", b"Infinity")
_ROUTER = re.compile(rf"router/(.+)/({'|'.join((*LOGGED.values(), 'load'))})")


@dataclasses.dataclass
class Points:
  """A figure by bucket; NaN where no row of the bucket has it."""

  mean: list[float]
  low: list[float]
  high: list[float]


@dataclasses.dataclass
class Log:
  """What was read. Lists of `step`, `seconds` and of all points have one entry per bucket of rows."""

  rows: int = 0
  bucket: int = 1  # rows of a bucket
  bad_lines: int = 0  # that are no row, the last one aside
  cut: bool = False  # whether the last line is half written
  step: list[int] = dataclasses.field(default_factory=list)
  seconds: list[float] = dataclasses.field(default_factory=list)  # of training, since the first step
  curves: dict[str, Points] = dataclasses.field(default_factory=dict)
  layers: dict[str, dict[str, list[float]]] = dataclasses.field(default_factory=dict)
  loads: dict[str, list[list[float] | None]] = dataclasses.field(default_factory=dict)
  evaluations: dict[str, list[tuple[int, float, float]]] = dataclasses.field(default_factory=dict)
  about: dict[str, Any] = dataclasses.field(default_factory=dict)  # `run` of the newest process
  processes: list[int] = dataclasses.field(default_factory=list)  # first step that each of them logged
  changed: list[tuple[int, dict[str, list]]] = dataclasses.field(default_factory=list)
  non_finite: dict[str, list[int]] = dataclasses.field(default_factory=dict)  # steps, by name
  non_finite_count: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  skipped: int = 0
  tokens_per_step: int | None = None
  step_seconds: float | None = None  # median
  last: dict[str, Any] = dataclasses.field(default_factory=dict)  # the last row
  tail: dict[str, Any] = dataclasses.field(default_factory=dict)  # the last row of training
  routed: dict[str, Any] = dataclasses.field(default_factory=dict)  # the last that was read with its layers

  @property
  def last_step(self) -> int:
    return self.last.get("step", 0)


def read(path: str, evaluated: Iterable[str] = (), points: int = POINTS) -> Log:
  """The log at `path`, empty if there is none. evaluated: names of figures whose eval/NAME are kept."""
  return storage.steadily(path, lambda parts: _read(path, parts, tuple(evaluated), points), Log())


def _read(path: str, parts: Sequence[str], evaluated: Iterable[str], points: int) -> Log:
  """`read` of the files that are the log at `path`."""
  log = Log()
  try:
    if not all(storage.facts(part).is_file for part in parts):  # a pipe would be waited for
      raise UserError(f"{path} is no file; restore it, or run the same `train` command again")
    log.bucket = max(1, math.ceil(_count_lines(parts) / points))
    wanted = {f"eval/{name}": name for name in evaluated}
    bucket: list[dict[str, Any]] = []
    each_seconds, total, before = array.array("d"), 0.0, 0
    for row, strange in _rows(parts, log):
      step = row["step"]
      if "seconds_per_step" in row and is_number(row["seconds_per_step"]):
        each_seconds.append(own_seconds(row))
        total += max(step - before, 0) * each_seconds[-1]
        before = step
      for key, name in wanted.items():
        if is_number(row.get(key)):
          log.evaluations.setdefault(name, []).append((step, total, row[key]))
      log.rows, log.last = log.rows + 1, row
      if "learning_rate" in row or "loss" in row:
        bucket.append(row)
        log.tail = row
        if any(key.startswith("router/") for key in row):
          log.routed = row
        if len(bucket) >= log.bucket:
          _close(log, bucket, total)
          bucket = []
      _note(log, row, step)
      if strange:
        _note_non_finite(log, row, step)
    if bucket:
      _close(log, bucket, total)
  except FileNotFoundError:
    raise
  except OSError as e:
    raise UserError(f"{path} cannot be read ({e.strerror}); mend its permissions, or copy the run") from None
  log.step_seconds = statistics.median(each_seconds) if each_seconds else None
  if is_number(log.about.get("tokens_per_step")):
    log.tokens_per_step = log.about["tokens_per_step"]
  elif is_number(log.tail.get("seconds_per_step")) and is_number(log.tail.get("tokens_per_second")):
    log.tokens_per_step = round(log.tail["seconds_per_step"] * log.tail["tokens_per_second"])
  return log


def _count_lines(parts: Sequence[str]) -> int:
  lines = 0
  for part in parts:
    with storage.open_file(part) as f:
      lines += sum(block.count(b"\n") for block in iter(lambda: f.read(1 << 20), b""))
  return lines


def _rows(parts: Sequence[str], log: Log) -> Iterator[tuple[dict[str, Any], bool]]:
  """(row, whether it has a number that is not finite) of whole lines; bad lines are counted."""
  every, n = max(1, log.bucket // SAMPLED), -1
  for part in parts:
    with storage.open_file(part) as f:
      for line in f:
        n += 1
        if not line.endswith(b"\n"):
          log.cut = True
          continue
        row = None if n % every == 0 or any(word in line for word in _ALWAYS_WHOLE) else _numbers_of(line)
        try:
          row = row or json.loads(line)
          if type(row["step"]) is not int:
            raise TypeError("step")
        except (ValueError, KeyError, TypeError, RecursionError):
          log.bad_lines += 1
          continue
        yield row, b"NaN" in line or b"Infinity" in line


def _numbers_of(line: bytes) -> dict[str, Any] | None:
  """The figures of the whole run in a line, without parsing what it says of layers; None where that fails."""
  try:
    row: dict[str, Any] = {key.decode(): float(value) for key, value in _NUMBERS.findall(line)}
    row["step"] = int(row["step"])
  except (ValueError, KeyError, OverflowError):
    return None
  return row if line.endswith(b"}\n") else None


def _note(log: Log, row: dict[str, Any], step: int) -> None:
  """What is no curve: skipped updates, changed keys, and what ran."""
  if is_number(row.get("skipped")):
    log.skipped += int(row["skipped"])
  if isinstance(row.get("changed"), dict):
    log.changed.append((step, row["changed"]))
  if isinstance(row.get("run"), dict):
    log.about = row["run"]
    log.processes.append(step)


def _note_non_finite(log: Log, row: dict[str, Any], step: int) -> None:
  for key, value in row.items():
    if type(value) is float and not math.isfinite(value):
      log.non_finite_count[key] += 1
      if len(steps := log.non_finite.setdefault(key, [])) < SHOWN_NON_FINITE:
        steps.append(step)


def _close(log: Log, bucket: list[dict[str, Any]], seconds: float) -> None:
  """Adds the points of a bucket."""
  n = len(log.step)
  log.step.append(bucket[-1]["step"])
  log.seconds.append(seconds)
  for key in dict.fromkeys(key for row in bucket for key in row):
    if key in CURVES:
      if (x := _numbers(bucket, key)).size:
        points = log.curves.setdefault(key, Points([], [], []))
        for values, value in ((points.mean, x.mean()), (points.low, x.min()), (points.high, x.max())):
          _put(values, n, float(value), math.nan)
    elif found := _ROUTER.fullmatch(key):
      layer, metric = found.groups()
      if metric == "load":
        if (shares := _shares(bucket, key)).size:
          _put(log.loads.setdefault(layer, []), n, shares.mean(0).tolist(), None)
      elif (x := _numbers(bucket, key)).size:
        _put(log.layers.setdefault(layer, {}).setdefault(metric, []), n, float(x.mean()), math.nan)


def _numbers(bucket: list[dict[str, Any]], key: str) -> np.ndarray:
  """The finite values of a key."""
  try:
    x = np.array([row[key] for row in bucket if key in row], np.float64)
  except (ValueError, TypeError):
    x = np.array([row[key] for row in bucket if is_number(row.get(key))], np.float64)
  return x[np.isfinite(x)] if x.ndim == 1 else np.zeros(0)


def _shares(bucket: list[dict[str, Any]], key: str) -> np.ndarray:
  """The lists of a key that are as long as the last one and finite, a row each."""
  lists = [row[key] for row in bucket if isinstance(row.get(key), list)]
  try:
    x = np.array([shares for shares in lists if len(shares) == len(lists[-1])], np.float64)
  except (ValueError, TypeError):
    return np.zeros(0)
  return x[np.isfinite(x).all(1)] if x.ndim == 2 else np.zeros(0)


def _put(values: list, n: int, value: Any, missing: Any) -> None:
  """values[n] = value, with `missing` before it where buckets lacked it."""
  values.extend([missing] * (n - len(values)))
  values.append(value)


def is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

