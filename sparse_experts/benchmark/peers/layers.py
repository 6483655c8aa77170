"""Times peers' layers in turn with ours: same weights, tokens, machine and threads, float32 on a CPU."""

import contextlib
import dataclasses
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sparse_experts import storage
from sparse_experts.benchmark.layer import Workload
from sparse_experts.benchmark.peers import environments
from sparse_experts.benchmark.peers.processes import Worker
from sparse_experts.benchmark.timing import Sample
from sparse_experts.errors import UserError

OURS = "ours, ragged"
# name -> (environment, variant of its layer_*.py)
PEERS = {
    OURS: ("ours", "ragged"),
    "ours, einsum 1.25": ("ours", "einsum 1.25"),
    "transformers, grouped_mm": ("transformers", "grouped_mm"),
    "transformers, eager": ("transformers", "eager"),
    "MaxText, ragged_dot": ("maxtext", "ragged_dot"), "MaxText, dense": ("maxtext", "dense")}
# Mixtral-8x7B's layer at an eighth of its widths; `group_size` is a row's length.
WORKLOAD = Workload(4096, 512, 1792, 8, 2, "swiglu", group_size=1024)
# Of the largest value: float32 has 6e-8, and sums of up to 1,792 products are added in another order.
TOLERANCE = 1e-5
PAUSE = 0.2  # seconds, in which threads of the one before stop waiting for work
SECONDS = 900  # for an answer: importing and compiling, on a busy machine
HERE = pathlib.Path(__file__).parent
# In all processes: memory that is freed is kept, as host_memory.keep() does for ours.
KEEP = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}


def measure(w: Workload, runs: int, names: Sequence[str] = tuple(PEERS),
            say: Callable[[str], None] = lambda line: None) -> dict[str, dict[str, Any]]:
  """{peer: the figures that docs/measures.md defines under `layers`, or `not_run`, the reason}."""
  rows: dict[str, dict[str, Any]] = {}
  with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
    write(w, folder)
    workers: dict[str, Worker] = {}
    for name in dict.fromkeys((OURS, *names)):
      say(f"{name}: starting, and compared with ours")
      try:
        worker = Worker(serve(name, folder, say), environment(PEERS[name][0]), folder, f"{len(rows)}.log")
        stack.callback(worker.end)
        rows[name] = worker.ask(None, SECONDS)
        rows[name] |= difference(worker, folder, rows[name]["dropped"])
        workers[name] = worker
      except UserError as e:
        if name == OURS:
          raise
        rows[name] = {"not_run": str(e)}
    times, lost = rounds(workers, runs, say)
  if OURS in lost:
    raise UserError(f"{OURS}: {lost[OURS]}")
  rows |= {name: {"not_run": why} for name, why in lost.items()}
  our_floor = times[OURS]["floor_ms"]
  for name, t in times.items():
    layer, floor = t["layer_ms"], t["floor_ms"]
    rows[name] |= (
        layer.named("layer_ms") | floor.named("own_floor_ms")
        | layer.over(floor).named("over_own_floor") | layer.over(our_floor).named("over_our_floor"))
  return rows


def rounds(workers: Mapping[str, Worker], runs: int, say: Callable[[str], None]
           ) -> tuple[dict[str, dict[str, Sample]], dict[str, str]]:
  """(milliseconds of each worker's layer and floor in `runs` rounds, why workers were lost on the way).

  Every second round goes backwards. One worker works at a time; the others wait for their line.
  """
  answers: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
  lost: dict[str, str] = {}
  for i in range(runs):
    for name in list(workers)[:: -1 if i % 2 else 1]:
      if name not in lost:
        time.sleep(PAUSE)
        try:
          answers[name].append(workers[name].ask("round", SECONDS))
        except UserError as e:
          lost[name] = str(e)
    say(f"round {i + 1} of {runs}")
  return {name: {key: Sample(np.array([a[key] for a in found])) for key in ("layer_ms", "floor_ms")}
          for name, found in answers.items() if name not in lost}, lost


def write(w: Workload, folder: str) -> None:
  """The shapes, weights and tokens that all peers read, and the output's cotangent."""
  rng, E, D, F = np.random.default_rng(0), w.num_experts, w.embed_dim, w.expert_dim
  draw = lambda *shape: rng.standard_normal(shape, np.float32)
  arrays = {"router_DE": draw(D, E) * D**-0.5, "gate_EDF": draw(E, D, F) * D**-0.5,
            "in_EDF": draw(E, D, F) * D**-0.5, "out_EFD": draw(E, F, D) * F**-0.5,
            "x_TD": draw(w.tokens, D), "dy_TD": draw(w.tokens, D)}
  for name, array in arrays.items():
    np.save(os.path.join(folder, name), array)
  storage.write_json(os.path.join(folder, "shapes.json"),
                     dataclasses.asdict(w) | {"length": w.group_size or w.tokens})


def serve(name: str, folder: str, say: Callable[[str], None]) -> list[str]:
  """The command of a peer's worker. Raises UserError if its environment cannot be made."""
  kind, variant = PEERS[name]
  python = environments.python_of(kind, say)
  return [python, "-P", str(HERE / "serve.py"), str(HERE / f"layer_{kind}.py"), folder, variant]


def environment(kind: str) -> dict[str, str]:
  """Variables of a peer's processes: ours without what changes jax, XLA, Python or the number of threads.

  Importing jax sets TPU_LIBRARY_PATH, to the libtpu of this environment.
  """
  kept = {name: value for name, value in os.environ.items() if not name.startswith(
      ("JAX_", "XLA_", "TPU_", "LIBTPU_", "PYTHON", "OMP_", "MKL_", "MALLOC_"))}
  ours = {"PYTHONPATH": str(HERE.parents[2])} if kind == "ours" else {}
  return kept | KEEP | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"} | ours


def difference(worker: Worker, folder: str, dropped: float) -> dict[str, float]:
  """{"difference"}: the largest of the output and the input's gradient from ours, over our largest value.

  Raises UserError if it is too large for the same layer, unless the peer drops rows.
  """
  with np.load(worker.ask("check", SECONDS)["path"]) as found:
    arrays = {name: found[name] for name in ("y_TD", "dx_TD")}
  reference = os.path.join(folder, "reference.npz")
  if not os.path.exists(reference):  # ours, which is the first
    np.savez(reference, **arrays)
  with np.load(reference) as ours:
    most = max(float(abs(a - ours[name]).max() / abs(ours[name]).max()) for name, a in arrays.items())
  if not most <= TOLERANCE and not dropped:  # or NaN
    raise UserError(f"its results differ from ours by {most:.1e} of the largest, more than {TOLERANCE:.0e}")
  return {"difference": most}
