"""The measures of a trained model on the frozen list of validation windows.

The task (`sparse_experts/tasks`) says what they are. The primary figure is dropless, so it does not depend on
batch, mesh or hosts.
"""

import functools
import math
from typing import Any

import jax
import numpy as np

from sparse_experts import moe, partitioning
from sparse_experts.config import ConfigDict
from sparse_experts.data import Dataset
from sparse_experts.data.feed import eval_batches
from sparse_experts.models import Buffers, Model, Params, build
from sparse_experts.tasks import Task, task_of
from sparse_experts.training import metrics


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
    self._sums = jax.jit(
        functools.partial(self._task.eval_sums, model), out_shardings=partitioning.replicated(mesh))

  def __call__(self, params: Params, buffers: Buffers, num_records: int) -> dict[str, float]:
    """Numbers by name: see `report`."""
    pairs: dict[str, Any] = {}
    with partitioning.use(self._mesh):
      sharding = partitioning.batch_sharding(self._mesh)
      for batch in eval_batches(self._dataset, self._rows, sharding, num_records, self._task.set_size):
        # Float64 on the host: sums of a million targets keep their last digits.
        sums = jax.device_get(self._sums(params, buffers, batch))
        pairs = metrics.add(pairs, jax.tree.map(lambda x: np.asarray(x, np.float64), sums))
    return report(self._task, pairs)


def report(task: Task, pairs: dict[str, Any]) -> dict[str, float]:
  """The figures of the task's `eval_sums`, their counts, and router/<layer>/<metric> with dead experts."""
  counts = {name: int(pairs[of][1]) for name, of in task.counts.items()}
  return metrics.reduce(pairs) | metrics.DeadExperts()(pairs, 1) | counts


def batch_rows(model: Model, config: ConfigDict, mesh: jax.sharding.Mesh, dataset: Dataset) -> int:
  """`eval.batch_size`, raised until rows and routing groups divide over the devices."""
  quantum = model.row_quantum(dataset[0], mesh.shape["data"] * mesh.shape["expert"])
  return -(-config.eval.batch_size // quantum) * quantum


def evaluate(run: Any, dataset: Dataset | None = None) -> dict[str, float]:
  """Everything `evaluate` reports of a `Run`, on as many records as its task evaluates.

  `capacity/...`: the same at the evaluation capacity; `rerouted/...` and `rerouting_cost`: the rise of the
  primary figure when every token goes to random experts with its own gates, where there are assignments.
  """
  task, dataset = task_of(run.config), run.dataset("valid") if dataset is None else dataset
  records = task.evaluated_records(dataset)
  layers = run.abstract_model("dropless").sparse_layers.values()
  evaluated = lambda kind: Evaluator(run.abstract_model(kind), run.config, run.mesh, dataset)(
      run.params, run.buffers, records)
  numbers = evaluated("dropless") | task.baselines(dataset, records) | {"step": run.step, "windows": records}
  if layers:
    numbers |= {f"capacity/{k}": v for k, v in evaluated("eval_capacity").items()}
  if layers and all(layer.router is not None for layer in layers):
    numbers |= {f"rerouted/{k}": v for k, v in evaluated("rerouted").items() if not k.startswith("router/")}
    numbers["rerouting_cost"] = numbers[f"rerouted/{task.primary}"] - numbers[task.primary]
  return numbers


def summary(task: Task, numbers: dict[str, float]) -> str:
  """The figures that a reader wants first, one a line."""
  lines = task.summary(numbers)
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
    lines.append(f"dead experts: {each}")
  return "\n".join(lines)
