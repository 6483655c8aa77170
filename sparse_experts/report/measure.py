"""Looks at a trained model for its report: one pass over the frozen validation probe, at most 16k tokens."""

import itertools
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from sparse_experts.analysis import layer_table, probe, summary
from sparse_experts.analysis.regret import regret, token_regret
from sparse_experts.analysis.trace import Columns, trace
from sparse_experts.analysis.untrained import untrained
from sparse_experts.config import read_config
from sparse_experts.data import Dataset
from sparse_experts.errors import UserError
from sparse_experts.models import Batch
from sparse_experts.moe import Router
from sparse_experts.report.expert_cards import layer_cards, number
from sparse_experts.report.sample import Sample
from sparse_experts.tasks import task_of
from sparse_experts.training.evaluate import Evaluator
from sparse_experts.training.run import Run, load, on_these_devices, source_of

TOKENS = 16_384  # of the sample, over all stacks
CARDS = 192  # over all layers: what a page has room for
CHECKPOINTS = 8  # of which saturation is measured, the newest and others at equal distances
ASSIGNMENTS = 4_000_000  # that are held at once; fewer checkpoints are looked at if there were more
REGRET_TOKENS = 256  # in all layers together, for which every expert is tried
REGRET_FLOPS = 6e11  # of the forward passes for it; fewer tokens are tried if they would take more
_UNTRAINED = -1  # its number among the steps of a trace


