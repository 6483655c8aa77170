"""The tokens that a trained model is looked at with, and how they reach the devices.

A probe is the first records of the frozen validation list: for the same data always the same ones, whatever
the run, its step, mesh or batch size, so what is measured on one compares.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from sparse_experts import partitioning
from sparse_experts.errors import UserError
from sparse_experts.tasks import task_of

Batch = dict[str, np.ndarray]


def probe(run: Any, num_records: int = 64, dataset: Any = None) -> Batch:
  """The first `num_records` validation records (all, if there are fewer) as one batch, on the host.

  dataset: instead of `run.dataset("valid")`, say of a run trained on `data=...`.
  """
  if num_records < 1:
    raise UserError(f"a probe of {num_records} records holds nothing; choose 1 or more")
  dataset = run.dataset("valid") if dataset is None else dataset
  records = [dataset[i] for i in range(min(num_records, len(dataset)))]
  return {name: np.stack([record[name] for record in records]) for name in records[0]}


def fingerprint(batch: Batch) -> str:
  """The same for the same tokens: results of equal fingerprints compare."""
  total = hashlib.sha256()
  for name in sorted(batch):
    a = np.ascontiguousarray(batch[name])
    total.update(f"{name} {a.dtype} {a.shape} ".encode())
    total.update(a.tobytes())
  return total.hexdigest()[:16]


def sparse_layers(run: Any, model: Any) -> dict[str, Any]:
  """The sparse layers of a model of the run's: there must be some, all with routers, on tokens of text."""
  if not (task := task_of(run.config)).token_targets:
    raise UserError(f"the model reads {task.items}; trace, replay and regret look at tokens of text. The "
                    "routings of a batch are in run.model(batch, trace=True)")
  if not model.sparse_layers:
    raise UserError("the model has no sparse layer (model.num_experts=0), hence no routing to look at; "
                    "choose a run with experts")
  for name, layer in model.sparse_layers.items():
    if layer.router is None:
      raise UserError(f"layer {name} assigns no token to an expert: it mixes all of them, so there is no list"
                      " of assignments to look at; choose a router that makes one, such as top_k")
  return model.sparse_layers


def fields(layer: str) -> tuple[str, str]:
  """Names, in a batch, of the ids a layer routes and of the segments, 0 where they are padding."""
  return ("encoder_inputs", "encoder_segments") if layer.startswith("encoder") else (
      "decoder_inputs", "segments")


def parts(run: Any, model: Any, batch: Batch) -> Iterator[tuple[int, dict[str, jax.Array]]]:
  """(index of the first row, rows on the run's mesh), about `eval.batch_size` rows at a time.

  A part holds whole routing groups, so groups are those of the batch in one piece; zero rows, which are
  padding, fill the last.
  """
  total, quantum = len(batch["segments"]), row_quantum(run, model, batch)
  rows = -(-min(run.config.eval.batch_size, total) // quantum) * quantum
  for start in range(0, total, rows):
    missing = max(start + rows - total, 0)
    yield start, on_devices(run, {name: np.pad(
        a[start:start + rows], ((0, missing),) + ((0, 0),) * (a.ndim - 1)) for name, a in batch.items()})


def row_quantum(run: Any, model: Any, batch: Batch) -> int:
  return model.row_quantum(batch, run.mesh.shape["data"] * run.mesh.shape["expert"])


def on_devices(run: Any, rows: Batch) -> dict[str, jax.Array]:
  """Rows spread over the run's mesh; their number divides over it."""
  sharding = partitioning.batch_sharding(run.mesh)
  return {name: jax.make_array_from_callback(a.shape, sharding, a.__getitem__) for name, a in rows.items()}
