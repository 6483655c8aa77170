"""Two-level noisy top-k gating: a token chooses branches, then experts of each."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sparse_experts.moe.arguments import check, check_divides, check_known
from sparse_experts.moe.routers.noisy_top_k import deviation, noisy_top_k
from sparse_experts.moe.routing import Router, Routing, Tokens, lists, losses, scores


class HierarchicalRouter(Router):
  """A gating network over I branches of J experts, and one over each branch's own (Shazeer et al. 2017).

  Both are `noisy_top_k`'s, and their gates are multiplied. Importance is of the products. The load of expert
  j of branch i is Load(i) · Load_i(j) / n_i, where Load_i sums over the n_i tokens that went to the branch; 0
  where none did, which is ours. The paper drops nothing; under capacity a token's largest gate claims its
  slot first.

  k: experts per token, in equal parts from each of its branches; the paper's 4, from 2.
  branches: I, groups of consecutive experts; the paper takes 16 and more.
  branches_per_token: how many a token uses.
  importance_weight, load_weight, scope: as for `noisy_top_k`.
  """

  held_to = "an own float64 loop, by the paper's equations"

  def __init__(self, d: int, num_experts: int, k: int = 4, *, branches: int = 4, branches_per_token: int = 2,
               importance_weight: float = 1e-2, load_weight: float = 1e-2, scope: str = "batch",
               rngs: nnx.Rngs):
    check_divides("router.branches", branches, num_experts)
    check_known("router.scope", scope, losses.SCOPES)
    check(1 <= branches_per_token <= branches, "router.branches_per_token", branches_per_token,
          f"is not between 1 and router.branches={branches}")
    size = num_experts // branches
    most = branches_per_token * size
    check(1 <= k <= most and k % branches_per_token == 0, "router.k", k,
          f"does not take 1 to {size} experts from each of router.branches_per_token={branches_per_token}"
          f" branches; choose a multiple, up to {most}")
    self.num_experts, self.k, self.scope = num_experts, k, scope
    self.branches, self.branches_per_token = branches, branches_per_token
    if 1 in (branches_per_token, k // branches_per_token):
      self.no_gradient = (f"router.k={k} with router.branches_per_token={branches_per_token} chooses one of "
                          "branches or of a branch's experts, whose gate is 1; choose 2 or more of both")
    self.loss_weights = {"importance": importance_weight, "load_loss": load_weight}
    self.causality, self.drop_causality = "self", "past" if k == 1 else "batch"
    zeros = lambda n: nnx.Param(jnp.zeros((d, n)), axes=("embed", "router"))
    self.w_branch, self.w_branch_noise = zeros(branches), zeros(branches)
    self.w, self.w_noise = zeros(num_experts), zeros(num_experts)

  def __call__(self, x_GTD: Array, tokens: Tokens, capacity: int | None, key: Array | None = None) -> Routing:
    logits = scores.linear(x_GTD, self.w_branch[...]), scores.linear(x_GTD, self.w[...])
    stds = deviation(x_GTD, self.w_branch_noise[...]), deviation(x_GTD, self.w_noise[...])
    if key is None:
      return self.route(logits, tokens.mask)
    noises = tuple(jax.random.normal(key, s.shape) for key, s in zip(jax.random.split(key), stds))
    return self.route(logits, tokens.mask, stds, noises)

  def route(self, logits: tuple[Array, Array], mask_GT: Array, stds: tuple[Any, ...] = (None, None),
            noises: tuple[Any, ...] = (None, None)) -> Routing:
    """The routing of given logits, deviations and draws, each a pair (branches' _GTI, experts' _GTE)."""
    G, T, E = logits[1].shape
    I, M = self.branches, self.branches_per_token
    by_branch = lambda a: jax.tree.map(lambda a_GTE: a_GTE.reshape(G, T, I, E // I), a)  # None stays None
    branch_GTM, first_GTM, chance_GTI, prob_GTI = noisy_top_k(logits[0], M, stds[0], noises[0])
    # Every branch chooses experts; those of the token's branches are used.
    index_GTIS, second_GTIS, chance_GTIJ, prob_GTIJ = noisy_top_k(
        by_branch(logits[1]), self.k // M, by_branch(stds[1]), by_branch(noises[1]))
    taken = lambda a_GTIS: jnp.take_along_axis(a_GTIS, branch_GTM[..., None], axis=2)
    expert_GTK = (branch_GTM[..., None] * (E // I) + taken(index_GTIS)).reshape(G, T, self.k)
    gate_GTK = (first_GTM[..., None] * taken(second_GTIS)).reshape(G, T, self.k)
    order_GTK = jnp.argsort(-gate_GTK, axis=-1, stable=True)
    expert_GTK, gate_GTK = (jnp.take_along_axis(a, order_GTK, axis=-1) for a in (expert_GTK, gate_GTK))

    went_GTI = jax.nn.one_hot(branch_GTM, I, dtype=bool).any(2) & mask_GT[..., None]
    loads = (losses.sum_over_tokens(chance_GTI, mask_GT), went_GTI.sum(1, dtype=jnp.float32),
             jnp.where(went_GTI[..., None], chance_GTIJ, 0.0).sum(1))

    prob_GTE = (prob_GTI[..., None] * prob_GTIJ).reshape(G, T, E)
    gate_GTE = scores.scatter_to_experts(gate_GTK, expert_GTK, E)
    return lists.token_choice(expert_GTK, gate_GTK, prob_GTE, mask_GT, losses={
        "importance": losses.importance(gate_GTE, mask_GT, self.scope),
        "load_loss": losses.scoped(self.scope, load_variation, loads, mask_GT)})


def load_variation(sums: tuple[Array, Array, Array], tokens: Array) -> Array:
  """Squared variation of Load(i) · Load_i(j) / n_i, from the sums Load(i), n_i and Load_i(j)."""
  load_I, went_I, load_IJ = sums
  load_IJ = load_IJ * (load_I / jnp.maximum(went_I, 1.0))[..., None]
  return losses.variation(load_IJ.reshape(*load_IJ.shape[:-2], -1), tokens)
