"""DSelect-k: k selectors, each a binary code of an expert; bits are smooth at first and hard at the end."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sparse_experts.moe.arguments import check, check_k
from sparse_experts.moe.routing import Router, Routing, Tokens, lists, losses, scores
from sparse_experts.moe.routing.smooth_step import selection_entropy, smooth_step, uniform


class DSelectKRouter(Router):
  """Gates are Σ_j alpha_j r_j: alpha a softmax over k selectors, r_j selector j's probability of each expert.

  An expert's code is its index in ceil(log2 E) bits, the most significant first; r_ji is the product over
  bits of S(z) or 1 - S(z), S the smooth-step. Hazimeh et al. 2021 (DSelect-k), sections 3 and 4.
  Until bits are hard every expert may have a gate above 0, so the list holds all experts, the largest gate
  first; a gate of exactly 0 is not computed. At the end a token has at most k experts.

  If E is not a power of two, some codes belong to no expert: gates then sum to less than 1, and a selector
  whose bits are hard on such a code chooses no expert and has no gradient to leave it. The `inverse_mass`
  loss keeps selectors away from there.

  k: selectors.
  per_example: True: bits and weights of the selectors come from the token, by a dense layer with bias each;
    False: they are the same for all tokens (the paper's static gate, one per task).
  gamma: width of the smooth-step; the paper's 1. The smaller, the sooner bits are hard.
  entropy_weight: coefficient of the selections' entropy, a mean over tokens. In the authors' code it is off
    by default, and summed over the batch with 1e-6, which is N 1e-6 here for N tokens. None: 1e-3, that of
    N = 1,000, if `per_example`; 1e-6 for the static gate, which has no batch to sum over.
  inverse_mass_weight: coefficient of Σ_j 1 / Σ_i r_ji, the paper's 1 for static gates. The loss is at
    least k. The paper's code sums it over the batch and has no floor; here the mass is at least 1e-6.
  """

  held_to = "an own float64 loop, by the paper's formula"

  def __init__(self, d: int, num_experts: int, k: int = 2, *, per_example: bool = True, gamma: float = 1.0,
               entropy_weight: float | None = None, inverse_mass_weight: float = 1.0, rngs: nnx.Rngs):
    check_k(k, num_experts)
    check(gamma > 0, "router.gamma", gamma, "is out of range; choose a number above 0")
    self.num_experts, self.bits, self.gamma = num_experts, (num_experts - 1).bit_length(), gamma
    self.k = self.most_experts = k
    self.codes_are_full = num_experts == 2**self.bits
    if entropy_weight is None:
      entropy_weight = 1e-3 if per_example else 1e-6
    self.loss_weights = {"selection_entropy": entropy_weight}
    if not self.codes_are_full:
      self.loss_weights |= {"inverse_mass": inverse_mass_weight}
    self.causality = "self"  # drops: a later token's first choice evicts an earlier token's second
    # z starts near 0, where all codes are equally likely. One expert has no bits: no array then, because a
    # checkpoint takes no empty one.
    self.b_code = uniform(rngs, gamma / 100, k * self.bits) if self.bits else None
    self.b_select = uniform(rngs, 0.05, k)
    self.w_code = uniform(rngs, gamma / 100, d, k * self.bits) if self.bits and per_example else None
    self.w_select = uniform(rngs, 0.05, d, k) if per_example else None

  def __call__(self, x_GTD: Array, tokens: Tokens, capacity: int | None, key: Array | None = None) -> Routing:
    code = self._score(x_GTD, self.w_code, self.b_code).reshape(*x_GTD.shape[:2], self.k, self.bits)
    return self.route(code, self._score(x_GTD, self.w_select, self.b_select), tokens.mask)

  def _score(self, x_GTD: Array, w: nnx.Param | None, b: nnx.Param | None) -> Array:
    """x w + b of each token; for the static gate b alone; of no bits, nothing."""
    if b is None:
      return jnp.zeros((*x_GTD.shape[:2], 0))
    if w is None:
      return jnp.broadcast_to(b[...], (*x_GTD.shape[:2], b.shape[0]))
    return scores.linear(x_GTD, w[...]) + b[...][None, None]

  def route(self, code_GTKB: Array, select_GTK: Array, mask_GT: Array) -> Routing:
    """The routing of given z, B bits of each selector, and of given logits of the selectors."""
    r_GTKE = self.selections(smooth_step(code_GTKB, self.gamma))
    gate_GTE = (jax.nn.softmax(select_GTK, axis=-1)[..., None] * r_GTKE).sum(-2)
    sum_GT = gate_GTE.sum(-1)
    prob_GTE = gate_GTE / jnp.where(sum_GT > 0, sum_GT, 1.0)[..., None]
    expert_GTE, gate_GTE, valid_GTE = lists.every_expert(gate_GTE, mask_GT)
    entropy = {"selection_entropy": selection_entropy(r_GTKE, mask_GT)}
    routing = lists.token_choice(expert_GTE, gate_GTE, prob_GTE, mask_GT, valid_GTK=valid_GTE, losses=entropy,
                                 expected_fraction=self.k / self.num_experts)
    if self.codes_are_full:
      return routing
    inverse_mass_GT = (1 / jnp.maximum(r_GTKE.sum(-1), 1e-6)).sum(-1)
    return routing.replace(
        losses=routing.losses | {"inverse_mass": losses.over_tokens(inverse_mass_GT, mask_GT)},
        metrics=routing.metrics | {"gate_sum": losses.over_tokens(sum_GT, mask_GT)})

  def selections(self, bit_GTKB: Array) -> Array:
    """r_GTKE: the probability of each expert's code, for independent bits."""
    r = jnp.ones((*bit_GTKB.shape[:-1], 1))
    for b in range(self.bits):  # the codes' first b + 1 bits
      bit = bit_GTKB[..., b, None]
      r = jnp.stack([r * (1 - bit), r * bit], axis=-1).reshape(*r.shape[:-1], -1)
    return r[..., :self.num_experts]
