"""Every run next to the published mean and two of its deviations: accuracy, and how experts specialise."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from experiments.understanding_moe.published import ACCURACY, ENTROPY
from sparse_experts.report import plots
from sparse_experts.report.picture import Picture


def draw(runs: Iterable[Mapping[str, Any]]) -> Picture:
  runs = list(runs)
  picture, (accuracy, entropy) = plots.panels("AAABB", 9.5, 4.2, arms=ACCURACY[1])
  for axes, figure, published, scale, most, label in (
      (accuracy, "accuracy", ACCURACY, 100, 100, "test accuracy, %"),
      (entropy, "entropy", ENTROPY, 1, math.log(4), "dispatch entropy, nats")):
    values: dict[str, dict[str, list[float]]] = {model: {} for model in ACCURACY[1]}
    for run in runs:
      if run["model"] in published[run["setting"]]:
        values[run["model"]].setdefault(f"setting {run['setting']}", []).append(scale * run[figure])
    bands = {model: {f"setting {setting}": _band(*of[model], most) for setting, of in published.items()
                     if model in of} for model in values}
    plots.grouped(axes, values, label, references=bands)
  entropy.axhline(math.log(4), color="0.35", lw=1)
  plots.title(accuracy, "points: runs; bars: published mean ± 2 deviations, where these are known")
  plots.title(entropy, "0: an expert sees one cluster; line, ln 4: all alike")
  plots.legend(picture, lines=False)
  return picture


def _band(mean: float, deviation: float | None, most: float) -> plots.Interval:
  """Two deviations to each side, as far as there are such values."""
  half = 2 * (deviation or 0.0)
  return mean, max(mean - half, 0), min(mean + half, most)
