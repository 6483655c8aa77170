"""Noisy top-k gating, from the first sparsely-gated mixture of experts."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sparse_experts.moe.arguments import check_k, check_known
from sparse_experts.moe.routing import Router, Routing, Tokens, lists, losses, scores

STD_FLOOR = 1e-2


class NoisyTopKRouter(Router):
  """softmax over the k largest of x W + N(0, 1) * softplus(x W_noise) (Shazeer et al. 2017, eq. 3-5).

  As Tensor2Tensor where that differs from the paper: the noise's deviation is at least `STD_FLOOR`; without
  noise, or with k = E, the load is a count without gradient. Both weights start at zero, so the first
  routings are noise alone; without a key an untrained router sends every token to experts 0 to k-1. The paper
  drops nothing; under capacity first choices claim slots first.

  k: experts per token; the paper's flat layers take 4. With 1 the gate is 1 and has no gradient:
    training refuses it.
  importance_weight, load_weight: coefficients of the two losses; 0.1 for the paper's language models, 0.01
    for its translation models and as Tensor2Tensor's default.
  scope: over what both losses are computed: `batch` as the paper and Tensor2Tensor, or each `group`, where
    fewer tokens vary more: even routing has a larger loss.
  """

  held_to = "two own scripts, by the paper's equations"

  def __init__(self, d: int, num_experts: int, k: int = 2, *, importance_weight: float = 1e-2,
               load_weight: float = 1e-2, scope: str = "batch", rngs: nnx.Rngs):
    check_k(k, num_experts)
    check_known("router.scope", scope, losses.SCOPES)
    self.num_experts, self.k, self.scope = num_experts, k, scope
    self.loss_weights = {"importance": importance_weight, "load_loss": load_weight}
    if k == 1:
      self.no_gradient = "the softmax over router.k=1 choice makes every gate 1; choose router.k=2 or more"
    self.causality, self.drop_causality = "self", "past" if k == 1 else "batch"
    self.w = nnx.Param(jnp.zeros((d, num_experts)), axes=("embed", "router"))
    self.w_noise = nnx.Param(jnp.zeros((d, num_experts)), axes=("embed", "router"))

  def __call__(self, x_GTD: Array, tokens: Tokens, capacity: int | None, key: Array | None = None) -> Routing:
    std_GTE = deviation(x_GTD, self.w_noise[...])
    noise_GTE = None if key is None else jax.random.normal(key, std_GTE.shape)
    return self.route(scores.linear(x_GTD, self.w[...]), tokens.mask, std_GTE, noise_GTE)

  def route(self, logit_GTE: Array, mask_GT: Array, std_GTE: Array | float = 0.0,
            noise_GTE: Array | None = None) -> Routing:
    """The routing of given logits, deviations and draws; no draws, no noise."""
    expert_GTK, gate_GTK, chance_GTE, prob_GTE = noisy_top_k(logit_GTE, self.k, std_GTE, noise_GTE)
    gate_GTE = scores.scatter_to_experts(gate_GTK, expert_GTK, self.num_experts)
    return lists.token_choice(expert_GTK, gate_GTK, prob_GTE, mask_GT, losses={
        "importance": losses.importance(gate_GTE, mask_GT, self.scope),
        "load_loss": losses.load(chance_GTE, mask_GT, self.scope)})


def deviation(x_GTD: Array, w_noise_DE: Array) -> Array:
  """Standard deviation of the noise on each logit, _GTE."""
  return jax.nn.softplus(scores.linear(x_GTD, w_noise_DE)) + STD_FLOOR


def noisy_top_k(logit_GTE: Array, k: int, std_GTE: Array | float,
                noise_GTE: Array | None) -> tuple[Array, Array, Array, Array]:
  """(expert_GTK, gate_GTK, chance_GTE of being among the k, prob_GTE): one gating network (eq. 3-5, 8-9)."""
  noisy_GTE = logit_GTE if noise_GTE is None else logit_GTE + noise_GTE * std_GTE
  expert_GTK, best_GTK = scores.top_k(noisy_GTE, k)
  gate_GTK = jax.nn.softmax(best_GTK, axis=-1)
  if noise_GTE is not None and k < logit_GTE.shape[-1]:
    chance_GTE = chance(logit_GTE, noisy_GTE, std_GTE, k)
  else:
    chance_GTE = scores.scatter_to_experts(jnp.ones_like(gate_GTK), expert_GTK, logit_GTE.shape[-1])
  return expert_GTK, gate_GTK, chance_GTE, scores.softmax(noisy_GTE)


def chance(logit_GTE: Array, noisy_GTE: Array, std_GTE: Array | float, k: int) -> Array:
  """P(an expert is among the k if only its own noise is drawn again); k < E (eq. 8-9)."""
  _, best_GTK = scores.top_k(noisy_GTE, k + 1)
  last_GT1, next_GT1 = best_GTK[..., -2:-1], best_GTK[..., -1:]
  # The k-th largest of the other experts: for one among the k, the best that is not.
  return losses.chance(logit_GTE, jnp.where(noisy_GTE > next_GT1, next_GT1, last_GT1), std_GTE)
