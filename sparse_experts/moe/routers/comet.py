"""COMET: k decision trees whose leaves are the experts; splits are smooth at first and hard at the end."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sparse_experts.moe.arguments import check, check_k
from sparse_experts.moe.routing import Router, Routing, Tokens, lists, scores
from sparse_experts.moe.routing.smooth_step import selection_entropy, smooth_step, uniform


class CometRouter(Router):
  """Gates are the softmax of a_ij + log p_ij over the leaves i of all k trees j, summed over trees.

  Ibrahim et al. 2023 (COMET). A tree's splits S(w x + b) give its leaf the probability p_ij; a_ij is the
  leaf's own logit; S is the smooth-step, so p and the gate become exactly 0. Nodes are numbered as in a heap
  (split q has children 2q + 1 and 2q + 2, leaves start at E - 1), so any number of experts works; leaves from
  left to right are experts 0, 1, ... As in the authors' code, log(p + 1e-8). Until splits are hard every
  expert may have a gate above 0, so the list holds all experts, the largest gate first; a gate of exactly 0
  is not computed. At the end a token has at most k experts.

  k: trees.
  gamma: width of the smooth-step; the authors try 0.01 to 1 on text. The smaller, the sooner splits are hard.
  entropy_weight: coefficient of the trees' entropy, a mean over tokens; the authors try 0.05 to 10 on text.
  Both defaults are ours: with an entropy_weight of 0.05 splits may be hard before experts differ, and most
  experts stay unused. The L2 penalty that the authors' code puts on the weights of splits and leaves, biases
  apart, is left out; the optimizer's weight decay acts on both.
  """

  held_to = "an own float64 recursion, by the paper's formula"

  def __init__(self, d: int, num_experts: int, k: int = 2, *, gamma: float = 1.0,
               entropy_weight: float = 1e-3, rngs: nnx.Rngs):
    check_k(k, num_experts)
    check(gamma > 0, "router.gamma", gamma, "is out of range; choose a number above 0")
    self.num_experts, self.gamma = num_experts, gamma
    self.k = self.most_experts = k
    self.loss_weights = {"selection_entropy": entropy_weight}
    self.causality = "self"  # drops: a later token's first choice evicts an earlier token's second
    splits = num_experts - 1  # 0: no array, as a checkpoint takes no empty one
    self.w_split = uniform(rngs, gamma / 100, d, k * splits) if splits else None
    self.b_split = uniform(rngs, gamma / 100, k * splits) if splits else None
    self.w_leaf, self.b_leaf = uniform(rngs, 0.05, d, k * num_experts), uniform(rngs, 0.05, k * num_experts)

  def __call__(self, x_GTD: Array, tokens: Tokens, capacity: int | None, key: Array | None = None) -> Routing:
    by_tree = lambda a: a.reshape(*x_GTD.shape[:2], self.k, -1)
    split = jnp.zeros((*x_GTD.shape[:2], self.k, 0))
    if self.w_split is not None and self.b_split is not None:
      split = by_tree(scores.linear(x_GTD, self.w_split[...]) + self.b_split[...][None, None])
    leaf_GTKE = by_tree(scores.linear(x_GTD, self.w_leaf[...]) + self.b_leaf[...][None, None])
    return self.route(split, leaf_GTKE, tokens.mask)

  def route(self, split: Array, leaf_GTKE: Array, mask_GT: Array) -> Routing:
    """The routing of given scores of each tree's splits [G, T, K, E - 1] and leaves, a."""
    p_GTKE = paths(smooth_step(split, self.gamma))
    # The smallest float instead of -inf: its softmax is 0, too, and the gradient has no NaN.
    score_GTKE = jnp.where(p_GTKE > 0, leaf_GTKE + jnp.log(p_GTKE + 1e-8), jnp.finfo(jnp.float32).min)
    prob_GTE = jax.nn.softmax(score_GTKE, axis=(-2, -1)).sum(-2)
    expert_GTE, gate_GTE, valid_GTE = lists.every_expert(prob_GTE, mask_GT)
    entropy = {"selection_entropy": selection_entropy(p_GTKE, mask_GT)}
    return lists.token_choice(expert_GTE, gate_GTE, prob_GTE, mask_GT, valid_GTK=valid_GTE, losses=entropy,
                              expected_fraction=self.k / self.num_experts)


def paths(left: Array) -> Array:
  """Leaf probabilities from left to right, from each split's probability of going left, in heap order.

  Last axis n - 1 -> n. Computes a level of nodes at a time; in a level splits come before leaves.
  """
  level, done, splits = jnp.ones((*left.shape[:-1], 1)), 0, left.shape[-1]
  while done < splits:
    width = min(level.shape[-1], splits - done)
    node, z = level[..., :width], left[..., done:done + width]
    children = jnp.stack([node * z, node * (1 - z)], axis=-1).reshape(*left.shape[:-1], 2 * width)
    level, done = jnp.concatenate([children, level[..., width:]], axis=-1), done + width
  return level
