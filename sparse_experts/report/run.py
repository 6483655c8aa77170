"""One run as a part of the blob: its curves, layers, config, facts, and what was not measured. No jax."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from sparse_experts.errors import UserError
from sparse_experts.report import config_table, layers, log
from sparse_experts.report.numbers import clock, loss, number, one, percent, rounded, short
from sparse_experts.results import Result, make_result
from sparse_experts.tasks import task_of

Cards = Callable[[str], dict[str, Any]]
PASSES = 3  # training FLOPs over those of a forward pass: see docs/measures.md
COLUMNS = 200  # of a heat map
TABLE_ROWS = 20
TITLES = {"loss": ("training loss", "nats per target"), "learning_rate": ("learning rate", ""),
          "grad_norm": ("gradient norm", ""), "tokens_per_second": ("tokens per second", "")}
NOT_LOGGED = "not logged"
VERSIONS = ("sparse_experts", "jax", "python")  # of `run` in the log


@dataclasses.dataclass(frozen=True)
class Read:
  """A run that was read, before it is laid out."""

  config: ConfigDict
  unknown: dict[str, Any]
  missing: list[str]
  log: log.Log
  result: Result


def read(workdir: str, points: int = log.POINTS) -> Read:
  """The run in `workdir`, going on or finished, of this or of another version."""
  config, unknown, missing = config_table.read(workdir)
  found = log.read(os.path.join(workdir, "metrics.jsonl"), ("loss", task_of(config).primary), points)
  result = make_result(workdir, config, (found.last,) if found.last else ())
  return Read(config, unknown, missing, found, result)


def make(run: Read, name: str, cards: dict[str, Any] | None, why_no_cards: str, columns: int = COLUMNS) -> dict[str, Any]:
  """The run's part of the blob, with the layers and cards."""
  found = layers.make(run.log, run.config, columns)
  if cards:
    _add_cards(found["layers"], cards)
  model = (cards or {}).get("model")
  made = curves(run, name, model and model.get("flops_per_token"))
  facts = _facts(run)
  return made | {
      "config": config_table.rows(run.config, run.unknown), "facts": facts, "layers": found["layers"],
      "columns": found["columns"], "percentiles": found["percentiles"], "table": _table(run),
      "cards": cards and {k: v for k, v in cards.items() if k != "layers"},
      "tiles": _tiles(run, found["layers"], cards), "notes": _notes(run),
      "not_measured": _not_measured(run, found["layers"], cards, why_no_cards)}


def curves(run: Read, name: str, flops_per_token: float | None = None) -> dict[str, Any]:
  """What several runs are drawn together from."""
  found, task = run.log, task_of(run.config)
  tokens, flops = found.tokens_per_step, found.about.get("model_flops_per_step")
  if flops is None and tokens and flops_per_token:
    flops = PASSES * flops_per_token * tokens
  x = lambda steps, seconds: {
      "step": steps, "tokens": [s * tokens for s in steps] if tokens else None,
      "flops": rounded(flops * s for s in steps) if flops else None,
      "seconds": rounded(seconds)}
  figures = {key: {"title": title, "unit": unit, "mean": rounded(p.mean),
                   "low": rounded(p.low) if found.bucket > 1 else None,
                   "high": rounded(p.high) if found.bucket > 1 else None}
             for key, (title, unit) in TITLES.items() if (p := found.curves.get(key))}
  validation = None
  evaluated = "loss" if "loss" in found.evaluations else task.primary
  if points := _thinned(found.evaluations.get(evaluated, []), 200):
    steps, seconds, values = (list(column) for column in zip(*points))
    validation = {"x": x(steps, seconds), "value": rounded(values),
                  "unit": TITLES["loss"][1] if evaluated == "loss" else task.unit}
  return {"name": name, "workdir": run.result.workdir, "seed": run.result.seed, "state": _state(run),
          "step": found.last_step, "steps": run.config.train.steps, "bucket": found.bucket,
          "primary": one(run.result.primary, 6), "unit": task.unit, "diverged": run.result.diverged,
          "x": x(found.step, found.seconds), "curves": figures, "validation": validation,
          "non_finite": {key: {"steps": steps, "count": found.non_finite_count[key]}
                         for key, steps in found.non_finite.items()}}


def _state(run: Read) -> str:
  if run.result.diverged:
    return f"diverged: {run.result.diverged}"
  if run.result.final:
    return "finished"
  return "going on, or stopped" if run.log.rows else "no step logged yet"


