"""The one JSON object that a page shows: tables are rendered from it, figures are drawn from it.

    {"schema": 1, "title", "made": "2026-01-31 12:00 UTC", "here": {package: version of this machine},
     "groups":     [{"name", "colour": "#rrggbb", "runs": [index into runs]}],   runs of one config
     "runs":       [RUN],
     "comparison": null of one run, else {"baseline", "unit", "why_not": "" or why nothing is compared,
                   "groups": [{"name", "values": {seed: final figure}, "mean", "deviation", "half": of the mean's 95%
                               interval, "runs", "diverged", "difference": null | {"mean", "half", "pairs"}}],
                   "table": TABLE, "config": null | TABLE of the keys that differ},
     "sweep":      null | TABLE with "notes",
     "summary":    plain text for a bug report,
     "left_out":   [sentences: what was left out to keep the page small]}

    TABLE = {"head": [text], "rows": [[text]]}
    X     = {"step": [..], "tokens": [..] | null, "flops": [..] | null, "seconds": [..]}   positions of points
    RUN   = {"name", "workdir", "seed", "state", "step", "steps", "bucket": rows per point, "primary", "unit",
             "diverged", "x": X, "curves": {"loss" | "learning_rate" | "grad_norm" | "tokens_per_second":
             {"title", "unit", "mean": [..], "low": [..] | null, "high": [..] | null}},
             "validation": null | {"x": X, "value": [..], "unit"}, "non_finite": {name: {"steps": [..], "count"}},
             "details": true, and then:
             "config": [{"key", "value", "default", "differs", "affects", "meaning"}], "facts": [[name, text]],
             "columns": [index into x: where each column of the layers' series ends], "layers": [LAYER],
             "percentiles": null | {figure: {"0": series, "10": .., "50": .., "90": .., "100": ..}}, "table": TABLE,
             "cards": null | the dict of `cards.cards` without its layers, "tiles": [{"label", "value", "detail"}],
             "notes": [text], "not_measured": [text]}
    LAYER = {"name", "experts", "k", "series": {figure: [..] | null if not logged},   figures: `layers.LOGGED`
             "load": null | {"experts": [names], "even": [[..] per expert: share times their number], "largest", "last"},
             "measured": the layer's dict of `cards.cards`, if there are cards}

Numbers have five significant digits; what is missing or not finite is null.
"""

import datetime
import os
from collections.abc import Callable, Sequence
from typing import Any

from sparse_experts.report import groups as grouping
from sparse_experts.report import log, run, summary
from sparse_experts.report.colours import colours

SCHEMA = 1
MOST_DETAILED = 4  # runs that are shown with layers, cards and config
MOST_POINTS = 24_000  # of a curve, over all runs


def make(paths: Sequence[str], cards: run.Cards | None, say: Callable[[str], None] = lambda text: None,
         sweep: str | None = None) -> dict[str, Any]:
  """The blob of runs, folders of runs or arms at `paths`, or of the sweep's result at `sweep`.

  cards: what measures a run's model, given its folder; None leaves that out. say: is told what takes long.
  Raises UserError for a folder that is no run, naming it.
  """
  arms = grouping.sweep_arms(sweep) if sweep else grouping.arms(paths)
  number = sum(len(arm.folders) for arm in arms)
  points = max(60, min(log.POINTS, MOST_POINTS // number))
  reads = {folder: run.read(folder, points) for arm in arms for folder in arm.folders}
  pairs = [pair for arm in arms for pair in grouping.split(arm, [reads[folder].result for folder in arm.folders])]
  colour = colours(arm.name for arm, _ in pairs)

  runs, group_rows, detailed = [], [], 0
  for arm, group in pairs:
    group_rows.append({"name": arm.name, "colour": colour[arm.name],
                       "runs": list(range(len(runs), len(runs) + len(arm.folders)))})
    for i, folder in enumerate(arm.folders):
      read = reads.pop(folder)
      name = arm.name if len(arm.folders) == 1 else f"{arm.name}, seed {read.result.seed}"
      if i == 0 and detailed < MOST_DETAILED:
        detailed += 1
        measured, why = run.cards_of(folder, cards, say)
        runs.append(run.make(read, name, measured, why, run.COLUMNS // (1 if number == 1 else 2)) | {"details": True})
      else:
        runs.append(run.curves(read, name) | {"details": False})
  table = grouping.read_table(sweep) if sweep else None
  comparison = grouping.comparison([group for _, group in pairs], grouping.baseline_of(table)) if len(
      pairs) > 1 or number > 1 else None
  here = summary.versions()
  left_out = []
  if (rest := len(pairs) - detailed) > 0:
    left_out.append(f"layers, cards and config of {rest} more: write `report --workdir=DIR` for one of them")
  elif number > len(pairs):
    left_out.append("layers, cards and config are of the first seed of each; `report --workdir=DIR` shows another")
  return {"schema": SCHEMA, "title": _title(paths, sweep), "made": _now(), "here": here, "groups": group_rows,
          "runs": runs, "comparison": comparison, "sweep": table,
          "summary": summary.text(runs, comparison, here), "left_out": left_out}


def _title(paths: Sequence[str], sweep: str | None) -> str:
  names = [os.path.basename(os.path.abspath(path)) or path for path in ([sweep] if sweep else paths)]
  shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
  return f"sweep {shown}" if sweep else shown


def _now() -> str:
  return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
