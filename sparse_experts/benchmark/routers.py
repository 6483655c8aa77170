"""Times every router alone on the same tokens, as in training: noise, losses and the list."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparse_experts.benchmark.layer import router_programs
from sparse_experts.benchmark.timing import interleave
from sparse_experts.moe import ROUTERS, Tokens, expert_capacity, make_router


def measure(runs: int, names: Sequence[str] = tuple(ROUTERS), groups: int = 8, group_size: int = 512,
            embed_dim: int = 256, num_experts: int = 16) -> dict[str, Any]:
  """Figures of each router with its constructor's defaults; `top_k` is always among them."""
  G, T, E = groups, group_size, num_experts
  rng = np.random.default_rng(0)
  x_GTD = jnp.asarray(rng.standard_normal((G, T, embed_dim), np.float32))
  row_GT = jnp.broadcast_to(jnp.arange(G, dtype=jnp.int32)[:, None], (G, T))
  tokens = Tokens(mask=jnp.ones((G, T), bool), id=jnp.asarray(rng.integers(3, 200, (G, T)), jnp.int32),
                  sequence=row_GT, task=row_GT % 2)
  programs, routers = {}, {}
  for name in dict.fromkeys(["top_k", *names]):
    routers[name] = router = make_router(name, embed_dim, E, rngs=nnx.Rngs(params=0))
    capacity = expert_capacity("megablocks", T, E, router.k, 1.25)
    for way, program in router_programs(router, x_GTD, capacity, tokens, jax.random.key(1)).items():
      programs[name, way] = program
  times = interleave(programs, runs)
  both = {name: times[name, "forward_backward"] for name in routers}
  return {"groups": G, "group_size": T, "embed_dim": embed_dim, "num_experts": E, "runs": runs, "routers": {
      name: {"k": routers[name].k, "forward_ms": times[name, "forward"].median,
             **sample.named("forward_backward_ms"), "over_top_k": sample.over(both["top_k"]).median}
      for name, sample in both.items()}}