def measure(workdir: str, steps: list[int], data: Any = None, router: Router | None = None,
            say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
  """What `report.cards` gives, of the last of `steps`, which are those that are kept."""
  began, config = time.perf_counter(), on_these_devices(read_config(workdir))
  run = load(workdir, steps[-1], config=config, router=router)
  task, source = task_of(config), source_of(config, data)
  dataset = task.make_dataset("valid", run.tokenizer, source)
  model = run.abstract_model("dropless")
  batch = probe.probe(run, _records(run, dataset), dataset)
  found: dict[str, Any] = {
      "step": run.step, "records": probe.num_rows(batch), "tokens": _tokens(run, batch), "unit": task.unit,
      "other_data": source.fingerprint != run.data_fingerprint, "grouping": task.grouping,
      "model": _model(run), "rerouting": None, "layers": []}
  listed = [name for name, layer in model.sparse_layers.items() if not probe.assigns_nothing(layer)]
  steps = _choose(steps, found["tokens"] * sum(model.sparse_layers[name].k for name in listed))
  traced = {}
  if listed:
    say(f"report: tracing {found['tokens']:,} tokens at {len(steps)} checkpoints")
    earlier = (load(workdir, step, config=config, router=router) for step in steps[:-1])
    every = trace(itertools.chain(earlier, [run, untrained(run, _UNTRAINED)]), batch, layers=listed)
    traced = {s: _where(every, "step", s) for s in [*steps, _UNTRAINED]}
  if listed and len(listed) == len(model.sparse_layers):
    say("report: rerouting every token to random experts")
    found["rerouting"] = _rerouting(run, dataset, found["records"])
  forced, why = _regret(run, batch, traced[run.step], found["model"]["flops_per_token"],
                        say) if listed else ({}, "")
  settled = summary.saturation(_of_steps(every, steps)) if listed else {}
  sample = Sample(batch, task, run.tokenizer, task.domains(run.tokenizer, source))
  for name, layer in model.sparse_layers.items():
    missing = probe.assigns_nothing(layer) or ("" if name in forced else why)
    facts: dict[str, Any] = {
        "name": name, "num_experts": layer.num_experts, "k": layer.k, "why_missing": missing or None,
        "saturation": None, "regret": forced.get(name), "expert_cards": [], "information": {}}
    if name in listed:
      columns, before = (_where(traced[s], "layer", name) for s in (run.step, _UNTRAINED))
      facts |= layer_cards(name, columns, before, layer.num_experts, sample, max(CARDS // len(listed), 1))
      if len(steps) > 1:
        facts["saturation"] = {"step": steps, "share": [number(settled[s, name]) for s in steps]}
    found["layers"].append(facts)
  return found | {"seconds": round(time.perf_counter() - began, 1)}


def _choose(steps: list[int], assignments: int) -> list[int]:
  """At most CHECKPOINTS of them, the newest last. assignments: of each, and of the untrained routers."""
  room = ASSIGNMENTS // max(assignments, 1) - 1
  number = max(min(CHECKPOINTS, len(steps), room), 1)
  return [steps[i] for i in np.linspace(len(steps) - 1, 0, number).round().astype(int)[::-1]]


def _records(run: Run, dataset: Dataset) -> int:
  """As many as have TOKENS tokens, in whole sets where rows are compared with each other."""
  model, first = run.abstract_model("dropless"), {name: np.asarray(a)[None] for name, a in dataset[0].items()}
  length = {layer.partition("/")[0]: model.length(layer, first) for layer in model.sparse_layers} or {
      "all": run.config.data.length}
  records = max(min(TOKENS // sum(length.values()), len(dataset)), 1)
  size = task_of(run.config).set_size or 1
  return max(records // size, 1) * size


def _tokens(run: Run, batch: Batch) -> int:
  """Real tokens of the sample, over all stacks."""
  stacks = {layer.partition("/")[0]: layer for layer in run.abstract_model("dropless").sparse_layers}
  routed = task_of(run.config).routed
  return sum(int((routed(layer, batch).segment_BL > 0).sum()) for layer in stacks.values())


def _model(run: Run) -> dict[str, Any]:
  """The layer table of `describe`."""
  target_length = task_of(run.config).row_lengths(run.tokenizer)["targets"]
  table = layer_table.describe(run.config, run.tokenizer.vocab_size, target_length)
  cells = [list(map(str, row)) for row in layer_table.rows(table)]
  return {"head": list(layer_table.COLUMNS), "rows": cells,
          **{name: table[name] for name in ("params_total", "params_active", "flops_per_token")}}


def _rerouting(run: Run, dataset: Dataset, records: int) -> dict[str, float]:
  """The primary figure on the sample, and with random experts."""
  loss, random = (Evaluator(run.abstract_model(kind), run.config, run.mesh, dataset)(
      run.params, run.buffers, records)[task_of(run.config).primary] for kind in ("dropless", "rerouted"))
  return {"loss": loss, "random": random, "cost": random - loss}


def _regret(run: Run, batch: Batch, traced: Columns, flops_per_token: float, say) -> tuple[dict, str]:
  """({layer: its regret}, "") on a few tokens of each record, or ({}, why there is none)."""
  layers, records = run.abstract_model("dropless").sparse_layers, probe.num_rows(batch)
  task = task_of(run.config)
  lengths = {name: task.routed(name, batch).id_BL.shape[1] for name in layers}
  passes = sum(layer.num_experts - layer.k for layer in layers.values())  # rows, for a token in every layer
  row = sum({name.partition("/")[0]: length for name, length in lengths.items()}.values())
  flops = passes * row * flops_per_token
  tokens = int(min(REGRET_TOKENS // len(layers), REGRET_FLOPS // max(flops, 1)))
  if not passes:
    return {}, "tokens use all experts, so there is none to try instead"
  if tokens < 8:
    return {}, (f"trying every expert on 8 tokens would take {8 * flops:.2g} FLOPs; "
                "`trace --regret=1` measures it")
  of = min(records, max(tokens // 4, 1))  # records, with about four tokens each
  each, shortest = -(-tokens // of), min(lengths.values())
  places = np.unique(((np.arange(each) + 0.5) * shortest / each).astype(int))
  part = {name: a[:of] for name, a in batch.items()}
  try:
    table = regret(run, part, positions=places.tolist(), say=say,
                   traced={name: a[traced["example"] < of] for name, a in traced.items()})
  except UserError as e:
    return {}, str(e)
  tokens_of = token_regret(table)
  found = {}
  for name in layers:
    here = _where(tokens_of, "layer", name)
    if len(here["regret"]):
      found[name] = {"chosen_best": number((here["chosen"] == here["best"]).mean()),
                     "saved": number(here["regret"].mean()), "tokens": len(here["regret"])}
  return found, ""


def _where(columns: Columns, name: str, value: Any) -> Columns:
  here = columns[name] == value
  return {column: a[here] for column, a in columns.items()}


def _of_steps(columns: Columns, steps: list[int]) -> Columns:
  here = np.isin(columns["step"], steps)
  return {column: a[here] for column, a in columns.items()}
