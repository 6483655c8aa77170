"""The one JSON object that a page shows: tables are rendered from it, figures are drawn from it.

    {"schema": 1, "title", "made": "2026-01-31 12:00 UTC", "here": {package: version on this machine},
     "groups":     [{"name", "colour": "#rrggbb", "runs": [index into runs]}],   runs of one config
     "runs":       [RUN],
     "comparison": null of one run, else
                   {"baseline", "unit", "one_unit": whether all have it,
                    "why_not": why nothing is compared, or "",
                    "groups": [{"name", "values": {seed: final figure}, "mean", "deviation",
                                "half": of the mean's 95% interval, "runs", "diverged",
                                "difference": null | {"mean", "half": paired, "pairs"}}],
                    "t": {number of pairs: half a 95% t-interval, in standard errors},
                    "drops": what is to be said if groups dropped different shares, or "",
                    "table": TABLE, "config": null | TABLE of the keys that differ},
     "sweep":      null | TABLE,
     "summary":    plain text for a bug report,
     "left_out":   [what was left out to keep the page small]}

    TABLE = {"head": [text], "rows": [[text]]}, with "notes": [text] if it has some
    X     = {"step": [..], "tokens": [..] | null, "flops": [..] | null, "seconds": [..]}, positions of points
    RUN   = {"name", "workdir", "seed", "state", "step", "steps", "bucket": rows per point, "primary", "unit",
             "loss_unit", "diverged", "x": X,
             "curves": {"loss" | "learning_rate" | "grad_norm" | "tokens_per_second":
                        {"mean": [..], "low": [..] | null, "high": [..] | null}},
             "validation": null | {"x": X, "value": [..], "unit"},
             "non_finite": {name: {"steps": [..], "count"}}, "details": whether it has what follows,
             "config": [{"key", "value", "default", "differs", "affects", "meaning"}],
             "facts": [[name, text]], "columns": [index into x at which a column of the layers ends],
             "layers": [LAYER], "percentiles": null | {figure: {"0" | "10" | "50" | "90" | "100": [..]}},
             "table": TABLE with "evaluations": TABLE, "cards": null | `cards.cards` without its layers,
             "tiles": [{"label", "value", "detail"}], "notes": [text], "not_measured": [text]}
    LAYER = {"name", "experts", "k", "series": {figure of `log.LOGGED`: [..] | null if not logged},
             "load": null | {"experts": [name of each row], "even": [[..] per row: share times their number],
                             "largest", "last": [..]},
             "measured": the layer's part of `cards.cards`, if there are cards}

Numbers have five significant digits, those of "comparison" all of theirs; what is missing or not
finite is null.
"""

import datetime
from collections.abc import Callable, Sequence
from typing import Any

from sparse_experts.analysis.compare import Group
from sparse_experts.report import groups as grouping
from sparse_experts.report import log, run, summary
from sparse_experts.report.colours import colours
from sparse_experts.report.read import read

SCHEMA = 1
MOST_DETAILED = 4  # runs that are shown with layers, cards and config
MOST_POINTS = 24_000  # of a curve, over all runs
FEWEST_POINTS = 60


def make(paths: Sequence[str], cards: run.Measure | None, say: Callable[[str], None] = lambda text: None,
         sweep: str | None = None) -> dict[str, Any]:
  """The blob of runs, folders of runs or arms at `paths`, or of the sweep's result at `sweep`.

  cards: measures a run's model, given its folder; None leaves that out. say: is told what takes long.
  Raises UserError for a folder that is no run, naming it.
  """
  arms = grouping.sweep_arms(sweep) if sweep else grouping.arms(paths)
  number = sum(len(arm.folders) for arm in arms)
  points = max(FEWEST_POINTS, min(log.POINTS, MOST_POINTS // number))
  found = {folder: read(folder, points) for arm in arms for folder in arm.folders}
  pairs = [pair for arm in arms
           for pair in grouping.split(arm, [found[folder].result for folder in arm.folders])]
  colour = colours(arm.name for arm, _ in pairs)

  runs: list[dict[str, Any]] = []
  group_rows = []
  for n, (arm, _) in enumerate(pairs):
    group_rows.append({"name": arm.name, "colour": colour[arm.name],
                       "runs": list(range(len(runs), len(runs) + len(arm.folders)))})
    for i, folder in enumerate(arm.folders):
      one = found[folder]
      name = arm.name if len(arm.folders) == 1 else f"{arm.name}, seed {one.result.seed}"
      if i or n >= MOST_DETAILED:
        runs.append(run.curves(one, name))
      else:
        measured, why = run.measured(folder, cards, say)
        runs.append(run.make(one, name, measured, why, run.COLUMNS if number == 1 else run.COLUMNS // 2))
  table = grouping.read_table(sweep) if sweep else None
  comparison = None
  if number > 1:
    comparison = grouping.comparison([group for _, group in pairs], grouping.baseline_of(table),
                                     {folder: of.log for folder, of in found.items()})
  here = summary.versions()
  return {"schema": SCHEMA, "title": _title(paths, sweep), "made": _now(), "here": here, "groups": group_rows,
          "runs": runs, "comparison": comparison, "sweep": table,
          "summary": summary.text(runs, comparison, here), "left_out": _left_out(pairs, sweep)}


def _left_out(pairs: Sequence[tuple[grouping.Arm, Group]], sweep: str | None) -> list[str]:
  """What the page lacks of runs, each with the command that shows it."""
  groups, lacks = [arm for arm, _ in pairs], []
  has_experts = lambda config: config.model.num_experts or config.model.decoder.num_experts
  sparse = [arm for arm, group in pairs if any(has_experts(each.config) for each in group.runs.values())]
  if len(groups) > MOST_DETAILED:
    arm = groups[MOST_DETAILED]
    lacks.append(f"layers, cards and config of {len(groups) - MOST_DETAILED} more; "
                 f"`{run.report_call(arm.folders[0])}` shows those of {arm.name}")
  elif other := next((arm.folders[1] for arm in groups if len(arm.folders) > 1), None):
    lacks.append("layers, cards and config of all seeds but the first; "
                 f"`{run.report_call(other)}` shows one more")
  if sweep:
    calls = [f"{arm.name}: `{run.report_call(arm.folders[0])}`" for arm in sparse[:MOST_DETAILED]]
    lacks += [f"expert cards of a sweep; of one run they are made by, of {', '.join(calls)}"] if calls else []
  return lacks


def _title(paths: Sequence[str], sweep: str | None) -> str:
  names = grouping.short_names([sweep] if sweep else paths)
  shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
  return f"sweep {shown}" if sweep else shown


def _now() -> str:
  return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
