"""What a page says of a run in words: its headline figures, facts, notes, and what was not measured."""

from typing import Any

from sparse_experts.report.config_table import show
from sparse_experts.report.numbers import clock, loss, number, percent, short
from sparse_experts.report.read import Read

NOT_LOGGED = "not logged"
VERSIONS = ("sparse_experts", "jax", "python")  # of `run` in the log
SHOWN_KEYS = 6

Layers = list[dict[str, Any]]
Cards = dict[str, Any] | None


def facts(run: Read) -> list[list[str]]:
  """[[name, text]]."""
  c, found, last, about = run.config, run.log, run.log.last, run.log.about
  tokens = (found.tokens_per_step or 0) * found.last_step
  mesh = f"data {c.mesh.data}, expert {c.mesh.expert}, model {c.mesh.model}{', fsdp' if c.mesh.fsdp else ''}"
  device = about.get("device") and f"{about['device']}, {about.get('devices', 1)} in the mesh"
  versions = ", ".join(f"{name} {about[name]}" for name in VERSIONS if name in about)
  rows = [
      ["work directory", run.result.workdir],
      ["state", f"{run.state}, step {number(found.last_step)} of {number(c.train.steps)}"],
      ["seed", str(run.result.seed)],
      ["training time", f"{clock(found.seconds[-1] if found.seconds else None)}, without compiling, "
                        "evaluation and saving"],
      ["tokens trained on", f"{number(tokens)}, {number(found.tokens_per_step)} a step" if tokens else "–"],
      ["step time", f"{number(1000 * found.step_seconds)} ms, median" if found.step_seconds else "–"],
      ["data", f"{c.data.source}, objective {c.data.objective}, tokenizer {c.data.tokenizer}"],
      ["data hash", last.get("data_fingerprint") or about.get("data_fingerprint") or "–"],
      ["measure", last.get("measure") or "–"], ["mesh", mesh], ["device", device or NOT_LOGGED],
      ["versions it was trained with", versions or NOT_LOGGED],
  ]
  if "params_total" in about:
    rows.append(["parameters", f"{short(about['params_total'])} total, "
                               f"{short(about.get('params_active'))} active"])
  if "model_flops_per_step" in about:
    rows.append(["model FLOPs", f"{short(about['model_flops_per_step'])} a step, forward and backward"])
  if len(found.processes) > 1:
    rows.append(["begun or resumed", f"{len(found.processes)} times; first rows at step "
                 + ", ".join(map(number, found.processes[:12]))])
  if found.skipped:
    rows.append(["updates left out", f"{number(found.skipped)}, as loss or gradient was not finite"])
  rows += [[f"changed at step {number(step)}", ", ".join(
      f"{key}: {show(old)} → {show(new)}" for key, (old, new) in changed.items())]
           for step, changed in found.changed if all(len(pair) == 2 for pair in changed.values())]
  return [[name, str(text)] for name, text in rows]


def tiles(run: Read, layers: Layers, cards: Cards) -> list[dict[str, str]]:
  """The figures that a reader wants first: label, value, detail."""
  final, tail, made = run.result.final, run.log.tail, []
  unit, evaluations = run.task.unit, run.log.evaluations.get(run.task.primary, [])
  add = lambda label, value, detail: made.append({"label": label, "value": value, "detail": detail})
  if final:
    base = [f"{key.removesuffix('_entropy')} {number(final[key])}"
            for key in ("unigram_entropy", "bigram_entropy") if key in final]
    add(f"validation, {unit}", loss(final.get(run.task.primary)),
        "final" + (f"; baselines: {', '.join(base)}" if base else ""))
  elif evaluations:
    add(f"validation, {unit}", loss(evaluations[-1][2]),
        f"at step {number(evaluations[-1][0])}, on the first windows")
  if "loss" in tail:
    add(f"training loss, {run.loss_unit}", loss(tail["loss"]),
        f"step {number(tail['step'])} of {number(run.config.train.steps)}")
  if fullest := _now(layers, "max_vio"):
    worst, layer = max(fullest, key=lambda pair: pair[0])
    add("largest MaxVio", number(worst, 3), f"now, in layer {layer['name']}; 0 when even")
  if dead := _now(layers, "dead"):
    add("dead experts in training", f"{sum(round(share * layer['experts']) for share, layer in dead)} of "
        f"{sum(layer['experts'] for _, layer in dead)}", "over the last 100 steps")
  if dropped := [share for share, _ in _now(layers, "dropped")]:
    add("dropped assignments", percent(sum(dropped) / len(dropped)),
        f"in training now, mean over layers; most {percent(max(dropped))}")
  if rerouting := (cards or {}).get("rerouting"):
    add(f"rerouting cost, {(cards or {}).get('unit', 'nats')}", loss(rerouting["cost"]),
        "rise of the loss with random experts, on the sample of the cards")
  model = (cards or {}).get("model") or run.log.about
  if "params_active" in model:
    add("parameters", short(model["params_active"]), f"active, of {short(model['params_total'])}")
  if "tokens_per_second" in tail:
    add("tokens per second", number(round(tail["tokens_per_second"])), "now")
  return made


