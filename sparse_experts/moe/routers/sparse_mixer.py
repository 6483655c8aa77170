"""SparseMixer-v2: experts are drawn one round after the other, with a gradient for the draw."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sparse_experts.moe.arguments import check, check_k, check_known
from sparse_experts.moe.routing import Router, Routing, Tokens, count_experts, lists, losses, noise, scores

THIRD = 0.3333  # as the code has it


class SparseMixerRouter(Router):
  """One expert per round, drawn among the near-best; the gate is its softmax in that round (Liu et al. 2024).

  GRIN's routing as Hugging Face's Phi-3.5-MoE has it. A round looks at the logits l of the experts that no
  earlier round took, m the largest: those with (m - l) / max(|l|, m) above 2 eps are left out, a ratio. While
  training one of the others is drawn from their softmax π, in evaluation it is the best. The gate is π of the
  chosen expert, so gates of two rounds sum to nearly 2, and are not normalised together. In training the
  gate's value is multiplied by 1/3 in three of four draws that are not the best expert; its gradient is that
  of π_chosen, unscaled. Nothing is dropped in the paper.

  k: rounds, 2 in the code, whatever its config says; 1 is the first round alone.
  eps: of the rule above, the release's 0.01.
  jitter: in training the router's input is multiplied by U(1 - jitter, 1 + jitter); in the release, with
    0.01, the experts' input too.
  load_balance_weight: coefficient of Switch's load-balancing loss, with all choices counted and the softmax
    of all logits; the paper's coefficient was not found.
  scope: over what that loss is: GRIN's `batch`, whose counts are over all data ranks, or each `group`.
  """

  held_to = "gates and gradients of Hugging Face's Phi-3.5-MoE, run"

  def __init__(self, d: int, num_experts: int, k: int = 2, *, eps: float = 0.01, jitter: float = 0.01,
               load_balance_weight: float = 1e-2, scope: str = "batch", rngs: nnx.Rngs):
    check(k <= 2, "router.k", k, "is more than the two rounds that the paper has; choose 1 or 2")
    check_k(k, num_experts)
    check(eps >= 0, "router.eps", eps, "leaves no expert to choose; choose 0 or more")
    check_known("router.scope", scope, losses.SCOPES)
    self.num_experts, self.k, self.eps, self.jitter, self.scope = num_experts, k, eps, jitter, scope
    self.loss_weights = {"load_balance": load_balance_weight}
    self.causality, self.drop_causality = "self", "past" if k == 1 else "batch"
    self.w = nnx.Param(0.02 * jax.random.normal(rngs.params(), (d, num_experts)), axes=("embed", "router"))

  def __call__(self, x_GTD: Array, tokens: Tokens, capacity: int | None, key: Array | None = None) -> Routing:
    x_GTD = x_GTD.astype(jnp.float32)
    if self.jitter and key is not None:
      key, jitter_key = jax.random.split(key)
      x_GTD = noise.jitter(x_GTD, self.jitter, jitter_key)
    return self.route(scores.linear(x_GTD, self.w[...]), tokens.mask, key)

  def route(self, logit_GTE: Array, mask_GT: Array, key: Array | None = None) -> Routing:
    """The routing of given logits; `key` is for the draws of training."""
    E, left_GTE = self.num_experts, logit_GTE
    chosen, gates = [], []
    for i in range(self.k):
      draws: tuple[Array | None, Array | None] = (None, None)
      if key is not None:
        draw_key, keep_key = jax.random.split(jax.random.fold_in(key, i))
        draws = (jax.random.gumbel(draw_key, logit_GTE.shape), jax.random.uniform(keep_key, mask_GT.shape))
      expert_GT, gate_GT = choose(left_GTE, self.eps, *draws)
      left_GTE = jnp.where(jax.nn.one_hot(expert_GT, E, dtype=bool), -jnp.inf, left_GTE)
      chosen.append(expert_GT)
      gates.append(gate_GT)
    prob_GTE = scores.softmax(logit_GTE)
    routing = lists.token_choice(jnp.stack(chosen, -1), jnp.stack(gates, -1), prob_GTE, mask_GT)
    count_GE = count_experts(routing.expert, routing.valid, E)
    return routing.replace(losses={
        "load_balance": losses.load_balance(prob_GTE, count_GE, mask_GT, self.scope)})


def choose(logit_GTE: Array, eps: float, gumbel_GTE: Array | None = None,
           uniform_GT: Array | None = None) -> tuple[Array, Array]:
  """(expert_GT, gate_GT) of one round; logits are -inf where an earlier round took the expert.

  With draws, an expert of the softmax and the gate's value of training; without, the best expert.
  """
  fixed_GTE = jax.lax.stop_gradient(logit_GTE)
  top_GT1 = fixed_GTE.max(-1, keepdims=True)
  # A product, not a ratio: all logits of padding are 0.
  near_GTE = top_GT1 - fixed_GTE <= 2 * eps * jnp.maximum(jnp.abs(fixed_GTE), top_GT1)
  near_GTE &= fixed_GTE > -jnp.inf
  masked_GTE = jnp.where(near_GTE, logit_GTE, -jnp.inf)
  drawn_GTE = jax.lax.stop_gradient(masked_GTE)
  best_GT = drawn_GTE.argmax(-1).astype(jnp.int32)
  if gumbel_GTE is None or uniform_GT is None:
    return best_GT, scores.pick(scores.softmax(masked_GTE), best_GT[..., None])[..., 0]
  expert_GT = (drawn_GTE + gumbel_GTE).argmax(-1).astype(jnp.int32)
  gate_GT = scores.pick(scores.softmax(masked_GTE), expert_GT[..., None])[..., 0]
  whole_GT = (expert_GT == best_GT) | (uniform_GT > 0.75)
  lost_GT = jax.lax.stop_gradient(jnp.where(whole_GT, 0.0, (1 - THIRD) * gate_GT))
  return expert_GT, gate_GT - lost_GT  # the value is scaled, the gradient is not
