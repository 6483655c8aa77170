"""X-MoE's router: scores are cosines of token and expert in few dimensions, over a learned temperature."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sparse_experts.moe.arguments import check
from sparse_experts.moe.routers.top_k import TopKRouter
from sparse_experts.moe.routing import scores


class CosineRouter(TopKRouter):
  """Top-k of the softmax of cos(x W_low, w_expert) / temperature (Chi et al. 2022, X-MoE).

  Scores that depend on directions only, in J dimensions instead of D, are meant to keep tokens from
  collapsing towards the experts' vectors. As in Tutel's cosine gate, both sides are normalised, and the log
  of the inverse temperature is learned; the inverse is at most `MAX_SCALE`. The rest is `TopKRouter`'s.

  k, gate, order, balance_count, load_balance_weight: as for `TopKRouter`.
  dim: J. TorchScale's X-MoE projects to 16, Tutel to 256.
  temperature: its initial value; 0.5 is Tutel's.
  """

  MAX_SCALE = 100.0

  def __init__(self, d: int, num_experts: int, k: int = 1, *, dim: int = 16, temperature: float = 0.5,
               gate: str = "raw", order: str = "choice", balance_count: str = "first",
               load_balance_weight: float = 1e-2, rngs: nnx.Rngs):
    check(dim >= 1, "router.dim", dim, "leaves no direction; choose 1 or more")
    check(temperature >= 1 / self.MAX_SCALE, "router.temperature", temperature,
          f"is less than {1 / self.MAX_SCALE}, where it cannot learn; choose more")
    super().__init__(d, num_experts, k, gate=gate, order=order, balance_count=balance_count,
                     load_balance_weight=load_balance_weight, rngs=rngs)
    normal = lambda *shape: jax.random.normal(rngs.params(), shape) / math.sqrt(shape[0])
    self.w = nnx.Param(normal(d, dim), axes=("embed", None))
    self.w_expert = nnx.Param(normal(dim, num_experts), axes=(None, "router"))
    self.log_scale = nnx.Param(jnp.asarray(-math.log(temperature)), axes=())

  def score(self, x_GTD: Array) -> Array:
    low_GTJ, expert_JE = scores.linear(x_GTD, self.w[...]), self.w_expert[...]
    scale = jnp.exp(jnp.minimum(self.log_scale[...], math.log(self.MAX_SCALE)))
    return scale * scores.linear(scores.unit(low_GTJ, -1), scores.unit(expert_JE, 0))
