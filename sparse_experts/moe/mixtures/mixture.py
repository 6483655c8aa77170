"""What layers have in common that mix all experts: to a model they look like `MoELayer`."""

from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import Array

from sparse_experts.moe.experts import Experts
from sparse_experts.moe.routing import Pair


class MixtureLayer(nnx.Module):
  """Has no router, and its routings no list; a row of its input is mixed by itself, and nothing is dropped.

  A subclass also has `dispatch`, a word for tables, and `rows_per_token` and `router_flops` for counting.
  """

  causality = routing_causality = "batch"
  router = None
  group_size = 1  # any number of rows does
  loss_weights: ClassVar[dict[str, float]] = {}

  def __init__(self, experts: Experts):
    self.experts = experts
    self.num_experts = self.k = experts.num_experts  # all of them work for every token

  def capacity(self, group_size: int) -> None:
    """None, as a layer that drops nothing."""


def mixture_metrics(weight_NE: Array, mask_N: Array) -> dict[str, Pair]:
  """A router's metrics for what mixes all experts, of the weights of tokens (or rows) that count."""
  count = mask_N.sum(dtype=jnp.float32)
  over = lambda a_N: (jnp.where(mask_N, a_N, 0.0).sum(), count)
  nothing = jnp.zeros(()), count
  load_E = jnp.where(mask_N[..., None], weight_NE, 0.0).sum(tuple(range(mask_N.ndim)))
  return {
      "load": (load_E, count), "experts_per_token": over(jnp.full(mask_N.shape, float(weight_NE.shape[-1]))),
      "entropy": over(-(weight_NE * jnp.log(jnp.maximum(weight_NE, 1e-30))).sum(-1)),
      "confidence": over(weight_NE.max(-1)), "dropped": nothing, "token_dropped": nothing}
