"""Base of layers that mix all experts: they have the interface of `MoELayer`."""

from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import Array

from sparse_experts.moe.experts import Experts
from sparse_experts.moe.routing import Pair


class MixtureLayer(nnx.Module):
  """A layer without router, whose routing has no list; mixes each row of the input by itself, drops nothing.

  A subclass also has `dispatch`, its name in tables, and `rows_per_token` and `router_flops` for counting.
  """

  causality = routing_causality = "batch"
  router = None
  group_size = 1  # any number of rows works
  loss_weights: ClassVar[dict[str, float]] = {}

  def __init__(self, experts: Experts):
    self.experts = experts
    self.num_experts = self.k = self.most_experts = experts.num_experts  # every token uses all

  def capacity(self, group_size: int) -> None:
    """None: dropless."""


def mixture_metrics(weight_NE: Array, mask_N: Array) -> dict[str, Pair]:
  """The metrics of a router, from the weights of all experts for the tokens (or rows) of the mask."""
  count = mask_N.sum(dtype=jnp.float32)
  over = lambda a_N: (jnp.where(mask_N, a_N, 0.0).sum(), count)
  nothing = jnp.zeros(()), count
  load_E = jnp.where(mask_N[..., None], weight_NE, 0.0).sum(tuple(range(mask_N.ndim)))
  return {
      "load": (load_E, count), "experts_per_token": over(jnp.full(mask_N.shape, float(weight_NE.shape[-1]))),
      "entropy": over(-(weight_NE * jnp.log(jnp.maximum(weight_NE, 1e-30))).sum(-1)),
      "confidence": over(weight_NE.max(-1)), "dropped": nothing, "token_dropped": nothing}
