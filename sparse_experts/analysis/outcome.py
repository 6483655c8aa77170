"""What a sweep found, for pictures: final figures and training curves by arm and seed, as one JSON object."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from sparse_experts.analysis.compare import Group
from sparse_experts.results import Result, own_seconds

MOST_POINTS = 200  # of a curve

Outcome = dict[str, Any]


def outcome(groups: Sequence[Group], baseline: str) -> Outcome:
  """`unit`, `baseline`, and of `arms` each {"seeds": number, "values": {seed: final figure}, "curves": {seed:
  {"step", "minutes", "loss"}}}. Seeds are text, as in JSON; diverged runs have no value.
  """
  return {"unit": groups[0].unit, "baseline": baseline, "arms": {group.name: {
      "seeds": len(group.runs), "values": {str(seed): value for seed, value in group.values.items()},
      "curves": {str(seed): curve(run) for seed, run in group.runs.items()}} for group in groups}}


def curve(run: Result) -> dict[str, list[float]]:
  """Training loss by step and by minutes of training, from at most MOST_POINTS of a run's logged rows.

  A row stands for the steps since the row before it, also where a resumed run logs again. Evaluation, saving
  and compiling are left out of the minutes.
  """
  rows = [row for row in run.rows if "loss" in row and "seconds_per_step" in row]
  step_N = np.array([row["step"] for row in rows], np.float64)
  seconds_N = np.diff(step_N, prepend=0) * np.array([own_seconds(row) for row in rows], np.float64)
  shown = slice((len(rows) - 1) % (every := max(math.ceil(len(rows) / MOST_POINTS), 1)), None, every)
  return {"step": [int(step) for step in step_N[shown]],
          "minutes": [round(float(m), 4) for m in np.cumsum(seconds_N)[shown] / 60],
          "loss": [round(float(row["loss"]), 5) for row in rows[shown]]}
