"""COMET: k decision trees whose leaves are the experts, smooth while they learn and hard in the end."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sparse_experts.errors import UserError
from sparse_experts.moe.routing import Routing, Tokens, lists, scores
from sparse_experts.moe.routing.router import Router
from sparse_experts.moe.routing.smooth_step import selection_entropy, smooth_step, uniform


class CometRouter(Router):
  """A tree's splits S(w x + b) give leaf i the probability p_ij, and the leaf has a logit a_ij of its own.

  One softmax of a_ij + log p_ij over all leaves of all k trees, summed over trees, is the gate; S is the
  smooth-step, so p and the gate become exactly 0. Ibrahim et al. 2023 (COMET). Nodes are numbered as in a
  heap (split q has children 2q + 1 and 2q + 2, from E - 1 on they are leaves): any number of experts does,
  and leaves from left to right are experts 0, 1, ... As the authors' code, log(p + 1e-8).
  Until splits are hard every expert may have a gate, so the list names them all, the largest gate first, and
  those with a gate of exactly 0 are not computed: at most k experts in the end.

  k: trees.
  gamma: width of the smooth-step; the authors try 0.01 to 1 on text. The smaller, the sooner splits are hard.
  entropy_weight: coefficient of the trees' entropy, a mean over tokens; the authors try 0.05 to 10 on text.
  Both defaults are ours: with 0.05 splits may be hard before experts differ, and most experts stay unused.
  The authors' L2 penalty of leaves, which their code does not reach, is left out.
  """

  def __init__(
      self, d: int, num_experts: int, k: int = 2, *, gamma: float = 1.0, entropy_weight: float = 1e-3,
      rngs: nnx.Rngs,
  ):
    lists.check_k(k, num_experts)
    if not gamma > 0:
      raise UserError(f"router.gamma={gamma} is out of range; choose a number above 0")
    self.num_experts, self.k, self.gamma, self.entropy_weight = num_experts, k, gamma, entropy_weight
    self.causality = "self"  # drops: a later token's first choice evicts an earlier token's second
    drawn = lambda bound, *shape: nnx.Param(
        uniform(rngs.params(), shape, bound), axes=("embed", "router")[-len(shape):])
    splits = num_experts - 1  # 0: no array, as a checkpoint takes no empty one
    self.w_split = drawn(gamma / 100, d, k * splits) if splits else None
    self.b_split = drawn(gamma / 100, k * splits) if splits else None
    self.w_leaf, self.b_leaf = drawn(0.05, d, k * num_experts), drawn(0.05, k * num_experts)

  @property
  def loss_weights(self) -> dict[str, float]:
    return {"selection_entropy": self.entropy_weight}

  def __call__(
      self, x_GTD: Array, tokens: Tokens, capacity: int | None, key: Array | None = None) -> Routing:
    del capacity, key
    by_tree = lambda a: a.reshape(*x_GTD.shape[:2], self.k, -1)
    split = jnp.zeros((*x_GTD.shape[:2], self.k, 0))
    if self.w_split is not None:
      split = by_tree(scores.linear(x_GTD, self.w_split[...]) + self.b_split[...][None, None])
    leaf_GTKE = by_tree(scores.linear(x_GTD, self.w_leaf[...]) + self.b_leaf[...][None, None])
    return self.route(split, leaf_GTKE, tokens.mask)

  def route(self, split: Array, leaf_GTKE: Array, mask_GT: Array) -> Routing:
    """The routing of given scores of each tree's splits [G, T, K, E - 1] and leaves, a."""
    p_GTKE = paths(smooth_step(split, self.gamma))
    # The smallest float in place of -inf: a softmax gives 0 for it, too, and no NaN in the gradient.
    score_GTKE = jnp.where(p_GTKE > 0, leaf_GTKE + jnp.log(p_GTKE + 1e-8), jnp.finfo(jnp.float32).min)
    prob_GTE = jax.nn.softmax(score_GTKE, axis=(-2, -1)).sum(-2)
    expert_GTE, gate_GTE, valid_GTE = lists.every_expert(prob_GTE, mask_GT)
    return lists.token_choice(
        expert_GTE, gate_GTE, prob_GTE, mask_GT, valid_GTK=valid_GTE,
        expected_fraction=self.k / self.num_experts,
        losses={"selection_entropy": selection_entropy(p_GTKE, mask_GT)})


def paths(left: Array) -> Array:
  """Probabilities of n leaves from left to right, of those of going left at n - 1 splits in heap order.

  Last axis n - 1 -> n. All nodes of a level at once: splits come first in a level, leaves behind them.
  """
  level, done, splits = jnp.ones((*left.shape[:-1], 1)), 0, left.shape[-1]
  while done < splits:
    width = min(level.shape[-1], splits - done)
    node, z = level[..., :width], left[..., done:done + width]
    children = jnp.stack([node * z, node * (1 - z)], axis=-1).reshape(*left.shape[:-1], 2 * width)
    level, done = jnp.concatenate([children, level[..., width:]], axis=-1), done + width
  return level
