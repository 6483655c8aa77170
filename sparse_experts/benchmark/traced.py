"""Routings of a trained run, from the file that `trace --out` writes, for a layer that is timed."""

import json
import os
import zipfile
from typing import NamedTuple

import numpy as np

from sparse_experts import storage
from sparse_experts.errors import UserError, nearest

COLUMNS = ("step", "layer", "example", "position", "head", "rank", "expert", "valid")


class Traced(NamedTuple):
  """A layer's choices at the last step of a trace; k is 0 if tokens have different numbers of them."""

  num_experts: int
  k: int
  expert_NK: np.ndarray  # of each (sub-)token, in the order of the records, the first choice first


def read(argument: str) -> dict[str, Traced]:
  """{layer: its routing} of TRACE.npz, or of the one layer of TRACE.npz:LAYER."""
  stem, dot, layer = argument.partition(".npz")
  path, layer = stem + dot, layer.removeprefix(":")
  columns, num_experts = _read(path)
  last = columns["step"] == columns["step"].max(initial=0)
  names = sorted(num_experts)
  if layer and layer not in names:
    raise UserError(f"--routing={argument}: the trace has no layer '{layer}'{nearest(layer, names)}; it has "
                    f"{', '.join(names)}")
  return {name: _traced({key: columns[key][last & (columns["layer"] == name)] for key in COLUMNS},
                        num_experts[name]) for name in ([layer] if layer else names)}


def choices(argument: str, layer: str, traced: Traced, workload: str, num_experts: int, k: int,
            tokens: int) -> np.ndarray:
  """expert_NK of the first `tokens` tokens, if they suit the workload."""
  what = f"--routing={argument}: {layer} has"
  if not traced.k:
    raise UserError(f"{what} tokens with different numbers of experts; choose a run whose tokens have k each")
  if (traced.num_experts, traced.k) != (num_experts, k):
    raise UserError(f"{what} {traced.num_experts} experts and k={traced.k}, --workload={workload} has "
                    f"{num_experts} and k={k}; choose a workload or a run with the same")
  if len(traced.expert_NK) < tokens:
    raise UserError(f"{what} {len(traced.expert_NK):,} tokens, --workload={workload} takes {tokens:,}; "
                    "trace more records, by --records=N")
  return traced.expert_NK[:tokens]


def _read(path: str) -> tuple[dict[str, np.ndarray], dict[str, int]]:
  about = os.path.splitext(path)[0] + ".json"
  for name in (path, about):
    if not storage.exists(name):
      raise UserError(f"--routing: {name} is not there; python -m sparse_experts trace --workdir=DIR "
                      f"--out={path or 'x.npz'} writes both TRACE.npz and TRACE.json")
  try:
    with storage.open_file(path) as f, np.load(f, allow_pickle=False) as table:
      columns = {name: table[name] for name in COLUMNS}
    of = json.loads(storage.read(about))["layers"]
    return columns, {name: int(layer["num_experts"]) for name, layer in of.items()}
  except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as e:
    raise UserError(f"--routing={path} is no trace, or not a whole one ({type(e).__name__}); python -m "
                    "sparse_experts trace --workdir=DIR --out=x.npz writes one") from e


def _traced(rows: dict[str, np.ndarray], num_experts: int) -> Traced:
  """Rows of a trace are sorted by example, position, head and rank."""
  k = int(rows["rank"].max(initial=-1)) + 1
  ranks = np.tile(np.arange(k), len(rows["rank"]) // k if k else 0)
  if not k or not np.array_equal(ranks, rows["rank"]) or not rows["valid"].all():
    return Traced(num_experts, 0, np.zeros((0, 0), np.int32))
  return Traced(num_experts, k, rows["expert"].reshape(-1, k))
