"""Probes: fixed records on which trained models are analysed, and their placement on devices.

A probe is the first records of the frozen validation list. It depends on the data only, not on the run, its
step, mesh or batch size, so measurements on it compare.
"""

import hashlib
from collections.abc import Iterator

import jax
import numpy as np

from sparse_experts import partitioning
from sparse_experts.data import Dataset
from sparse_experts.errors import UserError
from sparse_experts.models import Batch, Model, SparseLayer
from sparse_experts.tasks import task_of
from sparse_experts.training.run import Run


def probe(run: Run, num_records: int = 64, dataset: Dataset | None = None) -> Batch:
  """The first `num_records` validation records (all, if there are fewer) as one batch, on the host.

  dataset: instead of `run.dataset("valid")`, for example of a run trained on `data=...`.
  """
  if num_records < 1:
    raise UserError(f"a probe of {num_records} records holds nothing; choose 1 or more")
  dataset = run.dataset("valid") if dataset is None else dataset
  records = [dataset[i] for i in range(min(num_records, len(dataset)))]
  return {name: np.stack([record[name] for record in records]) for name in records[0]}


def fingerprint(batch: Batch) -> str:
  """A hash of the tokens: results with equal fingerprints compare."""
  total = hashlib.sha256()
  for name in sorted(batch):
    a = np.ascontiguousarray(batch[name])
    total.update(f"{name} {a.dtype} {a.shape} ".encode() + a.tobytes())
  return total.hexdigest()[:16]


def sparse_layers(run: Run, model: Model) -> dict[str, SparseLayer]:
  """The sparse layers of the run's model. Refuses tasks without tokens, and layers that assign nothing."""
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
  """Names, in a batch, of the ids that a layer routes and of their segments (0: padding)."""
  return ("encoder_inputs", "encoder_segments") if layer.startswith("encoder") else (
      "decoder_inputs", "segments")


def parts(run: Run, model: Model, batch: Batch) -> Iterator[tuple[int, Batch]]:
  """(index of the first row, rows on the run's mesh), about `eval.batch_size` rows at a time.

  A part holds whole routing groups, so groups are the same as in the whole batch; rows of padding fill the
  last part.
  """
  total = len(batch["segments"])
  quantum = model.row_quantum(batch, run.mesh.shape["data"] * run.mesh.shape["expert"])
  rows = -(-min(run.config.eval.batch_size, total) // quantum) * quantum
  for start in range(0, total, rows):
    missing = max(start + rows - total, 0)
    yield start, on_devices(run, {name: np.pad(
        a[start:start + rows], ((0, missing),) + ((0, 0),) * (a.ndim - 1)) for name, a in batch.items()})


def on_devices(run: Run, rows: Batch) -> Batch:
  """Rows sharded over the run's mesh, which divides their number."""
  sharding = partitioning.batch_sharding(run.mesh)
  return {name: jax.make_array_from_callback(a.shape, sharding, a.__getitem__) for name, a in rows.items()}
