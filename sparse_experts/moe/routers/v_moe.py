"""V-MoE's router: noisy softmax, gates that are not renormalised, importance and load losses."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sparse_experts.moe.arguments import check, check_k, check_known
from sparse_experts.moe.routing import (
  Convention,
  Router,
  Routing,
  Tokens,
  count_experts,
  lists,
  losses,
  scores,
)


class VMoERouter(Router):
  """The k largest of softmax(x W + N(0, 1/E²)), as gates (Riquelme et al. 2021, section 2 and appendix A).

  As the paper's code (google-research/vmoe): choices and gates use the noisy softmax, importance uses the
  clean one, and an expert's load compares its clean logit with the k-th largest noisy one, its own included.
  Without noise that code has no load loss; here the load is then a count, without gradient.

  k: experts per token.
  noise: standard deviation of the noise, times E; used with a key only.
  order: who claims slots first, see `TopKRouter`; `batch_priority` sorts tokens by their largest noisy
    probability, and a causal decoder refuses it. The paper trains with `choice`.
  importance_weight, load_weight: coefficients of the two losses; the paper's 0.01, halved over both.
  load_balance_weight: that of Switch's load-balancing loss of the noisy choices and probabilities, the code's
    gshard_loss_weight.
  """

  held_to = "two own scripts, by vmoe's code as read"

  @classmethod
  def convention(cls, k: int) -> Convention:
    return Convention(1.05, 1.05, "vmoe")

  def __init__(self, d: int, num_experts: int, k: int = 2, *, noise: float = 1.0, order: str = "choice",
               importance_weight: float = 5e-3, load_weight: float = 5e-3, load_balance_weight: float = 0.0,
               rngs: nnx.Rngs):
    check_k(k, num_experts)
    check_known("router.order", order, lists.ORDERS)
    check(not noise < 0, "router.noise", noise, "is negative; choose 0 or more")
    self.num_experts, self.k, self.noise, self.order = num_experts, k, noise, order
    self.loss_weights = {"importance": importance_weight, "load_loss": load_weight,
                         "load_balance": load_balance_weight}
    self.causality = "batch" if order == "batch_priority" else "self"
    self.drop_causality = "past" if order == "token" or (k == 1 and order == "choice") else "batch"
    # A Flax Dense without bias.
    self.w = nnx.Param(
        jax.nn.initializers.lecun_normal()(rngs.params(), (d, num_experts)), axes=("embed", "router"))

  def __call__(self, x_GTD: Array, tokens: Tokens, capacity: int | None, key: Array | None = None) -> Routing:
    logit_GTE = scores.linear(x_GTD, self.w[...])
    noise_GTE = None
    if key is not None and self.noise:
      noise_GTE = self.noise / self.num_experts * jax.random.normal(key, logit_GTE.shape)
    return self.route(logit_GTE, tokens.mask, noise_GTE)

  def route(self, logit_GTE: Array, mask_GT: Array, noise_GTE: Array | None = None) -> Routing:
    """The routing of given logits; `noise_GTE`, of deviation noise / E, is added to them."""
    E = self.num_experts
    noisy_GTE = logit_GTE if noise_GTE is None else logit_GTE + noise_GTE
    expert_GTK, best_GTK = scores.top_k(noisy_GTE, self.k)
    prob_GTE = scores.softmax(noisy_GTE)
    gate_GTK = jnp.take_along_axis(prob_GTE, expert_GTK, axis=-1)
    if noise_GTE is None:
      chance_GTE = scores.scatter_to_experts(jnp.ones_like(gate_GTK), expert_GTK, E)
    else:
      chance_GTE = losses.chance(logit_GTE, best_GTK[..., -1:], self.noise / E)
    first_GE = count_experts(expert_GTK[..., 0], mask_GT, E)
    return lists.token_choice(expert_GTK, gate_GTK, prob_GTE, mask_GT, order=self.order, losses={
        "importance": losses.importance(scores.softmax(logit_GTE), mask_GT),
        "load_loss": losses.load(chance_GTE, mask_GT),
        "load_balance": losses.load_balance(prob_GTE, first_GE, mask_GT)})