def _thinned(values: list, most: int) -> list:
  """At most `most` of them, evenly, the first and the last among them."""
  if len(values) <= most:
    return values
  return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def _table(run: Read) -> dict[str, Any]:
  """The loss by step, for a reader without figures: the row of every so-many-th bucket, and all evaluations."""
  found = run.log
  keys = [key for key in TITLES if key in found.curves]
  rows = []
  for i in _thinned(list(range(len(found.step))), TABLE_ROWS):
    values = [found.curves[key].mean[i] if i < len(found.curves[key].mean) else None for key in keys]
    rows.append([number(found.step[i]), clock(found.seconds[i]), *map(number, values)])
  evaluations = [[number(step), clock(seconds), number(value)] for step, seconds, value in _thinned(
      found.evaluations.get(task_of(run.config).primary, []), TABLE_ROWS)]
  return {"head": ["step", "training time", *(TITLES[key][0] for key in keys)], "rows": rows,
          "evaluations": {"head": ["step", "training time", task_of(run.config).unit], "rows": evaluations}}


def _add_cards(found: list[dict[str, Any]], cards: dict[str, Any]) -> None:
  """Puts each layer's cards and figures of the model pass into the layer of the log, by name."""
  by_name = {layer["name"]: layer for layer in found}
  for measured in cards.get("layers") or []:
    layer = by_name.get(measured["name"])
    if layer is None:
      layer = {"name": measured["name"], "experts": measured.get("num_experts"), "k": None, "load": None,
               "series": dict.fromkeys(layers.LOGGED)}
      found.append(layer)
    layer["measured"] = measured


def _facts(run: Read) -> list[list[str]]:
  c, found, last = run.config, run.log, run.log.last
  about, tokens = found.about, (found.tokens_per_step or 0) * found.last_step
  mesh = f"data {c.mesh.data}, expert {c.mesh.expert}, model {c.mesh.model}" + (", fsdp" if c.mesh.fsdp else "")
  device = about.get("device") and f"{about['device']}, {about.get('devices', 1)} in the mesh"
  versions = ", ".join(f"{name} {about[name]}" for name in VERSIONS if name in about)
  rows = [
      ["work directory", run.result.workdir],
      ["state", f"{_state(run)}, step {number(found.last_step)} of {number(c.train.steps)}"],
      ["seed", str(run.result.seed)],
      ["training time", f"{clock(found.seconds[-1] if found.seconds else None)}, without compiling, evaluation and "
                        "saving"],
      ["tokens trained on", f"{number(tokens)}, {number(found.tokens_per_step)} a step" if tokens else "–"],
      ["step time", f"{number(1000 * found.step_seconds)} ms, median" if found.step_seconds else "–"],
      ["data", f"{c.data.source}, objective {c.data.objective}, tokenizer {c.data.tokenizer}"],
      ["data hash", last.get("data_fingerprint") or about.get("data_fingerprint") or "–"],
      ["measure", last.get("measure") or "–"], ["mesh", mesh], ["device", device or NOT_LOGGED],
      ["versions it was trained with", versions or NOT_LOGGED],
  ]
  if "params_total" in about:
    rows.append(["parameters", f"{short(about['params_total'])} total, {short(about.get('params_active'))} active"])
  if "model_flops_per_step" in about:
    rows.append(["model FLOPs", f"{short(about['model_flops_per_step'])} a step, forward and backward"])
  if len(found.processes) > 1:
    rows.append(["begun or resumed", f"{len(found.processes)} times; first rows at step "
                 + ", ".join(map(number, found.processes[:12]))])
  if found.skipped:
    rows.append(["updates left out", f"{number(found.skipped)}, as loss or gradient was not finite"])
  rows += [[f"changed at step {number(step)}", ", ".join(
      f"{key}: {config_table.show(old)} → {config_table.show(new)}" for key, (old, new) in changed.items())]
           for step, changed in found.changed if all(len(v) == 2 for v in changed.values())]
  return [[name, str(value)] for name, value in rows]


