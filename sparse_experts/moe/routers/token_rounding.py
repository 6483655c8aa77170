"""Token rounding: while training, an expert's number of tokens is a multiple of a kernel's tile."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sparse_experts.errors import UserError
from sparse_experts.moe.arguments import check, check_known
from sparse_experts.moe.routers.top_k import TopKRouter
from sparse_experts.moe.routing import Convention, Routing, lists, scores

ROUND = ("nearest", "up", "down")


class TokenRoundingRouter(TopKRouter):
  """Top-k whose experts have a multiple of `tile` tokens while training (SonicMoE, Guo, Mishra et al. 2025).

  Each token chooses k experts, with gates p / their sum. Then an expert with n tokens is given the target n,
  rounded to a multiple of M = `tile`. It orders its own tokens by gate, largest first, after them all others
  by p, and keeps as many as the target says: those cut lose an assignment without any change of their other
  gates, and those filled in gain one with gate p, not divided. So a token may end with no expert or with more
  than k. Equal ones go by position. Evaluation, without a key, is plain top-k.

  Counts are of each routing group (the authors' of each kernel launch, that is of a device), so results do
  not depend on the mesh. An expert is never filled beyond the multiple of M that fits the group's real
  tokens.
  Who is kept depends on the whole group: a causal decoder refuses this router. Groups must hold a tile; with
  many tiles per group rounding changes little. The paper has no loss of its own; here it is top-k's, over the
  choices before rounding.

  k, scope, load_balance_weight, z_weight: as for `TopKRouter`; `assignments` are counted.
  tile: M, 128 in the authors' kernels.
  round: `nearest` (a half goes to the even multiple), the paper's, `up` or `down`.
  """

  held_to = "lists of SonicMoE's benchmark code, run"

  @classmethod
  def convention(cls, k: int) -> Convention:
    return Convention()

  def __init__(self, d: int, num_experts: int, k: int = 2, *, tile: int = 128, round: str = "nearest",
               scope: str = "group", load_balance_weight: float = 1e-2, z_weight: float = 0.0,
               rngs: nnx.Rngs):
    check(tile >= 1, "router.tile", tile, "holds no token; choose 1 or more")
    check_known("router.round", round, ROUND)
    super().__init__(d, num_experts, k, gate="renormalized", balance_count="assignments", scope=scope,
                     load_balance_weight=load_balance_weight, z_weight=z_weight, rngs=rngs)
    self.tile, self.round, self.causality = tile, round, "batch"
    if k == 1:
      self.no_gradient = "the gate of router.k=1 own choice is 1; choose router.k=2 or more"

  def route(self, logit_GTE: Array, mask_GT: Array, *, capacity: int | None = None,
            key: Array | None = None) -> Routing:
    """The routing of given logits; rounded if there is a key."""
    plain = super().route(logit_GTE, mask_GT, capacity=capacity)
    if key is None:
      return plain
    T, E = logit_GTE.shape[1:]
    if self.tile > T:
      raise UserError(f"router.tile={self.tile} is more than the {T} tokens of a group; lower it, or raise "
                      "model.group_size")
    prob_GTE = scores.softmax(logit_GTE)
    expert_GTK, best_GTK = scores.top_k(prob_GTE, self.k)
    share_GTK = best_GTK / best_GTK.sum(-1, keepdims=True)
    own_GTE = scores.scatter_to_experts(jnp.ones_like(share_GTK), expert_GTK, E) > 0
    share_GTE = scores.scatter_to_experts(share_GTK, expert_GTK, E)
    order_GTE = jax.lax.stop_gradient(jnp.where(own_GTE, share_GTE, prob_GTE - 1))
    real_GT1 = mask_GT[..., None]
    order_GTE = jnp.where(real_GT1, order_GTE, -2.0)  # after all others
    count_GE = (own_GTE & real_GT1).sum(1, dtype=jnp.int32)
    target_G1E = self._rounded(count_GE, mask_GT.sum(1, dtype=jnp.int32))[:, None]
    rank_GTE = jnp.argsort(jnp.argsort(-order_GTE, axis=1, stable=True), axis=1, stable=True)
    kept_GTE = (rank_GTE < target_G1E) & real_GT1

    expert_GTE = jnp.argsort(-order_GTE, axis=-1, stable=True).astype(jnp.int32)
    sort = lambda a_GTE: jnp.take_along_axis(a_GTE, expert_GTE, axis=-1)
    return lists.token_choice(
        expert_GTE, sort(jnp.where(own_GTE, share_GTE, prob_GTE)), prob_GTE, mask_GT,
        valid_GTK=sort(kept_GTE), losses=plain.losses, expected_fraction=self.k / E)

  def _rounded(self, count_GE: Array, tokens_G: Array) -> Array:
    """Multiples of the tile, at most the largest one that the group's tokens fill."""
    down_GE, rest_GE = count_GE // self.tile, count_GE % self.tile
    if self.round == "nearest":
      more_GE = (2 * rest_GE > self.tile) | ((2 * rest_GE == self.tile) & (down_GE % 2 == 1))
    else:
      more_GE = (rest_GE > 0) & (self.round == "up")
    most_G1 = (tokens_G // self.tile)[:, None]
    return self.tile * jnp.minimum(down_GE + more_GE.astype(jnp.int32), most_G1)
