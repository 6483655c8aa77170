"""The pictures that commands draw: arms of a sweep, two groups compared, domains by expert."""

import os
from collections.abc import Mapping, Sequence
from itertools import zip_longest

import numpy as np

from sparse_experts.analysis import summary
from sparse_experts.analysis.compare import Group
from sparse_experts.analysis.outcome import Outcome, outcome
from sparse_experts.report import plots
from sparse_experts.report.picture import Picture

MOST_DOMAINS = 24
_TOGETHER = 3  # arms whose bands are still told apart in one panel


def arms(found: Outcome) -> Picture:
  """Final figures by seed and their paired differences to the baseline; training losses by step and time, and
  their paired differences, of many arms in a panel each.

  found: of `analysis.outcome`.
  """
  base, unit, names = found["baseline"], found["unit"], list(found["arms"])
  values = {name: arm["values"] for name, arm in found["arms"].items()}
  others = [name for name in names if name != base and base in names]
  shared = [others] if len(others) <= _TOGETHER else [[name] for name in others]
  rows = ["\n".join([name, *arm["remarks"]]) for name, arm in found["arms"].items()]
  layout, heights = _layout(rows, len(shared) if others else 0)
  picture, (final, paired, by_step, by_time, *by_arm) = plots.panels(
      layout, 9.0, sum(heights) + 0.4, arms=names, height_ratios=heights)

  means = {name: (plots.interval(of)[0], np.nan, np.nan) for name, of in values.items()}
  plots.seeds(final, values, f"final figure, {unit}", intervals=means)
  final.set_yticks(range(len(names)), rows)
  plots.title(final, "a point per seed, a tick at their mean")
  minus = {name: [of[s] - values[base][s] for s in of if s in values[base]] if name in others else []
           for name, of in values.items()}
  plots.seeds(paired, minus, f"minus {base}, {unit}", line=0)
  paired.tick_params(labelleft=False)
  plots.title(paired, "the same, minus the baseline's of equal seed;\nmean and its 95% t-interval")

  curves = {name: {s: (c["step"], c["loss"]) for s, c in arm["curves"].items()}
            for name, arm in found["arms"].items()}
  plots.curves(by_step, curves, "step", "training loss, nats")
  plots.curves(by_time, {name: _over_time(arm["curves"]) for name, arm in found["arms"].items()},
               "training time, minutes", "training loss, nats")
  for axes, some in zip(by_arm, shared):
    what = "baseline" if len(shared) > 1 else base
    plots.differences(axes, {name: curves[name] for name in (*some, base)}, base,
                      "step, after the first fifth", f"minus {what}, nats")
    plots.title(axes, some[0] if len(shared) > 1 else "paired by seed: mean\nand its 95% t-interval")
  if len(by_arm) > 1:
    plots.share_height(by_arm)
  plots.legend(picture)
  return picture


def domains(traced: summary.Columns, num_experts: Mapping[str, int], domains: Sequence[str]) -> Picture:
  """A panel per layer, of the last step: rows are the largest domains, columns experts, and the colour is the
  share of the domain's assignments that the expert takes."""
  step = traced["step"].max()
  loads = {layer: summary.domain_loads(summary.rows_of(traced, step, layer), len(domains), experts)
           for layer, experts in num_experts.items()}
  size_D = sum(count_DE.sum(1) for count_DE in loads.values())
  shown = [d for d in np.argsort(-size_D, kind="stable")[:MOST_DOMAINS] if size_D[d]]
  picture, panels = plots.panels("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:len(loads)], 2 + 3 * len(loads),
                                 1.2 + 0.22 * len(shown))
  for axes, (layer, count_DE) in zip(panels, loads.items()):
    share_DE = count_DE[shown] / np.maximum(count_DE[shown].sum(1, keepdims=True), 1)
    plots.heat(axes, share_DE, [domains[d] for d in shown], "expert", "share of the domain's assignments",
               percent=True)
    plots.title(axes, f"{layer} at step {step}")
  return picture


def compared(a: Group, b: Group) -> Picture:
  """The picture of two groups, named by what tells their folders apart; b is the baseline."""
  a, b = (Group(name, group.runs) for name, group in zip(short_names(a.name, b.name), (a, b)))
  return arms(outcome([a, b], b.name))


def short_names(a: str, b: str) -> tuple[str, str]:
  """Two paths from where they part; of the same path with (a) and (b)."""
  parts = [os.path.normpath(path).split(os.sep) for path in (a, b)]
  if parts[0] == parts[1]:
    return f"{parts[0][-1]} (a)", f"{parts[1][-1]} (b)"
  same = next(i for i, (one, other) in enumerate(zip_longest(*parts)) if one != other)
  short = [_elided("/".join(path[same:] or path[-1:])) for path in parts]
  return short[0], short[1]


def _elided(name: str, most: int = 32) -> str:
  return name if len(name) <= most else f"{name[:most // 2 - 1]}…{name[-most // 2:]}"


def _layout(rows: Sequence[str], differences: int) -> tuple[str, list[float]]:
  """Panels A to D and then one for each difference, and the heights of their rows in inches.

  Without differences losses share a row; one has room next to them; more have rows of four of their own.
  """
  final = 0.9 + len(rows) * (0.34 + 0.14 * max(row.count("\n") for row in rows))
  if differences <= 1:
    return "AB;CDE"[:5 + differences], [final, 2.8]
  letters = "".join(chr(ord("E") + i) for i in range(differences))
  more = [letters[i:i + 4].ljust(4, ".") for i in range(0, differences, 4)]
  return ";".join(["AB", "CD", *more]), [final, 2.8, *[1.9] * len(more)]


def _over_time(curves: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[int, plots.Curve]:
  """The mean over seeds, if all were logged at the same steps: else each of them."""
  minutes, losses = ([c[name] for c in curves.values()] for name in ("minutes", "loss"))
  if len({tuple(c["step"]) for c in curves.values()}) == 1:
    return {0: (np.mean(minutes, 0), np.mean(losses, 0))}
  return dict(enumerate(zip(minutes, losses)))
