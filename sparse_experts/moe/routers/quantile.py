"""Quantile balancing: after each step every expert's bias becomes a quantile of the biases it would need."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sparse_experts.moe.arguments import check, check_k, check_known
from sparse_experts.moe.routing import Pair, Router, Routing, Tokens, lists, losses, scores

ESTIMATORS = ("histogram", "exact", "marin")
SCORES = ("sigmoid", "logit")


class QuantileRouter(Router):
  """The k largest of score + bias, which is set and not stepped, as in Kimi K3 (Kimi-Team 2026).

  α of a token is the (k+1)-th largest of score + bias, and r_e = α - score_e the bias with which expert e
  would stand exactly at the token's cut. After each optimizer step expert e's bias is the (k/E)-quantile of
  its r over the step's tokens, centred over experts: with it, e would have had its even share. It is one
  round of coordinate descent on the dual of the balanced assignment. There is no step size and no balance
  loss. Gates are sigmoids of the logits without bias, over their sum, times `scale`; the bias has no
  gradient, starts at 0, and stays in evaluation. Padding is not counted. Nothing is dropped in the codes;
  group-limited selection, which they refuse, is not here. Needs more than k experts.

  k: experts per token.
  score: what is ranked, and what r is of: `sigmoid` (K3, torchtitan), or the `logit` (marin, Megatron).
  estimator: of the quantile. `histogram`: counts in `bins` bins over [min bias - 1, max bias + 1], summed
    over the step, interpolated; the same on any mesh, for any groups and accumulation, and exact up to a bin
    (K3's appendix D, as in torchtitan). Sigmoids lie in that range, logits do not, so it is for `sigmoid`.
    With q the even share of a group's tokens, rounded down, `exact` is the (q+1)-th smallest r of each group
    (Megatron's, per micro-batch) and `marin` the q-th, at least the first (marin's, per device). Of these two
    the mean over groups is taken: it depends on the group size, and is not the batch's quantile.
  bins: 1000 in K3. An even number has an edge at a bias of 0, where in the first step one r per token is.
  ema: share of the old bias in the new one (Megatron's option); 0: replaced.
  scale: sum of a token's gates; 2.5 in marin. K3's is not known to us.
  z_weight: coefficient of the z-loss.
  """

  held_to = "biases of Megatron's and torchtitan's code, run; `marin`: two own scripts"

  def __init__(self, d: int, num_experts: int, k: int = 2, *, score: str = "sigmoid",
               estimator: str = "histogram", bins: int = 1000, ema: float = 0.0, scale: float = 1.0,
               z_weight: float = 0.0, rngs: nnx.Rngs):
    check_k(k, num_experts)
    check(k < num_experts, "router.k", k, f"leaves no expert of num_experts={num_experts} to compare with; "
          "lower k or add experts")
    check_known("router.score", score, SCORES)
    check_known("router.estimator", estimator, ESTIMATORS)
    check(estimator != "histogram" or score == "sigmoid", "router.score", f"'{score}'",
          "has no range for router.estimator='histogram'; choose score=sigmoid, or estimator=exact or marin")
    check(bins >= 1, "router.bins", bins, "leaves nothing to count in; choose 1 or more")
    check(0 <= ema < 1, "router.ema", ema, "is out of range; choose from 0 to below 1")
    self.num_experts, self.k, self.score, self.estimator = num_experts, k, score, estimator
    self.bins, self.ema, self.scale = bins, ema, scale
    self.loss_weights = {"z": z_weight}
    if k == 1:
      self.no_gradient = (f"gates of sum router.scale={scale:g} over router.k=1 choice are constant; choose "
                          "router.k=2 or more")
    self.causality, self.drop_causality = "self", "past" if k == 1 else "batch"
    self.w = nnx.Param(0.02 * jax.random.normal(rngs.params(), (d, num_experts)), axes=("embed", "router"))
    self.bias_E = nnx.Variable(jnp.zeros(num_experts))

  def __call__(self, x_GTD: Array, tokens: Tokens, capacity: int | None, key: Array | None = None) -> Routing:
    return self.route(scores.linear(x_GTD, self.w[...]), tokens.mask)

  def route(self, logit_GTE: Array, mask_GT: Array) -> Routing:
    """The routing of given logits."""
    gate_GTE = jax.nn.sigmoid(logit_GTE)
    score_GTE = jax.lax.stop_gradient(gate_GTE if self.score == "sigmoid" else logit_GTE)
    expert_GTK, value_GTK = scores.top_k(score_GTE + self.bias_E[...][None, None], self.k + 1)
    expert_GTK, cut_GT1 = expert_GTK[..., :-1], value_GTK[..., -1:]
    gate_GTK = scores.pick(gate_GTE, expert_GTK)
    gate_GTK *= self.scale / (gate_GTK.sum(-1, keepdims=True) + 1e-20)
    prob_GTE = gate_GTE / (gate_GTE.sum(-1, keepdims=True) + 1e-20)
    routing = lists.token_choice(expert_GTK, gate_GTK, prob_GTE, mask_GT,
                                 losses={"z": losses.z(logit_GTE, mask_GT)})
    return routing.replace(stats=self._observe(cut_GT1 - score_GTE, mask_GT))

  def _observe(self, required_GTE: Array, mask_GT: Array) -> dict[str, Array]:
    """What `next_state` needs of the biases that tokens require: sums over tokens, or over groups."""
    if self.estimator == "histogram":
      low, width = _bins(self.bias_E[...], self.bins)
      bin_GTE = jnp.clip(jnp.floor((required_GTE - low) / width), 0, self.bins - 1).astype(jnp.int32)
      bin_GTE = jnp.where(mask_GT[..., None], bin_GTE, self.bins)  # out of range: dropped
      expert_GTE = jax.lax.broadcasted_iota(jnp.int32, bin_GTE.shape, 2)
      count_EB = jnp.zeros((self.num_experts, self.bins), jnp.int32)
      return {"required_bias": count_EB.at[expert_GTE, bin_GTE].add(1, mode="drop")}
    tokens_G = mask_GT.sum(-1, dtype=jnp.int32)
    sorted_GTE = jnp.sort(jnp.where(mask_GT[..., None], required_GTE, jnp.inf), axis=1)
    rank_G = tokens_G * self.k // self.num_experts + int(self.estimator == "exact")
    at_G11 = (jnp.maximum(rank_G, 1) - 1)[:, None, None]
    quantile_GE = jnp.take_along_axis(sorted_GTE, at_G11, axis=1)[:, 0]
    real_G = tokens_G > 0
    return {"quantile": jnp.where(real_G[:, None], quantile_GE, 0.0).sum(0),
            "groups": real_G.sum(dtype=jnp.float32)}

  def next_state(self, state: Any, params: Any, metrics: dict[str, Pair], stats: dict[str, Array]) -> Any:
    """The bias that this step's tokens asked for; of a step without tokens, the old one."""
    bias_E = state["bias_E"]
    if self.estimator == "histogram":
      seen = stats["required_bias"].sum() > 0
      new_E = quantile(stats["required_bias"], self.k, *_bins(bias_E, self.bins))
    else:
      seen = stats["groups"] > 0
      new_E = stats["quantile"] / jnp.maximum(stats["groups"], 1.0)
    new_E = self.ema * bias_E + (1 - self.ema) * new_E
    return {**state, "bias_E": jnp.where(seen, new_E - new_E.mean(), bias_E)}


def _bins(bias_E: Array, bins: int) -> tuple[Array, Array]:
  """(lower end, width) of bins that hold every bias which a token can require, scores being in (0, 1)."""
  low = bias_E.min() - 1
  return low, (bias_E.max() + 1 - low) / bins


def quantile(count_EB: Array, k: int, low: Array, width: Array) -> Array:
  """Where, within bins from `low` on, k/E of the counts lie below: linear within a bin, _E."""
  E, n_E = count_EB.shape[0], count_EB.sum(1)
  # n k / E = whole + part / E in whole numbers: rounding would move a rank.
  whole_E, part_E = n_E // E * k + n_E % E * k // E, n_E % E * k % E
  to_EB = jnp.cumsum(count_EB, axis=1)
  bin_E = (to_EB < (whole_E + (part_E > 0).astype(jnp.int32))[:, None]).sum(1, dtype=jnp.int32)
  pick = lambda a_EB: jnp.take_along_axis(a_EB, bin_E[:, None], axis=1)[:, 0]
  inside_E = pick(count_EB)
  above_E = (whole_E - (pick(to_EB) - inside_E)).astype(jnp.float32) + part_E.astype(jnp.float32) / E
  within_E = above_E / jnp.maximum(inside_E, 1).astype(jnp.float32)
  return low + width * (bin_E.astype(jnp.float32) + within_E)