def _now(layers: Layers, figure: str) -> list[tuple[float, dict[str, Any]]]:
  """(the figure's last value, its layer) of the layers that have one."""
  there = [([v for v in layer["series"][figure] or [] if v is not None], layer) for layer in layers]
  return [(values[-1], layer) for values, layer in there if values]


def notes(run: Read) -> list[str]:
  """What a reader should know before trusting the page."""
  found, made = run.log, []
  if not found.rows:
    made.append("metrics.jsonl has no row yet: there is nothing to draw. A run writes its first row after "
                f"train.log_every={run.config.train.log_every} steps.")
  elif len(found.step) == 1:
    made.append("Only one row of training is logged: figures are single points.")
  if found.cut:
    made.append("The last line of metrics.jsonl is half written and is left out.")
  if found.bad_lines:
    made.append(f"{number(found.bad_lines)} lines of metrics.jsonl are no rows and are left out.")
  if run.result.diverged:
    made.append(f"The run diverged: {run.result.diverged}.")
  for key, steps in list(found.non_finite.items())[:SHOWN_KEYS]:
    made.append(f"{key} is not finite in {number(found.non_finite_count[key])} rows, first at step "
                f"{number(steps[0])}; figures leave these out.")
  if run.unknown:
    made.append(f"The run is of another version: config.json has keys that this one does not know: "
                f"{_some(sorted(run.unknown))}.")
  if run.missing:
    made.append(f"The run is of another version: config.json lacks {_some(run.missing)}; the page shows "
                "today's defaults.")
  if found.skipped:
    made.append(f"{number(found.skipped)} updates were left out because loss or gradient was not finite.")
  if found.bucket > 1:
    made.append(f"{number(found.rows)} rows are drawn as {number(len(found.step))} points, means of "
                f"{found.bucket} rows each; a curve's band goes from their smallest to their largest value.")
  return made


def not_measured(run: Read, layers: Layers, cards: Cards, why_no_cards: str) -> list[str]:
  """What the page cannot show, and why."""
  lacks = []
  if cards is None:
    lacks.append(f"expert cards, regret, rerouting cost, saturation and the layer table: {why_no_cards}")
  else:
    if layers and not cards.get("rerouting"):
      lacks.append("rerouting cost: a layer assigns nothing")
    lacks += [f"layer {layer['name']}: {why}" for layer in layers
              if (why := (layer.get("measured") or {}).get("why_missing"))]
  if run.config.model.num_experts and not layers and run.log.rows:
    lacks.append("balance of the sparse layers: the log has no figures of them")
  if any(layer["load"] is None for layer in layers):
    lacks.append("load of each expert over time: not logged by the version that trained this run")
  if any(layer["series"]["effective_share"] is None for layer in layers):
    lacks.append("effective experts: not logged by the version that trained this run")
  if not run.log.evaluations:
    lacks.append("validation loss: no evaluation is logged yet")
  if not run.result.final:
    lacks.append("final figure: written when the run has finished")
  if not run.log.about:
    lacks.append("the device and the versions that it was trained with: not logged")
  return [*lacks, "spread over seeds: one run has none; `sweep` trains several"]


def _some(keys: list[str]) -> str:
  more = f" and {len(keys) - SHOWN_KEYS} more" if len(keys) > SHOWN_KEYS else ""
  return ", ".join(keys[:SHOWN_KEYS]) + more
