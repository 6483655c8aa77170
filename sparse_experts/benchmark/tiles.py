"""Times tiles of the TPU's grouped matmul on a layer, to choose `config.model.backend`."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from sparse_experts import partitioning
from sparse_experts.benchmark.layer import Workload, inputs, layer_programs, make_experts, make_layer
from sparse_experts.benchmark.timing import interleave
from sparse_experts.errors import UserError

ROWS, WIDTHS = (128, 256, 512), (128, 512, 1024, 2048)


def candidates(w: Workload) -> list[str]:
  """Backends: the platform's own product, and megablox with tiles no wider than the experts are."""
  widths = [n for n in WIDTHS if n <= min(w.embed_dim, w.expert_dim)] or WIDTHS[:1]
  return ["ragged_dot", *(f"megablox:{m}x{k}x{n}" for m, k, n in itertools.product(ROWS, widths, widths))]


def measure(w: Workload, runs: int, backends: Sequence[str] | None = None,
            say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
  """Times the workload's layer with `ragged` and each backend: `backend_ms` in docs/measures.md.

  Tiles that do not fit in the TPU's memory are left out and reported to `say`.
  """
  if partitioning.platform() != "tpu":
    raise UserError(f"benchmark tiles needs a TPU and this is a {partitioning.platform()}; elsewhere compare "
                    "--backend=slots and --backend=ragged_dot in benchmark layer")
  programs, x_GTD = {}, inputs(w)
  for backend in candidates(w) if backends is None else backends:
    experts = make_experts(dataclasses.replace(w, backend=backend))
    program = layer_programs(make_layer(w, experts, "ragged"), x_GTD)["forward_backward"]
    try:
      program()
    except jax.errors.JaxRuntimeError as e:
      if "RESOURCE_EXHAUSTED" not in str(e):
        raise
      say(f"{backend}: too large")
      continue
    programs[backend] = program
  times = interleave(programs, runs)
  milliseconds = {backend: sample.median for backend, sample in times.items()}
  fastest = min(milliseconds, key=lambda backend: milliseconds[backend])
  return dataclasses.asdict(w) | {"runs": runs, "backend_ms": milliseconds, "fastest": fastest}
