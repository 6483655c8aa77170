"""Run any dispatch on each device's groups, with experts that may be on other devices."""

import jax
import jax.numpy as jnp
from jax import Array

from sparse_experts import partitioning
from sparse_experts.moe.dispatch import Move
from sparse_experts.moe.experts import Experts
from sparse_experts.moe.parallel.experts import ExchangedExperts
from sparse_experts.moe.parallel.gating_dropout import GatingDropout
from sparse_experts.moe.parallel.local_experts import LocalExperts
from sparse_experts.moe.parallel.shard import mesh_sizes, shard_experts
from sparse_experts.moe.routing import Routing


def run(move: Move, x_GTD: Array, routing: Routing, experts: Experts, capacity: int | None,
        key: Array | None, rows_factor: float | None, exchange: GatingDropout | None,
        exchange_key: Array | None) -> tuple[Array, Routing, Array]:
  """(y_GTD, the routing as dispatched with its `kept`, served_GT: which tokens any expert served).

  Groups are divided over data x expert; if they do not divide, groups of zeros, hence not valid, are added
  (evaluation and sampling; training refuses such shapes beforehand). With a `rows_factor` the routing gets
  the metric `exchange_overflowed`: 1 if the rows needed more than one exchange.
  """
  keep_local = None
  if exchange is not None:  # outside shard_map: one draw for all devices
    routing, keep_local = exchange.plan(routing, experts.num_experts, exchange_key, mesh_sizes())

  def on_groups(make_experts, by_group, key, keep_local):
    x_GTD, routing = by_group

    def dispatch(kind: type[ExchangedExperts]) -> tuple[Array, ...]:
      placed = make_experts(kind)
      y_GTD, kept_GA = move(x_GTD, routing, placed, capacity, key)
      with jax.named_scope("combine"):
        group_G1 = jnp.arange(x_GTD.shape[0])[:, None]
        served_GT = jnp.zeros(x_GTD.shape[:2], bool).at[group_G1, routing.token].max(kept_GA)
      over_G = jnp.full(x_GTD.shape[:1], getattr(placed, "rounds", 1), jnp.int32) > 1
      return y_GTD, kept_GA, served_GT, partitioning.varying_like(over_G, kept_GA)

    if keep_local is None:
      return dispatch(ExchangedExperts)
    return jax.lax.cond(keep_local, lambda: dispatch(LocalExperts), lambda: dispatch(ExchangedExperts))

  y_GTD, kept_GA, served_GT, over_G = shard_experts(
      on_groups, (x_GTD, routing.only_list()), experts, (key, keep_local), rows_factor)
  if rows_factor is not None:
    over = {"exchange_overflowed": (over_G.max().astype(jnp.float32), jnp.float32(1))}
    routing = routing.replace(metrics=routing.metrics | over)
  return y_GTD, routing.replace(kept=kept_GA), served_GT
