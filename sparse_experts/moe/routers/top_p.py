"""Top-p: a token takes its best experts until their probabilities pass a threshold."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sparse_experts.moe.arguments import check, check_known
from sparse_experts.moe.routing import Router, Routing, Tokens, count_experts, lists, losses, scores


class TopPRouter(Router):
  """The fewest best experts whose probabilities sum to more than p, with raw gates (Huang et al. 2024).

  Experts are taken from the largest softmax(x W) down, up to and including the first at which the sum is
  above p: sampling from a nucleus would leave that one out. So a sure token has one expert and an unsure one
  several, at least one and, if no sum is above p, all. Training and evaluation choose alike. At the start,
  with nearly equal probabilities, a token takes about p E experts, and memory is largest then. The entropy
  loss keeps that number from growing to E; the authors end below 2. They drop nothing; under capacity, whose
  rules count two experts per token, first choices claim slots first. The list holds every token with every
  expert, and FLOPs count all E.

  threshold: p; the authors' 0.4.
  load_balance_weight, entropy_weight: coefficients of Switch's load-balancing loss, which here counts all of
    a token's experts, and of the mean entropy of the probabilities. The released code is for inference: the
    form of the first loss, and both numbers, are as others quote the paper.
  scope: over what the first loss is computed: each `group`, or the `batch`.
  """

  held_to = "sets of the authors' code, run; losses: their formulas"
  causality = "self"

  def __init__(self, d: int, num_experts: int, *, threshold: float = 0.4, load_balance_weight: float = 1e-2,
               entropy_weight: float = 1e-4, scope: str = "group", rngs: nnx.Rngs):
    check(0 <= threshold <= 1, "router.threshold", threshold,
          "is no sum of probabilities; choose from 0 to 1")
    check_known("router.scope", scope, losses.SCOPES)
    self.num_experts, self.k, self.most_experts = num_experts, min(2, num_experts), num_experts
    self.threshold, self.scope = threshold, scope
    self.loss_weights = {"load_balance": load_balance_weight, "token_entropy": entropy_weight}
    self.w = nnx.Param(0.02 * jax.random.normal(rngs.params(), (d, num_experts)), axes=("embed", "router"))

  def __call__(self, x_GTD: Array, tokens: Tokens, capacity: int | None, key: Array | None = None) -> Routing:
    return self.route(scores.linear(x_GTD, self.w[...]), tokens.mask)

  def route(self, logit_GTE: Array, mask_GT: Array) -> Routing:
    """The routing of given logits."""
    prob_GTE = scores.softmax(logit_GTE)
    expert_GTE, gate_GTE, valid_GTE = lists.every_expert(prob_GTE, mask_GT)
    fixed_GTE = jax.lax.stop_gradient(gate_GTE)
    # What the experts before sum to. Not the sum less the own: at p exactly, rounding would decide.
    before_GTE = jnp.pad(jnp.cumsum(fixed_GTE, axis=-1)[..., :-1], ((0, 0), (0, 0), (1, 0)))
    valid_GTE &= before_GTE <= self.threshold
    routing = lists.token_choice(expert_GTE, gate_GTE, prob_GTE, mask_GT, valid_GTK=valid_GTE,
                                 expected_fraction=self.k / self.num_experts)
    count_GE = count_experts(routing.expert, routing.valid, self.num_experts)
    return routing.replace(losses={
        "load_balance": losses.load_balance(prob_GTE, count_GE, mask_GT, self.scope),
        "token_entropy": losses.over_tokens(scores.entropy(prob_GTE), mask_GT)})
