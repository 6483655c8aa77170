"""One run as a part of the blob: its curves, layers, table, and what is said of it."""

import shlex
from collections.abc import Callable
from typing import Any

from sparse_experts.errors import UserError
from sparse_experts.report import config_table, facts, layers
from sparse_experts.report.log import LOGGED
from sparse_experts.report.numbers import clock, number, one, rounded
from sparse_experts.report.read import Read

Measure = Callable[[str], dict[str, Any]]  # `cards.cards`
PASSES = 3  # training FLOPs over those of a forward pass: see docs/measures.md
COLUMNS = 200  # of a heat map
EVALUATIONS = 200  # points of validation
TABLE_ROWS = 20
TITLES = {"loss": "training loss", "learning_rate": "learning rate", "grad_norm": "gradient norm",
          "tokens_per_second": "tokens per second"}


def make(run: Read, name: str, cards: dict[str, Any] | None, why_no_cards: str,
         columns: int = COLUMNS) -> dict[str, Any]:
  """The run's part of the blob, with details: see `blob.py`."""
  found = layers.make(run.log, run.config, columns)
  for measured in (cards or {}).get("layers") or []:
    _of_name(found["layers"], measured)["measured"] = measured
  model = (cards or {}).get("model")
  return curves(run, name, model and model.get("flops_per_token")) | found | {
      "details": True, "config": config_table.rows(run.config, run.unknown), "facts": facts.facts(run),
      "table": _table(run), "cards": cards and {k: v for k, v in cards.items() if k != "layers"},
      "tiles": facts.tiles(run, found["layers"], cards), "notes": facts.notes(run),
      "not_measured": facts.not_measured(run, found["layers"], cards, why_no_cards)}


def curves(run: Read, name: str, flops_per_token: float | None = None) -> dict[str, Any]:
  """What several runs are drawn together from. flops_per_token: of a forward pass, where the log lacks it."""
  found = run.log
  tokens, flops = found.tokens_per_step, found.about.get("model_flops_per_step")
  if flops is None and tokens and flops_per_token:
    flops = PASSES * flops_per_token * tokens
  x = lambda steps, seconds: {
      "step": steps, "tokens": [s * tokens for s in steps] if tokens else None,
      "flops": rounded(flops * s for s in steps) if flops else None, "seconds": rounded(seconds)}
  bands = found.bucket > 1
  figures = {key: {"mean": rounded(p.mean), "low": rounded(p.low) if bands else None,
                   "high": rounded(p.high) if bands else None}
             for key in TITLES if (p := found.curves.get(key))}
  validation, evaluated = None, "loss" if "loss" in found.evaluations else run.task.primary
  if points := _thinned(found.evaluations.get(evaluated, []), EVALUATIONS):
    steps, seconds, values = (list(column) for column in zip(*points))
    validation = {"x": x(steps, seconds), "value": rounded(values),
                  "unit": run.loss_unit if evaluated == "loss" else run.task.unit}
  return {"name": name, "workdir": run.result.workdir, "seed": run.result.seed, "state": run.state,
          "step": found.last_step, "steps": run.config.train.steps, "bucket": found.bucket, "details": False,
          "primary": one(run.result.primary, 6), "unit": run.task.unit, "loss_unit": run.loss_unit,
          "diverged": run.result.diverged,
          "x": x(found.step, found.seconds), "curves": figures, "validation": validation,
          "non_finite": {key: {"steps": steps, "count": found.non_finite_count[key]}
                         for key, steps in found.non_finite.items()}}


def measured(workdir: str, cards: Measure | None,
             say: Callable[[str], None]) -> tuple[dict[str, Any] | None, str]:
  """(the cards, or None; why there are none)."""
  if cards is None:
    return None, f"left out; `{report_call(workdir)}` measures them"
  try:
    return cards(workdir), ""
  except UserError as e:
    say(f"no expert cards: {e}")
    return None, " ".join(str(e).split())


def report_call(workdir: str) -> str:
  """The command that makes the page of one run, with its cards."""
  return f"python -m sparse_experts report --workdir={shlex.quote(workdir)}"


def _thinned(values: list, most: int) -> list:
  """At most `most` of them, evenly, the first and the last among them."""
  if len(values) <= most:
    return values
  return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def _table(run: Read) -> dict[str, Any]:
  """Figures by step for a reader without pictures: every so-many-th point, and the evaluations."""
  found = run.log
  keys = [key for key in TITLES if key in found.curves]
  rows = []
  for i in _thinned(list(range(len(found.step))), TABLE_ROWS):
    values = [found.curves[key].mean[i] if i < len(found.curves[key].mean) else None for key in keys]
    rows.append([number(found.step[i]), clock(found.seconds[i]), *map(number, values)])
  evaluations = [[number(step), clock(seconds), number(value)] for step, seconds, value in _thinned(
      found.evaluations.get(run.task.primary, []), TABLE_ROWS)]
  return {"head": ["step", "training time", *(TITLES[key] for key in keys)], "rows": rows,
          "evaluations": {"head": ["step", "training time", run.task.unit], "rows": evaluations}}


def _of_name(found: list[dict[str, Any]], measured: dict[str, Any]) -> dict[str, Any]:
  """The layer of the log that was measured; one without figures of the log if it has none of that name."""
  for layer in found:
    if layer["name"] == measured["name"]:
      return layer
  found.append({"name": measured["name"], "experts": measured["num_experts"], "k": measured.get("k"),
                "load": None, "series": dict.fromkeys(LOGGED)})
  return found[-1]
