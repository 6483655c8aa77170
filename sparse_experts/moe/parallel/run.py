"""Run any dispatch on each device's groups, with experts that may be elsewhere."""

import math

import jax
import jax.numpy as jnp
from jax import Array

from sparse_experts.moe.dispatch import Move
from sparse_experts.moe.experts import Experts
from sparse_experts.moe.parallel.experts import ExchangedExperts, LocalExperts
from sparse_experts.moe.parallel.gating_dropout import GatingDropout
from sparse_experts.moe.parallel.shard import mesh_sizes, shard_experts
from sparse_experts.moe.routing import Routing
from sparse_experts.partitioning import BATCH_AXES


def run(
    move: Move, x_GTD: Array, routing: Routing, experts: Experts, capacity: int | None,
    key: Array | None, exchange_rows_factor: float | None, stay: Array | None = None,
    gating: GatingDropout | None = None,
) -> tuple[Array, Array, Array]:
  """(y_GTD, kept_GA, served_GT): the dispatch on every device's groups, and which tokens any expert served.

  Groups spread over data x expert; if they do not divide, groups of zeros, hence not valid, are added
  (evaluation and sampling; training refuses such shapes beforehand).
  stay: `gating`'s coin. Where it is True the list sends tokens to experts of their own machine, and if
    machines fit the mesh nothing is exchanged.
  """
  sizes = mesh_sizes()
  if gating is None or not sizes or not gating.fits(sizes) or x_GTD.shape[0] % math.prod(sizes.get(a, 1) for a in BATCH_AXES):
    stay = None  # the exchange serves any list

  def local(make_experts, by_group, key, stay):
    x_GTD, routing = by_group

    def go(kind):
      y_GTD, kept_GA = move(x_GTD, routing, make_experts(kind), capacity, key)
      with jax.named_scope("combine"):
        group_G1 = jnp.arange(x_GTD.shape[0])[:, None]
        served_GT = jnp.zeros(x_GTD.shape[:2], bool).at[group_G1, routing.token].max(kept_GA)
      return y_GTD, kept_GA, served_GT

    if stay is None:
      return go(ExchangedExperts)
    return jax.lax.cond(stay, lambda: go(LocalExperts), lambda: go(ExchangedExperts))

  return shard_experts(local, (x_GTD, routing.only_list()), experts, (key, stay), exchange_rows_factor)
