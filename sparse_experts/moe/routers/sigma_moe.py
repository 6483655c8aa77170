"""sigma-MoE: sigmoid gates, kept in balance by the entropy of the mean softmax."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sparse_experts.moe.arguments import check, check_k, check_known
from sparse_experts.moe.routing import Router, Routing, Tokens, lists, losses, scores


class SigmaMoERouter(Router):
  """The k largest of sigmoid(x W) are the gates, not divided by their sum (Csordás et al. 2023).

  As in the code of MoEUT (Csordás et al. 2024). The loss is Σ_e P_e log P_e, minus an entropy and so below 0:
  P is the mean over tokens of the softmax of the logits, though gates are sigmoids. P is over the whole
  batch, as in the authors' code (there over all uses of a layer, too; here a layer is used once). To share
  one P between the layers of a stack set `train.layer_losses=pooled`. Nothing is dropped. The authors'
  experts are relu(x K) V without biases (`model.expert_activation=relu`), 128 wide. MoEUT's router sees
  LayerNorm(x) and
  its experts x itself: here both see the same.

  k: experts per token; the published models take 8.
  selection_dropout: while training, this part of the experts, drawn for each token, cannot be chosen; a token
    may end with fewer than k. Off in the published models.
  init_scale: W starts from N(0, init_scale² / d), its columns scaled to one norm that keeps the deviation of
    the whole. The authors' is sqrt(2 / layers).
  negative_entropy_weight: coefficient of the loss, the authors' 0.01.
  scope: over what P is: the `batch`, or each `group`.
  """

  held_to = "losses and outputs of MoEUT's code, run"

  def __init__(self, d: int, num_experts: int, k: int = 2, *, selection_dropout: float = 0.0,
               init_scale: float = 1.0, negative_entropy_weight: float = 1e-2, scope: str = "batch",
               rngs: nnx.Rngs):
    check_k(k, num_experts)
    check(0 <= selection_dropout < 1, "router.selection_dropout", selection_dropout,
          "is out of range; choose from 0 to below 1")
    check(init_scale > 0, "router.init_scale", init_scale, "is out of range; choose a number above 0")
    check_known("router.scope", scope, losses.SCOPES)
    self.num_experts, self.k, self.scope, self.selection_dropout = num_experts, k, scope, selection_dropout
    self.loss_weights = {"negative_entropy": negative_entropy_weight}
    self.causality, self.drop_causality = "self", "past" if k == 1 else "batch"
    w_DE = init_scale / math.sqrt(d) * jax.random.normal(rngs.params(), (d, num_experts))
    unit_DE = scores.unit(w_DE, 0)
    self.w = nnx.Param(unit_DE * w_DE.std() / unit_DE.std(), axes=("embed", "router"))

  def __call__(self, x_GTD: Array, tokens: Tokens, capacity: int | None, key: Array | None = None) -> Routing:
    return self.route(scores.linear(x_GTD, self.w[...]), tokens.mask, key)

  def route(self, logit_GTE: Array, mask_GT: Array, key: Array | None = None) -> Routing:
    """The routing of given logits; `key` is for `selection_dropout`."""
    score_GTE, stays_GTE = jax.nn.sigmoid(logit_GTE), jnp.ones(logit_GTE.shape, bool)
    if self.selection_dropout and key is not None:
      stays_GTE = jax.random.bernoulli(key, 1 - self.selection_dropout, logit_GTE.shape)
    # By logits: sigmoids of large ones tie in float32. Those left out are finite, so that none comes twice.
    expert_GTK, _ = scores.top_k(jnp.where(stays_GTE, logit_GTE, logit_GTE - 1e9), self.k)
    valid_GTK = jnp.take_along_axis(stays_GTE, expert_GTK, axis=-1) & mask_GT[..., None]
    prob_GTE = score_GTE / (score_GTE.sum(-1, keepdims=True) + 1e-20)
    softmax_GE = losses.sum_over_tokens(scores.softmax(logit_GTE), mask_GT)
    return lists.token_choice(
        expert_GTK, scores.pick(score_GTE, expert_GTK), prob_GTE, mask_GT, valid_GTK=valid_GTK,
        losses={"negative_entropy": losses.scoped(self.scope, _negative_entropy, softmax_GE, mask_GT)})


def _negative_entropy(sum_E: Array, tokens: Array) -> Array:
  """Σ_e P log P of the mean P."""
  return -scores.entropy(losses.mean(sum_E, tokens))
