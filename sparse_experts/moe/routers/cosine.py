"""X-MoE's router: scores are cosines of token and expert in few dimensions, over a learned temperature."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sparse_experts.moe.arguments import check, check_known
from sparse_experts.moe.routers.top_k import TopKRouter
from sparse_experts.moe.routing import Convention, scores

# Gate function -> tau0, the constant temperature of the cosines in the balance loss.
BALANCE_TEMPERATURES = {"softmax": 0.3, "sigmoid": 0.07}


class CosineRouter(TopKRouter):
  """Top-k of cos(x W_low, w_expert) / temperature (Chi et al. 2022, X-MoE), whose softmax is the gate.

  Scores that depend on directions only, in J dimensions instead of D, are meant to keep tokens from
  collapsing towards the experts' vectors. The temperature is learned, as the log of its inverse, which is at
  most `MAX_SCALE`. The balance loss takes the softmax of the cosines at a constant temperature instead, 0.3
  with the softmax gate and 0.07 with the sigmoid gate: at the learned one (as in Tutel), the router could
  lower the loss by raising the temperature. The rest is `TopKRouter`'s.

  k, gate, order, balance_count, scope, load_balance_weight: as for `TopKRouter`.
  dim: J; None: E / 2, the paper's. TorchScale's X-MoE projects to 16, Tutel to 256.
  temperature: its initial value; 0.5 is Tutel's.
  gate_function: `softmax` over all experts, or the `sigmoid` of each expert's own score; the choice is the
    same.
  """

  held_to = "two own scripts, by the paper's equations"
  MAX_SCALE = 100.0

  @classmethod
  def convention(cls, k: int) -> Convention:
    return Convention()

  def __init__(self, d: int, num_experts: int, k: int = 1, *, dim: int | None = None,
               temperature: float = 0.5, gate_function: str = "softmax", gate: str = "raw",
               order: str = "choice", balance_count: str = "first", scope: str = "group",
               load_balance_weight: float = 1e-2, rngs: nnx.Rngs):
    dim = max(num_experts // 2, 1) if dim is None else dim
    check(dim >= 1, "router.dim", dim, "leaves no direction; choose 1 or more")
    check(temperature >= 1 / self.MAX_SCALE, "router.temperature", temperature,
          f"is less than {1 / self.MAX_SCALE}, where it cannot learn; choose more")
    check_known("router.gate_function", gate_function, BALANCE_TEMPERATURES)
    super().__init__(d, num_experts, k, gate=gate, order=order, balance_count=balance_count,
                     scope=scope, load_balance_weight=load_balance_weight, rngs=rngs)
    self.gate_function = gate_function
    normal = lambda *shape: jax.random.normal(rngs.params(), shape) / math.sqrt(shape[0])
    self.w = nnx.Param(normal(d, dim), axes=("embed", None))
    self.w_expert = nnx.Param(normal(dim, num_experts), axes=(None, "router"))
    self.log_scale = nnx.Param(jnp.asarray(-math.log(temperature)), axes=())

  @property
  def scale(self) -> Array:
    """The inverse temperature."""
    return jnp.exp(jnp.minimum(self.log_scale[...], math.log(self.MAX_SCALE)))

  def score(self, x_GTD: Array) -> Array:
    low_GTJ, expert_JE = scores.linear(x_GTD, self.w[...]), self.w_expert[...]
    return self.scale * scores.linear(scores.unit(low_GTJ, -1), scores.unit(expert_JE, 0))

  def balanced_prob(self, logit_GTE: Array, prob_GTE: Array) -> Array:
    return scores.softmax(logit_GTE / (self.scale * BALANCE_TEMPERATURES[self.gate_function]))

  def gates(self, logit_GTE: Array, expert_GTK: Array, prob_GTK: Array) -> Array:
    return prob_GTK if self.gate_function == "softmax" else jax.nn.sigmoid(scores.pick(logit_GTE, expert_GTK))
