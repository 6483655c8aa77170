"""Base of layers that mix all experts: they have the interface of `MoELayer`."""

from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import Array

from sparse_experts.moe.experts import Experts
from sparse_experts.moe.inputs import check_input
from sparse_experts.moe.routing import Pair, Routing, Tokens, losses, scores


class MixtureLayer(nnx.Module):
  """A layer without router, whose routing has no list; mixes each row of the input by itself, drops nothing.

  A subclass has `mix`, and `dispatch`, its name in tables, and `rows_per_token` and `router_flops` for
  counting.
  """

  causality = routing_causality = "batch"
  router = None
  num_heads = 1
  group_size = 1  # any number of rows works
  loss_weights: ClassVar[dict[str, float]] = {}
  held_to = ""  # as for `Router`

  def __init__(self, experts: Experts):
    self.experts = experts
    self.num_experts = self.k = self.most_experts = experts.num_experts  # every token uses all

  def capacity(self, group_size: int) -> None:
    """None: dropless."""

  def __call__(self, x_BLD: Array, tokens: Tokens | None = None, key: Array | None = None,
               edits: None = None) -> tuple[Array, Routing]:
    """x_BLD -> (y_BLD in x's dtype, routing); masked tokens weigh nothing and give zeros."""
    mask_BL = check_input(x_BLD, tokens, self.experts)[-1].mask
    y_BLD, metrics = self.mix(jnp.where(mask_BL[..., None], x_BLD, 0), mask_BL, key)
    return jnp.where(mask_BL[..., None], y_BLD, 0), Routing(metrics=metrics)

  def mix(self, x_BLD: Array, mask_BL: Array, key: Array | None) -> tuple[Array, dict[str, Pair]]:
    """(y_BLD, metrics), of x that is zero where masked; what y holds there is not read."""
    raise NotImplementedError


def mixture_metrics(weight_NE: Array, mask_N: Array) -> dict[str, Pair]:
  """The metrics of a router, from the weights of all experts for the tokens (or rows) of the mask."""
  over = lambda a_N: losses.over_tokens(a_N, mask_N)
  count = mask_N.sum(dtype=jnp.float32)
  nothing = jnp.zeros(()), count
  load_E = jnp.where(mask_N[..., None], weight_NE, 0.0).sum(tuple(range(mask_N.ndim)))
  return {
      "load": (load_E, count), "experts_per_token": over(jnp.full(mask_N.shape, float(weight_NE.shape[-1]))),
      "entropy": over(scores.entropy(weight_NE)),
      "confidence": over(weight_NE.max(-1)), "dropped": nothing, "token_dropped": nothing}
