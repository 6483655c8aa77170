"""Times how the cost that a layer adds to its floor grows with the number of experts, and with tokens.

`ragged` is dropless; `scatter` and `einsum` have capacity 1.25. Groups have 2,048 tokens at most, so that the
one-hot products of `einsum` cost the same per token at every size; they grow with the group.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from sparse_experts.benchmark import layer
from sparse_experts.benchmark.layer import Workload
from sparse_experts.benchmark.timing import interleave
from sparse_experts.moe import DISPATCHES

BASE = Workload(16384, 256, 512, 8, 1, "relu", group_size=2048)
NUM_EXPERTS = (8, 32, 128, 512)
TOKENS = (1024, 4096, 16384, 65536)


def measure(runs: int, dispatches: Sequence[str] | None = None, dtype: str | None = None,
            base: Workload = BASE, num_experts: Iterable[int] = NUM_EXPERTS, tokens: Iterable[int] = TOKENS,
            say: Callable[[dict[str, Any]], None] = lambda row: None) -> dict[str, Any]:
  """Two series of rows, and the growth from the first to the last of each; `say` gets each row."""
  dispatches = base.dispatches if dispatches is None else dispatches
  base = dataclasses.replace(base, dtype=dtype or base.dtype)

  def series(workloads):
    rows = []
    for w in workloads:
      rows.append(_row(w, runs, dispatches))
      say(rows[-1])
    return rows

  by_experts = series(dataclasses.replace(base, num_experts=n) for n in num_experts)
  by_tokens = series(
      dataclasses.replace(base, tokens=n, group_size=min(n, base.group_size or n)) for n in tokens)
  last = lambda rows, name, key: rows[-1]["dispatches"][name][key] / rows[0]["dispatches"][name][key]
  growth = {name: {
      "overhead_growth": last(by_experts, name, "overhead_ms"),
      "dispatch_growth": last(by_experts, name, "dispatch_overhead_ms"),
      "token_growth": last(by_tokens, name, "us_per_token")} for name in dispatches}
  return dataclasses.asdict(base) | {
      "runs": runs, "by_experts": by_experts, "by_tokens": by_tokens, "growth": growth}


def _row(w: Workload, runs: int, dispatches: Sequence[str]) -> dict[str, Any]:
  experts, x_GTD = layer.make_experts(w), layer.inputs(w)
  programs = {"floor": layer.floor_programs(w, experts)["forward_backward"]}
  for name in dispatches:
    of = dataclasses.replace(w, capacity_factor=None if DISPATCHES[name].dropless else 1.25)
    made = layer.make_layer(of, experts, name)
    programs[name] = layer.layer_programs(made, x_GTD)["forward_backward"]
  programs["router"] = layer.router_programs(made.router, x_GTD, None)["forward_backward"]
  times = interleave(programs, runs)
  results = {}
  for name in dispatches:
    over = times[name].minus(times["floor"])
    results[name] = {"forward_backward_ms": times[name].median,
                   "forward_backward_over_floor": times[name].over(times["floor"]).median,
                   **over.named("overhead_ms"),
                   "dispatch_overhead_ms": over.minus(times["router"]).median,
                   "us_per_token": 1e3 * times[name].median / w.tokens}
  return {"num_experts": w.num_experts, "tokens": w.tokens, "router_ms": times["router"].median,
          "floor_forward_backward_ms": times["floor"].median, "dispatches": results}
