"""Probes: fixed records on which trained models are analysed, and their placement on devices.

A probe is the first records of the frozen validation list. It depends on the data only, not on the run, its
step, mesh or batch size, so measurements on it compare.
"""

import hashlib
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from sparse_experts import partitioning
from sparse_experts.data import Dataset
from sparse_experts.errors import UserError, nearest
from sparse_experts.models import Batch, Model, SparseLayer
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


def sparse_layers(model: Model, names: Sequence[str] | None = None) -> dict[str, SparseLayer]:
  """The sparse layers of those names, all by default. Refuses layers that assign nothing."""
  if not model.sparse_layers:
    raise UserError("the model has no sparse layer (model.num_experts=0), hence no routing to look at; "
                    "choose a run with experts")
  chosen = {}
  for name in model.sparse_layers if names is None else names:
    if name not in model.sparse_layers:
      raise UserError(f"layer '{name}' is not sparse{nearest(name, model.sparse_layers)}")
    chosen[name] = model.sparse_layers[name]
    if why := assigns_nothing(chosen[name]):
      raise UserError(f"layer {name} {why}; choose a router that makes one, such as top_k")
  return chosen


def assigns_nothing(layer: SparseLayer) -> str:
  """Why there are no assignments of the layer to look at; empty where there are."""
  return "" if layer.router is not None else (
      "assigns no token to an expert: it mixes all of them, so there is no list of assignments to look at")


def num_rows(batch: Batch) -> int:
  """Records of a batch."""
  return len(next(iter(batch.values())))


def parts(run: Run, model: Model, batch: Batch) -> Iterator[tuple[int, Batch]]:
  """(index of the first row, rows on the run's mesh), about `eval.batch_size` rows at a time.

  A part holds whole routing groups, so groups are the same as in the whole batch; rows of padding fill the
  last part.
  """
  total = num_rows(batch)
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
