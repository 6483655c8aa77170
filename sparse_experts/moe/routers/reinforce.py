"""Routing learned from rewards: experts are drawn, and choices with a small loss become more probable."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sparse_experts.moe.routing import Router, Routing, Tokens, count_experts, lists, losses, scores


class ReinforceRouter(Router):
  """RL-R: a policy softmax(x W), trained by REINFORCE with a learned baseline x v + b; gate 1.

  With a key the expert is drawn from the policy, without one it is the most probable. A token's reward is
  minus the loss: its own in a decoder, its sequence's mean in an encoder. Clark et al. 2022 (Unified Scaling
  Laws for Routed Language Models). The paper leaves open, so these are ours: gradients of rewards and of the
  baseline reach the router's weights only, not the tokens' vectors; and the coefficients below.

  load_balance_weight: coefficient of Switch's balance loss, which keeps the policy from one expert.
  policy_weight, baseline_weight: coefficients of the policy's and the baseline's losses (`losses.reward`).
  """

  held_to = "cases by hand; the coefficients are ours"
  causality = "self"
  drop_causality = "past"

  def __init__(self, d: int, num_experts: int, *, load_balance_weight: float = 1e-2,
               policy_weight: float = 1.0, baseline_weight: float = 1.0, rngs: nnx.Rngs):
    self.num_experts = num_experts
    self.loss_weights = {"load_balance": load_balance_weight}
    self.policy_weight, self.baseline_weight = policy_weight, baseline_weight
    self.w = nnx.Param(0.02 * jax.random.normal(rngs.params(), (d, num_experts)), axes=("embed", "router"))
    self.v = nnx.Param(jnp.zeros((d, 1)), axes=("embed", "router"))
    self.b = nnx.Param(jnp.zeros(1), axes=("router",))

  @property
  def reward_weights(self) -> dict[str, float]:
    return {"policy": self.policy_weight, "baseline": self.baseline_weight}

  def __call__(self, x_GTD: Array, tokens: Tokens, capacity: int | None, key: Array | None = None) -> Routing:
    fixed_GTD = jax.lax.stop_gradient(x_GTD)
    value_GT = scores.linear(fixed_GTD, self.v[...])[..., 0] + self.b[...][None]
    routing = self.route(scores.linear(x_GTD, self.w[...]), tokens.mask, key=key)
    # The same policy again, from vectors without gradient: rewards train the router's weights only.
    log_prob_GTE = jax.nn.log_softmax(scores.linear(fixed_GTD, self.w[...]), axis=-1)
    hit_GTE = jax.nn.one_hot(routing.expert, self.num_experts, dtype=bool) & tokens.mask[..., None]
    return routing.replace(log_prob=jnp.where(hit_GTE, log_prob_GTE, 0.0).sum(-1), value=value_GT)

  def route(self, logit_GTE: Array, mask_GT: Array, *, key: Array | None = None) -> Routing:
    """The routing of given logits, without `log_prob` and `value`; with a key experts are drawn."""
    drawn_GTE = logit_GTE if key is None else logit_GTE + jax.random.gumbel(key, logit_GTE.shape)
    expert_GT = drawn_GTE.argmax(-1).astype(jnp.int32)
    prob_GTE = scores.softmax(logit_GTE)
    count_GE = count_experts(expert_GT, mask_GT, self.num_experts)
    return lists.token_choice(
        expert_GT[..., None], jnp.ones((*expert_GT.shape, 1)), prob_GTE, mask_GT,
        losses={"load_balance": losses.load_balance(prob_GTE, count_GE, mask_GT)})
