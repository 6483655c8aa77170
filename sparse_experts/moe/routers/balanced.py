"""Global assignment: all tokens of a group are assigned together, equally many to each expert (training)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sparse_experts.moe import parallel
from sparse_experts.moe.arguments import check, check_known
from sparse_experts.moe.routing import Router, Routing, Tokens, lists, scores
from sparse_experts.moe.routing.auction import auction
from sparse_experts.moe.routing.transport import sinkhorn

SCORE_INPUTS = ("normed", "stream")


class _BalancedRouter(Router):
  """One expert per token: with a key (training) by the group's assignment, without one by the best score.

  There is no loss: BASE's assignment is balanced exactly, so with T/E slots nothing is dropped while
  training. The largest entries of a transport plan are balanced nearly; the lower the temperature, the
  better.
  """

  def __init__(self, w_DE: Array):
    self.num_experts = w_DE.shape[1]
    self.w = nnx.Param(w_DE, axes=("embed", "router"))

  def assign(self, logit_GTE: Array, mask_GT: Array) -> Array:
    """expert_GT while training."""
    raise NotImplementedError

  def gates(self, logit_GTE: Array) -> Array:
    """What each expert's gate would be."""
    raise NotImplementedError

  def __call__(self, x_GTD: Array, tokens: Tokens, capacity: int | None, key: Array | None = None) -> Routing:
    return self.route(scores.linear(x_GTD, self.w[...]), tokens.mask, key=key)

  def route(self, logit_GTE: Array, mask_GT: Array, *, key: Array | None = None) -> Routing:
    """The routing of given scores; a `key` means training, and nothing is drawn from it."""
    fixed_GTE = jax.lax.stop_gradient(logit_GTE)
    expert_GT = fixed_GTE.argmax(-1) if key is None else parallel.by_group(self.assign, fixed_GTE, mask_GT)
    expert_GT = expert_GT.astype(jnp.int32)
    hit_GTE = jax.nn.one_hot(expert_GT, self.num_experts, dtype=bool)
    gate_GT = jnp.where(hit_GTE, self.gates(logit_GTE), 0.0).sum(-1)
    return lists.token_choice(expert_GT[..., None], gate_GT[..., None], scores.softmax(logit_GTE), mask_GT)


class BaseRouter(_BalancedRouter):
  """BASE: the assignment with the largest sum of scores; the gate is the sigmoid of the score.

  Lewis et al. 2021 (BASE layers), section 3. The paper's sigmoid(s) F(h) + (1 - sigmoid(s)) h, where F
  holds its own residual, is the block's residual plus this gate times the expert. Fairseq also shuffles
  tokens over workers first; here a group is what the config says. Entropy and confidence are those of a
  softmax over the scores, which BASE itself does not use. While training, an expert depends on all tokens of
  the group: a causal decoder refuses this router.

  score_input: what is scored: `normed`, the experts' input, after the block's norm; `stream`, the block's
    residual stream before it, as fairseq, whose experts have norms of their own.
  """

  held_to = "the optimum by the Hungarian algorithm; two own scripts"

  def __init__(self, d: int, num_experts: int, *, score_input: str = "normed", rngs: nnx.Rngs):
    check_known("router.score_input", score_input, SCORE_INPUTS)
    # Orthogonal with gain 0.1, as fairseq.
    super().__init__(jax.nn.initializers.orthogonal(0.1)(rngs.params(), (d, num_experts)))
    self.reads_stream = score_input == "stream"

  def assign(self, logit_GTE: Array, mask_GT: Array) -> Array:
    return auction(logit_GTE, mask_GT)

  def gates(self, logit_GTE: Array) -> Array:
    return jax.nn.sigmoid(logit_GTE)


class SinkhornRouter(_BalancedRouter):
  """S-BASE: the largest entry of each token's row of an entropic transport plan; the gate is a probability.

  temperature: of the plan; the smaller, the closer to BASE's assignment and the more rounds are needed.
  max_rounds: most updates of the plan.

  Clark et al. 2022 (Unified Scaling Laws for Routed Language Models), which gives few details: the gate
  and the stopping rule are ours. No gradient flows through the plan. While training, an expert depends on all
  tokens of the group: a causal decoder refuses this router.
  """

  held_to = "two own scripts, by the formula: the paper gives few details"

  def __init__(self, d: int, num_experts: int, *, temperature: float = 1.0, max_rounds: int = 200,
               rngs: nnx.Rngs):
    check(temperature > 0, "router.temperature", temperature, "is out of range; choose a number above 0")
    check(max_rounds >= 1, "router.max_rounds", max_rounds, "is out of range; choose 1 or more")
    super().__init__(0.02 * jax.random.normal(rngs.params(), (d, num_experts)))
    self.temperature, self.max_rounds = temperature, max_rounds

  def assign(self, logit_GTE: Array, mask_GT: Array) -> Array:
    return sinkhorn(logit_GTE, mask_GT, self.temperature, self.max_rounds).argmax(-1)

  def gates(self, logit_GTE: Array) -> Array:
    return scores.softmax(logit_GTE)