def _tiles(run: Read, found: list[dict[str, Any]], cards: dict[str, Any] | None) -> list[dict[str, str]]:
  """The figures that a reader wants first."""
  task, final, tail = task_of(run.config), run.result.final, run.log.tail
  tiles = []
  evaluations = run.log.evaluations.get(task.primary, [])
  if final:
    base = [f"{key.removesuffix('_entropy')} {number(final[key])}" for key in ("unigram_entropy", "bigram_entropy")
            if key in final]
    tiles.append({"label": "validation, " + task.unit, "value": loss(final.get(task.primary)),
                  "detail": "final" + (f"; baselines: {', '.join(base)}" if base else "")})
  elif evaluations:
    tiles.append({"label": "validation, " + task.unit, "value": loss(evaluations[-1][2]),
                  "detail": f"at step {number(evaluations[-1][0])}, on the first windows"})
  if "loss" in tail:
    tiles.append({"label": "training loss, nats per target", "value": loss(tail["loss"]),
                  "detail": f"step {number(tail['step'])} of {number(run.config.train.steps)}"})
  fullest = [(s[-1], layer) for layer in found if (s := _there(layer["series"]["max_vio"]))]
  if fullest:
    worst, layer = max(fullest, key=lambda pair: pair[0])
    tiles.append({"label": "largest MaxVio", "value": number(worst, 3),
                  "detail": f"now, layer {layer['name']} of {len(found)}; 0 when even"})
  dead = [(s[-1], layer) for layer in found if (s := _there(layer["series"]["dead"]))]
  if dead:
    count = sum(round(share * layer["experts"]) for share, layer in dead)
    tiles.append({"label": "dead experts", "value": f"{count} of {sum(layer['experts'] for _, layer in dead)}",
                  "detail": "over the last 100 steps"})
  drops = [s[-1] for layer in found if (s := _there(layer["series"]["dropped"]))]
  if drops:
    tiles.append({"label": "dropped assignments", "value": percent(sum(drops) / len(drops)),
                  "detail": f"in training now, mean over layers; most {percent(max(drops))}"})
  rerouting = (cards or {}).get("rerouting")
  if rerouting:
    tiles.append({"label": f"rerouting cost, {(cards or {}).get('unit', 'nats')}", "value": loss(rerouting["cost"]),
                  "detail": "rise of the loss with random experts"})
  model = (cards or {}).get("model") or run.log.about
  if "params_active" in model:
    tiles.append({"label": "parameters", "value": short(model["params_active"]),
                  "detail": f"active, of {short(model['params_total'])}"})
  if "tokens_per_second" in tail:
    tiles.append({"label": "tokens per second", "value": number(round(tail["tokens_per_second"])), "detail": "now"})
  return tiles


def _there(series: list[float | None] | None) -> list[float]:
  return [v for v in series or [] if v is not None]


def _notes(run: Read) -> list[str]:
  """What a reader should know before trusting the page."""
  found, notes = run.log, []
  if not found.rows:
    notes.append("metrics.jsonl has no row yet: there is nothing to draw. A run writes its first row after "
                 f"train.log_every={run.config.train.log_every} steps.")
  elif len(found.step) == 1:
    notes.append("Only one row of training is logged: figures are single points.")
  if found.cut:
    notes.append("The last line of metrics.jsonl is half written and is left out.")
  if found.bad_lines:
    notes.append(f"{number(found.bad_lines)} lines of metrics.jsonl are no rows and are left out.")
  if run.result.diverged:
    notes.append(f"The run diverged: {run.result.diverged}.")
  for key, steps in list(found.non_finite.items())[:6]:
    notes.append(f"{key} is not finite in {number(found.non_finite_count[key])} rows, first at step {number(steps[0])}; "
                 "figures leave these out.")
  if run.unknown:
    notes.append(f"The run is of another version: config.json has keys that this one does not know: "
                 f"{', '.join(sorted(run.unknown))}.")
  if run.missing:
    some = ", ".join(run.missing[:6]) + (f" and {len(run.missing) - 6} more" if len(run.missing) > 6 else "")
    notes.append(f"The run is of another version: config.json lacks {some}; the page shows today's defaults.")
  if found.skipped:
    notes.append(f"{number(found.skipped)} updates were left out because loss or gradient was not finite.")
  if found.bucket > 1:
    notes.append(f"{number(found.rows)} rows are drawn as {number(len(found.step))} points: each is the mean of "
                 f"{found.bucket} rows; the band of a curve goes from their smallest to their largest value.")
  return notes


def _not_measured(run: Read, found: list[dict[str, Any]], cards: dict[str, Any] | None, why: str) -> list[str]:
  lacks = []
  if cards is None:
    lacks.append(f"expert cards, regret, rerouting cost, saturation and the layer table: {why}")
  else:
    if not cards.get("rerouting"):
      lacks.append("rerouting cost")
    lacks += [f"cards of layer {layer['name']}: {reason}" for layer in found
              if (reason := (layer.get("measured") or {}).get("why_missing"))]
  if run.config.model.num_experts and not found and run.log.rows:
    lacks.append("balance of the sparse layers: the log has no figures of them")
  if any(layer["load"] is None for layer in found):
    lacks.append("load of each expert over time: not logged by the version that trained this run")
  if any(layer["series"]["effective_share"] is None for layer in found):
    lacks.append("effective experts: not logged by the version that trained this run")
  if not run.log.evaluations:
    lacks.append("validation loss: no evaluation is logged yet")
  if not run.result.final:
    lacks.append("final figure: written when the run has finished")
  if not run.log.about:
    lacks.append("the device and the versions that it was trained with: not logged")
  lacks.append("spread over seeds: one run has none; `sweep` trains several")
  return lacks


def cards_of(workdir: str, cards: Cards | None, say: Callable[[str], None]) -> tuple[dict[str, Any] | None, str]:
  """(the cards, or None; why there are none)."""
  if cards is None:
    return None, "left out by --no-model"
  try:
    return cards(workdir), ""
  except UserError as e:
    say(f"no expert cards: {e}")
    return None, " ".join(str(e).split())
