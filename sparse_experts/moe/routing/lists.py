"""From each token's choice of experts to a `Routing`: what routers in which tokens choose end with."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from sparse_experts.moe.routing import Loss, Routing
from sparse_experts.moe.routing.assignments import slots
from sparse_experts.moe.routing.order import by_token, order_assignments
from sparse_experts.moe.routing.router import router_metrics

# Who claims slots first; see `TopKRouter`.
ORDERS = ("choice", "token", "batch_priority")


def token_choice(
    expert_GTK: Array, gate_GTK: Array, prob_GTE: Array, mask_GT: Array, *, valid_GTK: Array | None = None,
    order: str = "choice", losses: Mapping[str, Loss] | None = None, expected_fraction: float = 1.0,
) -> Routing:
  """The routing in which each token goes to its K experts, first choices first: list, metrics and losses.

  prob_GTE: the router's probability of every expert, for `Routing.prob`, entropy and confidence.
  valid_GTK: which choices count; None: all of the real tokens.
  order: who claims slots first, one of ORDERS; `batch_priority` sorts tokens by their largest `prob_GTE`.
  expected_fraction: of the list that is valid, where that is less than all.
  """
  if valid_GTK is None:
    valid_GTK = jnp.broadcast_to(mask_GT[..., None], expert_GTK.shape)
  score_GT = jnp.where(mask_GT, prob_GTE.max(-1), -jnp.inf) if order == "batch_priority" else None
  token_GA, expert_GA, gate_GA, valid_GA = order_assignments(order, expert_GTK, gate_GTK, valid_GTK, score_GT)
  return Routing(
      token=token_GA, expert=expert_GA, gate=gate_GA, valid=valid_GA, prob=prob_GTE,
      rows_per_token=expert_GTK.shape[-1], order=order, expected_fraction=expected_fraction,
      losses=dict(losses or {}),
      metrics=router_metrics(expert_GA, valid_GA, prob_GTE, mask_GT, prob_GTE.shape[-1]))


def fixed(expert_GTK: Array, mask_GT: Array, num_experts: int) -> Routing:
  """The routing of routers without scores: gates are 1, tokens claim slots in order, nothing is learned."""
  share_GTE = jax.nn.one_hot(expert_GTK, num_experts).mean(-2)
  gate_GTK = jnp.ones(expert_GTK.shape, jnp.float32)
  return token_choice(expert_GTK, gate_GTK, share_GTE, mask_GT, order="token").replace(prob=None)


def every_expert(gate_GTE: Array, mask_GT: Array) -> tuple[Array, Array, Array]:
  """(expert_GTK, gate_GTK, valid_GTK) with K = E: all experts of each token, valid where the gate is above 0.

  The largest gate comes first, of equal ones the lower index. For gates that learn to be exactly 0: an
  assignment that is not valid is not computed.
  """
  expert_GTK = jnp.argsort(-jax.lax.stop_gradient(gate_GTE), axis=-1, stable=True).astype(jnp.int32)
  gate_GTK = jnp.take_along_axis(gate_GTE, expert_GTK, axis=-1)
  return expert_GTK, gate_GTK, (gate_GTK > 0) & mask_GT[..., None]


def scramble(number: Array, salt: Array) -> Array:
  """A hash of uint32, another bijection for each salt: MurmurHash3's finalizer before and after the salt."""

  def finalize(x):
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
      x = (x ^ (x >> jnp.uint32(shift))) * jnp.uint32(factor)
    return x ^ (x >> jnp.uint32(16))

  return finalize(finalize(number.astype(jnp.uint32)) ^ salt)


def kept(routing: Routing, capacity: int | None, num_experts: int) -> Array:
  """Which assignments get a slot, bool _GA; those that are valid, if there is no capacity."""
  if capacity is None:
    return routing.valid
  return routing.valid & (slots(routing.expert, routing.valid, num_experts) < capacity)


def renormalized_after_drops(routing: Routing, capacity: int | None, num_experts: int, k: int) -> Routing:
  """Gates that sum to 1 over a token's assignments that get a slot; 0 for the others."""
  gate_GA = jnp.where(kept(routing, capacity, num_experts), routing.gate, 0.0)
  total_GT = by_token(routing, k)(gate_GA).sum(-1)
  total_GA = jnp.take_along_axis(total_GT, routing.token, axis=-1)
  return routing.replace(gate=gate_GA / jnp.where(total_GA > 0, total_GA, 1.0))
