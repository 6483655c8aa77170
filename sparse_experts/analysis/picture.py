"""Draws the arms of a sweep: every run's final figure, each arm's mean and interval, and training losses."""

from collections.abc import Sequence

import numpy as np

from sparse_experts.analysis.compare import Group, spread
from sparse_experts.results import own_seconds


def draw(groups: Sequence[Group], path: str) -> None:
  """A PNG of three panels: final primary figure, training loss by step, and by time spent training."""
  from matplotlib.figure import Figure  # not pyplot, which would choose a window system

  figure = Figure(figsize=(13, 4), layout="constrained")
  final, by_step, by_time = figure.subplots(1, 3, width_ratios=(1, 1.3, 1.3))
  for seed in sorted({seed for group in groups for seed in group.values}):  # a line joins runs of one seed
    at = [i for i, group in enumerate(groups) if seed in group.values]
    final.plot(at, [groups[i].values[seed] for i in at], color="0.8", lw=1, zorder=0)
  for i, group in enumerate(groups):
    color, values = f"C{i}", list(group.values.values())
    of = spread(values)
    final.plot(np.full(len(values), i), values, "o", color=color, alpha=0.5)
    if of.n:
      final.errorbar(i + 0.2, of.mean, yerr=of.half, fmt="_", color=color, capsize=4)
    for n, run in enumerate(group.runs.values()):
      step, minutes, loss = curve(run)
      label = group.name if n == 0 else None
      by_step.plot(step, loss, color=color, alpha=0.6, lw=1, label=label)
      by_time.plot(minutes, loss, color=color, alpha=0.6, lw=1, label=label)
  lost = [f"\n{g.diverged} diverged" if g.diverged else "" for g in groups]
  final.set_xticks(range(len(groups)), [g.name + text for g, text in zip(groups, lost)],
                   rotation=30 if len(groups) > 3 else 0)
  final.set_xlim(-0.5, len(groups) - 0.3)
  final.set_title("a point per seed, runs of one seed joined;\nmean and its 95% t-interval", fontsize=9)
  final.set_ylabel(f"final {groups[0].unit}")
  by_step.set(xlabel="step", ylabel="training loss, nats each")
  by_time.set(xlabel="minutes of training, evaluation and saving aside")
  for panel in (by_step, by_time):
    panel.grid(alpha=0.3)
  by_step.legend(fontsize=8)
  figure.savefig(path, dpi=120)


def curve(run) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(step, minutes of training, training loss) of the logged rows of a run.

  A row stands for the steps since the row before it, also where a resumed run logs again.
  """
  rows = [row for row in run.rows if "loss" in row and "seconds_per_step" in row]
  step_N = np.array([row["step"] for row in rows], np.float64)
  seconds_N = np.diff(step_N, prepend=0) * np.array([own_seconds(row) for row in rows], np.float64)
  return step_N, np.cumsum(seconds_N) / 60, np.array([row["loss"] for row in rows], np.float64)
