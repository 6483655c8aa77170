"""The measures of a trained model on the frozen list of validation windows.

The task (`sparse_experts/tasks`) says what they are. The primary figure is dropless, so it does not depend on
batch, mesh or hosts.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from scipy import special

from sparse_experts import moe, partitioning
from sparse_experts.config import ConfigDict, replaced
from sparse_experts.data import Dataset
from sparse_experts.data.feed import eval_batches
from sparse_experts.models import Buffers, Model, Params, build
from sparse_experts.tasks import Task, task_of
from sparse_experts.training import metrics
from sparse_experts.training.countdown import Countdown

QUICK_BYTES = 100_000  # of text that `quick` evaluates, at least
LEVEL = 0.95  # of its interval


def eval_model(config: ConfigDict, vocab_size: int, kind: str = "dropless", router: Any = None) -> Model:
  """dropless: the primary figure. eval_capacity: with `eval_capacity_factor`. rerouted: random experts."""
  if kind == "rerouted":
    return build(config, vocab_size, "dropless", router=router, edit=moe.reroute)
  return build(config, vocab_size, kind, router=router)


class Evaluator:
  """Runs one model over the first records of a dataset; compiled once."""

  def __init__(self, model: Model, config: ConfigDict, mesh: jax.sharding.Mesh, dataset: Dataset):
    self._dataset, self._mesh, self._task = dataset, mesh, task_of(config)
    self._rows = batch_rows(model, config, mesh, dataset)
    jitted = lambda sums: jax.jit(functools.partial(sums, model), out_shardings=partitioning.replicated(mesh))
    self._sums = self._final = jitted(self._task.eval_sums)
    if type(self._task).final_sums is not Task.final_sums:
      self._final = jitted(self._task.final_sums)

  def sums(self, params: Params, buffers: Buffers, num_records: int,
           final: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """(records so far, the task's `eval_sums` of these alone, or its `final_sums`) after each batch."""
    sharding, done = partitioning.batch_sharding(self._mesh), 0
    of_batch = self._final if final else self._sums
    for batch in eval_batches(self._dataset, self._rows, sharding, num_records, self._task.set_size):
      with partitioning.use(self._mesh):
        sums = jax.device_get(of_batch(params, buffers, batch))
      done = min(done + (self._task.set_size or self._rows), num_records)
      # Float64 on the host: sums of a million targets keep their last digits.
      yield done, jax.tree.map(lambda x: np.asarray(x, np.float64), sums)

  def __call__(self, params: Params, buffers: Buffers, num_records: int,
               countdown: Callable[[int], None] = lambda done: None, final: bool = False) -> dict[str, float]:
    """Numbers by name: see `report`. countdown: is told after each batch how many records are done."""
    pairs: dict[str, Any] = {}
    for done, sums in self.sums(params, buffers, num_records, final):
      pairs = metrics.add(pairs, sums)
      countdown(done)
    return report(self._task, pairs)


def report(task: Task, pairs: dict[str, Any]) -> dict[str, float]:
  """The figures of the task's `eval_sums`, their counts, and router/<layer>/<metric> with dead experts."""
  counts = {name: int(pairs[of][1]) for name, of in task.counts.items()}
  return metrics.reduce(pairs) | metrics.DeadExperts()(pairs, 1) | counts


def batch_rows(model: Model, config: ConfigDict, mesh: jax.sharding.Mesh, dataset: Dataset) -> int:
  """`eval.batch_size`, raised until rows and routing groups divide over the devices."""
  quantum = model.row_quantum(dataset[0], mesh.shape["data"] * mesh.shape["expert"])
  return -(-config.eval.batch_size // quantum) * quantum


def evaluate(run: Any, dataset: Dataset | None = None, say: Callable[[str], None] = lambda line: None,
             ) -> dict[str, float]:
  """Everything `evaluate` reports of a `Run`, on as many records as its task evaluates.

  `capacity/...`: the same at the evaluation capacity; `rerouted/...` and `rerouting_cost`: the rise of the
  primary figure when every token goes to random experts with its own gates, where there are assignments.
  say: takes the lines on progress.
  """
  task, dataset = task_of(run.config), run.dataset("valid") if dataset is None else dataset
  records = task.evaluated_records(dataset)
  layers = run.abstract_model("dropless").sparse_layers.values()
  kinds = {"dropless": "dropless"}
  if layers:
    kinds["eval_capacity"] = "at the evaluation capacity"
  if layers and all(layer.router is not None for layer in layers):
    kinds["rerouted"] = "with random experts"
  countdown = Countdown(records, say, len(kinds))
  found = {kind: Evaluator(run.abstract_model(kind), run.config, run.mesh, dataset)(
      run.params, run.buffers, records, countdown.start(name), final=kind == "dropless")
      for kind, name in kinds.items()}
  numbers = found["dropless"] | task.baselines(dataset, records) | {"step": run.step, "windows": records}
  numbers |= {f"capacity/{k}": v for k, v in found.get("eval_capacity", {}).items()}
  numbers |= {f"rerouted/{k}": v for k, v in found.get("rerouted", {}).items() if not k.startswith("router/")}
  if "rerouted" in found:
    numbers["rerouting_cost"] = numbers[f"rerouted/{task.primary}"] - numbers[task.primary]
  return numbers


def quick(run: Any, dataset: Dataset | None = None, say: Callable[[str], None] = lambda line: None,
          ) -> dict[str, Any]:
  """The dropless figures of a `Run` on a sample of what `evaluate` takes: `Task.quick_records`.

  `interval`: 95% of the primary figure, (low, high), from the sample's batches as independent draws; None of
  fewer than two.
  """
  config = replaced(run.config, {"eval.min_bytes": min(QUICK_BYTES, run.config.eval.min_bytes)})
  task, dataset = task_of(config), run.dataset("valid") if dataset is None else dataset
  records = task.quick_records(dataset)
  countdown = Countdown(records, say).start("dropless")
  each: list[tuple[Any, Any]] = []
  pairs: dict[str, Any] = {}
  evaluator = Evaluator(run.abstract_model("dropless"), config, run.mesh, dataset)
  for done, sums in evaluator.sums(run.params, run.buffers, records):
    each.append(sums[task.primary])
    pairs = metrics.add(pairs, sums)
    countdown(done)
  return report(task, pairs) | task.baselines(dataset, records) | {
      "step": run.step, "windows": records, "interval": interval(each)}


def interval(pairs: list[tuple[Any, Any]]) -> tuple[float, float] | None:
  """95% t-interval of sum / count of all pairs, each an independent draw; None of fewer than two.

  The ratio's linearised variance (Cochran 1977, Sampling Techniques, section 6.4), n - 1 degrees of freedom.
  """
  total_N, count_N = np.asarray(pairs, np.float64).T
  n, ratio = len(total_N), total_N.sum() / count_N.sum()
  if n < 2:
    return None
  variance = n / (n - 1) * ((total_N - ratio * count_N) ** 2).sum() / count_N.sum() ** 2
  half = float(special.stdtrit(n - 1, (1 + LEVEL) / 2)) * math.sqrt(variance)
  return float(ratio) - half, float(ratio) + half


def summary(task: Task, numbers: dict[str, Any]) -> str:
  """The figures that a reader wants first, one a line."""
  lines = task.summary(numbers)
  if "interval" in numbers:
    ends = numbers["interval"]
    lines.append("no interval: the sample is one batch" if ends is None else
                 f"95% interval {ends[0]:.4f} to {ends[1]:.4f}, of the figure of all validation records")
  if f"capacity/{task.primary}" in numbers:
    lines.append(f"{task.figure(numbers, 'capacity/')} at the evaluation capacity")
  if "rerouting_cost" in numbers:
    lines.append(f"{task.figure(numbers, 'rerouted/')} with random experts: rerouting cost "
                 f"{numbers['rerouting_cost']:.4f}")
  layers = [k.removesuffix("/dead") for k in numbers if k.endswith("/dead") and k.startswith("router/")]
  if layers:
    each = ", ".join(
        f"{layer.removeprefix('router/')} {numbers[f'{layer}/dead']:.0f} (load max/mean "
        f"{numbers.get(f'{layer}/load_max_mean', math.nan):.2f})" for layer in layers)
    lines.append(f"dead experts on validation data: {each}")
  return "\n".join(lines)
