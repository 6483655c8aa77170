"""The sparse layer: a router makes a routing, a dispatch moves tokens to experts and back."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sparse_experts import partitioning
from sparse_experts.errors import UserError
from sparse_experts.moe import parallel
from sparse_experts.moe.arguments import check
from sparse_experts.moe.capacity import expert_capacity
from sparse_experts.moe.check import check_list
from sparse_experts.moe.dispatch import get_dispatch
from sparse_experts.moe.experts import Experts
from sparse_experts.moe.inputs import check_input
from sparse_experts.moe.routing import CAUSALITY, Router, Routing, Tokens


class MoELayer(nnx.Module):
  """A Mixture-of-Experts layer: y, routing = layer(x, tokens, key).

  router, experts: the modules; their numbers of experts agree.
  dispatch: a name in DISPATCHES.
  group_size: tokens routed together; rows of x are regrouped to it in order. None: each row of x.
  capacity_factor: slots per expert and group as `capacity_rule` counts them; None: dropless.
  min_capacity: fewest slots; None: the rule's own.
  capacity_slots: slots per expert and group, instead of a factor (Hugging Face's `expert_capacity`).
  exchange_rows_factor: dropless over an `expert` mesh axis of n devices, a device has room for `factor`
    times the rows that it sends. None: n times, the worst case. Where the exchange is padded (on CPUs) each
    device has 1 / n of the room, elsewhere all share it. What does not fit travels in further rounds: results
    are the same, memory is that of a round, and the metric `exchange_overflowed` says how often.
  edit: changes the routing before the dispatch, for experiments on a trained model (`moe/edits.py`).
  shared: shared experts, an FFN called as shared(x, key) for every real token (Dai et al. 2024, DeepSeekMoE):
    its output is added to the routed one, ungated by the router.
  exchange: in which calls tokens travel to experts on other devices; None: in every call.
  """

  def __init__(self, router: Router, experts: Experts, dispatch: str = "ragged",
               group_size: int | None = None, capacity_factor: float | None = None,
               capacity_rule: str = "flaxformer", min_capacity: int | None = None,
               capacity_slots: int | None = None, exchange_rows_factor: float | None = None,
               edit: Callable[..., Routing] | None = None, shared: nnx.Module | None = None,
               exchange: parallel.GatingDropout | None = None):
    if router.num_experts != experts.num_experts:
      raise UserError(f"the router has {router.num_experts} experts but there are {experts.num_experts}")
    get_dispatch(dispatch)
    if capacity_slots is not None:
      check(capacity_slots >= 1, "capacity_slots", capacity_slots, "leaves no slots; choose 1 or more")
      check(capacity_factor is None, "capacity_slots", capacity_slots,
            f"and capacity_factor={capacity_factor} both say how many slots there are; leave one of them out")
    self.router, self.experts, self.dispatch, self.group_size = router, experts, dispatch, group_size
    self.num_experts, self.k = router.num_experts, router.k
    # Of a token: k, unless tokens choose how many they get.
    self.most_experts = router.k if router.most_experts is None else router.most_experts
    self.routing_causality = router.causality  # what a token's routing depends on, apart from drops
    self.capacity_factor, self.capacity_rule, self.min_capacity = capacity_factor, capacity_rule, min_capacity
    self.capacity_slots, self.exchange_rows_factor = capacity_slots, exchange_rows_factor
    self.edit, self.shared, self.exchange = edit, shared, exchange
    self.num_heads = 1  # parts of a token that are routed one by one
    if exchange is not None:
      exchange.check(router.num_experts)

  def capacity(self, group_size: int) -> int | None:
    """Slots per expert and group; None: as many as needed."""
    if self.capacity_factor is None:
      return self.capacity_slots
    return expert_capacity(self.capacity_rule, group_size, self.num_experts, self.k, self.capacity_factor,
                           self.min_capacity)

  @property
  def is_dropless(self) -> bool:
    return self.capacity_factor is None and self.capacity_slots is None

  @property
  def loss_weights(self) -> dict[str, float]:
    """Coefficients of all losses of this layer, rewards included."""
    return self.router.loss_weights | self.router.reward_weights

  def rows_per_token(self, length: int) -> float:
    """Rows that experts compute per token where x has rows of `length` tokens, empty slots included."""
    T = self.group_size or length
    of = get_dispatch(self.dispatch)
    return of.rows_per_token(self.num_experts, self.most_experts, self.capacity(T) or T, T)

  def one_hot_flops(self, length: int, width: int) -> float:
    """FLOPs per token of the dispatch's one-hot products; width: of a row there plus that of a row back."""
    T = self.group_size or length
    return get_dispatch(self.dispatch).one_hot_flops(self.num_experts, self.capacity(T) or T, width)

  @property
  def causality(self) -> str:
    """What a token's output may depend on: self, past, sequence or batch (the whole group)."""
    if self.is_dropless:
      return self.router.causality
    return max(self.router.causality, self.router.drop_causality, key=CAUSALITY.index)

  def __call__(self, x_GTD: Array, tokens: Tokens | None = None, key: Array | None = None,
               edits: Any = None, stream_GTD: Array | None = None) -> tuple[Array, Routing]:
    """x_GTD -> (y_GTD in x's dtype, routing by groups of `group_size`); masked rows give zeros.

    `key` None means no noise and no dropout. `edits`: arrays of x's first two axes, for `edit`. `stream_GTD`,
    of x's shape: what a router with `reads_stream` scores.
    Raises UserError if groups do not divide the tokens.
    """
    B, L, tokens = check_input(x_GTD, tokens, self.experts)
    if not self.router.reads_stream:
      stream_GTD = None
    elif stream_GTD is None:
      raise UserError(f"router {type(self.router).__name__} scores the residual stream, which this layer "
                      "does not get; give layer(x, stream_GTD=...), or set router.score_input=normed")
    chex.assert_shape(jax.tree.leaves(edits), (B, L))
    if edits is not None and self.edit is None:
      raise ValueError("edits are given but the layer has no `edit`: MoELayer(edit=...), build(edit=...)")
    x_BLD, mask_BL = x_GTD, tokens.mask
    x_GTD, tokens, edits = self._group(x_GTD, tokens, edits)
    scored_GTD = x_GTD if stream_GTD is None else self._group(stream_GTD, None, None)[0]
    real = lambda a: jnp.where(tokens.mask[..., None], a, 0)  # padding may hold NaN: replaced, not multiplied
    x_GTD = real(x_GTD)
    if not self.router.reads_padding:
      scored_GTD = real(scored_GTD)
    router_key, dropout_key = (None, None) if key is None else jax.random.split(key)
    fold = lambda number: None if key is None else jax.random.fold_in(key, number)

    capacity = self.capacity(x_GTD.shape[1])
    with jax.named_scope("router"):
      routing = self.router(scored_GTD, tokens, capacity, router_key)
    check_list(self.router, routing, x_GTD.shape[:2])
    if self.edit is not None:
      routing = self.edit(routing) if edits is None else self.edit(routing, edits)
    if self.experts.dropout and dropout_key is not None:
      routing = routing.replace(seed=_row_seeds(routing, x_GTD.shape[1], self.experts.num_experts))
    else:
      dropout_key = None
    y_GTD, routing, served_GT = parallel.run(
        get_dispatch(self.dispatch).move, x_GTD, routing, self.experts, capacity, dropout_key,
        self.exchange_rows_factor, self.exchange, fold(2))

    count = lambda a: a.sum(dtype=jnp.float32)
    drops = {
        "dropped": (count(routing.valid & ~routing.kept), count(routing.valid)),  # assignments
        "token_dropped": (count(tokens.mask & ~served_GT), count(tokens.mask)),  # tokens no expert served
    }
    ungroup = lambda a: a.reshape(-1, *a.shape[2:])[:B * L].reshape(B, L, *a.shape[2:])
    y_BLD, log_prob, value = jax.tree.map(ungroup, (y_GTD, routing.log_prob, routing.value))
    if self.shared is not None:
      x_BLD = jnp.where(mask_BL[..., None], x_BLD, 0)
      y_BLD += jnp.where(mask_BL[..., None], self.shared(x_BLD, fold(3)), 0)
    return y_BLD, routing.replace(metrics=routing.metrics | drops, log_prob=log_prob, value=value)

  def _group(self, x: Array, tokens: Any, edits: Any) -> tuple[Array, Any, Any]:
    """Groups consecutive tokens by `group_size`; a dropless layer pads the last group."""
    total, size = x.shape[0] * x.shape[1], self.group_size or x.shape[1]
    if self.is_dropless:
      size = min(size, total)
    else:
      check(total % size == 0, "group_size", size,
            f"does not divide {x.shape[0]} x {x.shape[1]} = {total} tokens; choose a divisor")

    def regroup(a: Array) -> Array:
      a = a.reshape(total, *a.shape[2:])
      a = jnp.pad(a, ((0, -total % size),) + ((0, 0),) * (a.ndim - 1))  # mask is False there
      return partitioning.constrain(a.reshape(-1, size, *a.shape[1:]), "batch", *([None] * a.ndim))

    return jax.tree.map(regroup, (x, tokens, edits))


def _row_seeds(routing: Routing, T: int, num_experts: int) -> Array:
  """A number per (global group, token, expert), the same on any mesh and for any dispatch."""
  group_G1 = jnp.arange(routing.token.shape[0], dtype=jnp.uint32)[:, None]
  token_GA, expert_GA = routing.token.astype(jnp.uint32), routing.expert.astype(jnp.uint32)
  return (group_G1 * jnp.uint32(T) + token_GA) * jnp.uint32(num_experts) + expert_GA
