"""Which runs a page is about, in groups of one config; paired differences; a sweep's table."""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sparse_experts import storage
from sparse_experts.analysis import compare, table
from sparse_experts.analysis.balance import unequal_drops
from sparse_experts.config import flat
from sparse_experts.errors import UserError
from sparse_experts.report.config_table import show
from sparse_experts.report.log import Log
from sparse_experts.report.numbers import exact, one
from sparse_experts.results import Result
from sparse_experts.small_files import Damaged, read_text


@dataclasses.dataclass(frozen=True)
class Arm:
  """Folders of runs of one config, by the name that the page calls them."""

  name: str
  folders: tuple[str, ...]


def is_sweep(path: str) -> bool:
  """Whether a folder is the result of a sweep: it has a folder with runs.json for each arm."""
  return bool(_arms_of(path))


def sweep_arms(path: str) -> list[Arm]:
  """The arms of a sweep's result, in the order of its table."""
  names = _arms_of(path)
  if not names:
    what = ("has no folder of an arm with runs.json" if storage.is_folder(path) else
            "is a file" if storage.exists(path) else "does not exist")
    above = os.path.dirname(storage.absolute(path))
    there = [name for name in _folders(above) if is_sweep(os.path.join(above, name))]
    way_out = (f"name a sweep's result, for example --sweep={os.path.join(os.path.dirname(path), there[0])}"
               if there else
               "name the folder that `sweep` printed at its end, for example runs/sweeps/sparse_vs_dense")
    raise UserError(f"--sweep={path} {what}; {way_out}")
  listed = [row[0] for row in (read_table(path) or {"rows": []})["rows"] if row]
  order = {name: i for i, name in enumerate(listed)}
  return [Arm(name, tuple(compare.run_folders(os.path.join(path, name))))
          for name in sorted(names, key=lambda name: (order.get(name, len(order)), name))]


def arms(paths: Sequence[str]) -> list[Arm]:
  """The groups that these folders are: runs, folders of runs of one config, arms or whole sweeps.

  Raises UserError for a run that is named twice: it would count as two. Sweeps may share runs.
  """
  found: list[Arm] = []
  by: dict[str, str] = {}  # path that named the run
  for path in paths:
    sweep = is_sweep(path)
    its = [dataclasses.replace(arm, name=os.path.join(path, arm.name)) for arm in sweep_arms(path)] if sweep \
        else [Arm(path, tuple(compare.run_folders(path)))]
    for folder in dict.fromkeys(storage.real(folder) for arm in its for folder in arm.folders):
      other = by.get(folder)
      if other is not None and not (sweep and is_sweep(other) and storage.real(path) != storage.real(other)):
        raise UserError(f"run {storage.relative(folder, '.')} is named by {other} and again by {path}; "
                        "name each run once")
      by[folder] = path
    found += its
  names = short_names([arm.name for arm in found])
  return [dataclasses.replace(arm, name=name) for arm, name in zip(found, names)]


def short_names(paths: Sequence[str]) -> list[str]:
  """The last parts of all paths, as few as tell them apart: runs/a/0, runs/b/0 are a/0, b/0."""
  parts = [storage.absolute(path).split(os.sep) for path in paths]
  distinct, longest = len(set(map(tuple, parts))), max(map(len, parts))
  enough = next(n for n in range(1, longest + 1) if len({tuple(of[-n:]) for of in parts}) == distinct)
  return ["/".join(of[-enough:]) or path for of, path in zip(parts, paths)]


def split(arm: Arm, results: Sequence[Result]) -> list[tuple[Arm, compare.Group]]:
  """The group of an arm, or a group per run if its runs are of several configs or of one seed."""
  try:
    return [(arm, compare.group_of(arm.name, results))]
  except UserError:
    return [(alone := Arm(f"{arm.name}/{_name(folder)}", (folder,)), compare.group_of(alone.name, [result]))
            for folder, result in zip(arm.folders, results)]


