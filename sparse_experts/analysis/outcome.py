"""What a sweep found, for pictures: final figures and training curves by arm and seed, as one JSON object."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from sparse_experts.analysis.balance import collapsed
from sparse_experts.analysis.compare import Group
from sparse_experts.results import Result, own_seconds

MOST_POINTS = 200  # of a curve

Outcome = dict[str, Any]


def outcome(groups: Sequence[Group], baseline: str) -> Outcome:
  """`unit`, `baseline`, and of `arms` each {"values": {seed: final figure}, "remarks": [text],
  "curves": {seed: {"step", "minutes", "loss"}}}. Seeds are text, as in JSON; diverged runs have no value.
  """
  return {"unit": groups[0].unit, "baseline": baseline, "arms": {group.name: {
      "values": {str(seed): value for seed, value in group.values.items()}, "remarks": remarks(group),
      "curves": {str(seed): curve(run) for seed, run in group.runs.items()}} for group in groups}}


def remarks(group: Group) -> list[str]:
  """What must stand next to an arm's figures: runs that diverged, experts that are mostly dead."""
  lost = [f"{group.diverged} of {len(group.runs)} runs diverged"] if group.diverged else []
  return lost + [text for text in [collapsed(group.runs.values())] if text]


def curve(run: Result) -> dict[str, list[float]]:
  """Training loss by step and by minutes of training, from at most MOST_POINTS of a run's logged rows."""
  rows = _rows(run)
  shown = slice((len(rows) - 1) % (every := max(math.ceil(len(rows) / MOST_POINTS), 1)), None, every)
  return {"step": [row["step"] for row in rows[shown]],
          "minutes": [round(float(seconds) / 60, 4) for seconds in _seconds(rows)[shown]],
          "loss": [round(float(row["loss"]), 5) for row in rows[shown]]}


def train_seconds(run: Result) -> float:
  """Training time, without compiling, evaluation and saving."""
  return float(_seconds(_rows(run))[-1:].sum())


def _rows(run: Result) -> list[dict[str, Any]]:
  return [row for row in run.rows if math.isfinite(row.get("loss", math.nan)) and "seconds_per_step" in row]


def _seconds(rows: Sequence[dict[str, Any]]) -> np.ndarray:
  """Of training up to each row, which stands for the steps since the row before it, also after a resume."""
  step_N = np.array([row["step"] for row in rows], np.float64)
  return np.cumsum(np.diff(step_N, prepend=0) * np.array([own_seconds(row) for row in rows], np.float64))