def comparison(groups: Sequence[compare.Group], baseline: str | None,
               logs: Mapping[str, Log]) -> dict[str, Any]:
  """Final figures of each group, and its paired difference to the baseline: see `blob.py`.

  baseline: its name; else the last group, as `compare A B` prints A minus B. logs: of runs, by workdir.
  """
  base = next((group for group in groups if group.name == baseline), groups[-1])
  try:
    compare.check(groups)
    why = ""
  except UserError as e:
    why = " ".join(str(e).split())
  units = list(dict.fromkeys(group.unit for group in groups))
  unit = units[0] if len(units) == 1 else "final figure"
  entries = []
  for group in groups:
    own, paired = compare.spread(group.values.values()), compare.difference(group, base)
    entry: dict[str, Any] = {
        "name": group.name, "values": {str(seed): exact(v) for seed, v in group.values.items()},
        "mean": exact(own.mean), "deviation": exact(own.deviation), "half": exact(own.half),
        "runs": len(group.runs), "diverged": group.diverged, "difference": None}
    if group is not base and not why and paired.n:
      entry["difference"] = {"mean": exact(paired.mean), "half": exact(paired.half), "pairs": paired.n}
    entries.append(entry)
  head, rows, notes = table.table(groups, base.name, None, lambda run: _times(logs[run.workdir]), "run",
                                  paired=not why)
  most = max(len(group.runs) for group in groups)
  drops = unequal_drops({group.name: [_dropped(logs[run.workdir]) for run in group.runs.values()]
                         for group in groups})
  return {"baseline": base.name, "unit": unit, "one_unit": len(units) == 1, "groups": entries, "why_not": why,
          "drops": drops, "t": {str(n): one(compare.quantile(n)) for n in range(2, most + 1)},
          "table": {"head": head, "rows": rows, "notes": notes}, "config": _config(groups)}


def _times(log: Log) -> tuple[float, float] | None:
  return None if log.step_seconds is None or not log.seconds else (log.seconds[-1], log.step_seconds)


def _dropped(log: Log) -> float | None:
  """`balance.mean_dropped` of a log that was read in points."""
  shares = [np.array(of["dropped"]) for of in log.layers.values() if "dropped" in of]
  return max((float(np.nanmean(x)) for x in shares if np.isfinite(x).any()), default=None)


def _config(groups: Sequence[compare.Group]) -> dict[str, Any] | None:
  """The keys in which the groups' configs differ."""
  first = [next(iter(group.runs.values())) for group in groups]
  if len(first) < 2:
    return None
  keys: dict[str, None] = {}
  for other in first[1:]:
    keys |= dict.fromkeys(compare.config_differences(first[0], other))
  values = [flat(run.config) for run in first]
  return {"head": ["key", *(group.name for group in groups)],
          "rows": [[key, *(show(of.get(key)) for of in values)] for key in keys]}


def read_table(path: str) -> dict[str, Any] | None:
  """table.md of a sweep's result: {"head": [..], "rows": [[..]], "notes": [text]}; None if there is none."""
  try:
    lines = read_text(os.path.join(path, "table.md"), "").splitlines()
  except (FileNotFoundError, Damaged):
    return None
  cells = [[cell.strip() for cell in line.strip().strip("|").split("|")]
           for line in lines if line.startswith("|")]
  cells = [row for row in cells if set("".join(row)) - set("-: ")]
  if not cells:
    return None
  text = [line.strip() for line in lines if line.strip() and not line.startswith("|")]
  notes = [note for line in text for note in (  # of older versions they are one paragraph
      [line[2:]] if line.startswith("- ") else re.split(r"(?<=\.) (?=\w)", line))]
  return {"head": cells[0], "rows": [row for row in cells[1:] if len(row) == len(cells[0])], "notes": notes}


def baseline_of(table: dict[str, Any] | None) -> str | None:
  """The arm that a sweep's table subtracts."""
  heads = [head for head in (table or {"head": []})["head"] if head.startswith("minus ")]
  return heads[0].removeprefix("minus ") if heads else None


def _arms_of(path: str) -> list[str]:
  return [name for name in _folders(path) if storage.exists(os.path.join(path, name, "runs.json"))]


def _folders(path: str) -> list[str]:
  try:
    return storage.names(path)
  except OSError:
    return []


def _name(path: str) -> str:
  return os.path.basename(storage.absolute(path)) or path
