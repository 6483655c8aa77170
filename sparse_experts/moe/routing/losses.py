"""Auxiliary losses of routers, each over the `scope` that it names: a key of SCOPES, `group` by default."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sparse_experts.moe.routing.statistic import Loss, Pair, Statistic

# (sums, tokens) -> loss. `sums` are over some tokens, `tokens` their number; leading axes are kept.
Function = Callable[[Any, Array], Array]


def _per_group(function: Function, sums_G: Any, tokens_G: Array) -> Pair:
  """The mean over groups with real tokens of each group's loss."""
  real_G = tokens_G > 0
  return jnp.where(real_G, function(sums_G, tokens_G), 0.0).sum(), real_G.sum(dtype=jnp.float32)


def _over_batch(function: Function, sums_G: Any, tokens_G: Array) -> Statistic:
  """The loss of all tokens of the batch together, whatever its groups, micro-batches and devices."""
  return Statistic(jax.tree.map(lambda a: a.sum(0), sums_G), tokens_G.sum(), function)


# Over what a loss is computed that is nonlinear in sums over tokens.
SCOPES: dict[str, Callable[[Function, Any, Array], Loss]] = {"group": _per_group, "batch": _over_batch}


def scoped(scope: str, function: Function, sums_G: Any, mask_GT: Array) -> Loss:
  """`function` of sums over tokens, which are given per group (arrays of [G, ...]), over `scope`."""
  return SCOPES[scope](function, sums_G, mask_GT.sum(-1, dtype=jnp.float32))


def sum_over_tokens(value_GTE: Array, mask_GT: Array) -> Array:
  """Sum over a group's real tokens, _GE."""
  return jnp.where(mask_GT[..., None], value_GTE, 0.0).sum(1)


def mean(sum_E: Array, tokens: Array) -> Array:
  """Per token; 0 without any."""
  return sum_E / jnp.maximum(tokens, 1.0)[..., None]


def over_tokens(value_GT: Array, mask_GT: Array) -> Pair:
  """(Sum, count) over real tokens."""
  # Where, not a product: padding may hold NaN.
  return jnp.where(mask_GT, value_GT, 0.0).sum(), mask_GT.sum(dtype=jnp.float32)


def average(value_GT: Array, mask_GT: Array, scope: str = "group") -> Loss:
  """Mean over tokens."""
  return scoped(scope, _average, jnp.where(mask_GT, value_GT, 0.0).sum(1), mask_GT)


def load_balance(prob_GTE: Array, count_GE: Array, mask_GT: Array, scope: str = "group",
                 assigned_G: Array | None = None) -> Loss:
  """E · Σ_e (share of assignments to e) · (mean probability of e); 1 when even.

  The load-balancing loss. `count_GE` holds assignments before capacity, without gradient, and `assigned_G`
  what their shares are of: all of them by default. Padding must be absent from both, otherwise short batches
  look balanced.

  Fedus et al. 2021 (Switch Transformer), eq. 4-6; Lepikhin et al. 2020 (GShard) up to the factor E².
  """
  count_GE = jax.lax.stop_gradient(count_GE).astype(jnp.float32)
  assigned_G = count_GE.sum(-1) if assigned_G is None else assigned_G.astype(jnp.float32)
  return scoped(scope, _balance, (sum_over_tokens(prob_GTE, mask_GT), count_GE, assigned_G), mask_GT)


def sequence_balance(prob_GTE: Array, chosen_GTE: Array, mask_GT: Array, sequence_GT: Array) -> Pair:
  """`load_balance` per sequence instead of per group: 1 when even.

  Returns (sum over sequences, number of sequences); a sequence that spans groups counts once in each.
  `chosen_GTE` is 1 for a token's experts, equally many for all real tokens, and has no gradient. The paper's
  formula takes the choice by plain scores; here it is the real choice, with bias and node limit.

  DeepSeek-AI 2024 (DeepSeek-V3), eq. 17-20.
  """
  same_GTT = (sequence_GT[:, :, None] == sequence_GT[:, None, :]) & mask_GT[:, :, None] & mask_GT[:, None, :]
  same_GTT = same_GTT.astype(jnp.float32)
  length_GT1 = jnp.maximum(same_GTT.sum(-1, keepdims=True), 1.0)
  chosen_GTE = jax.lax.stop_gradient(chosen_GTE)
  k_GT1 = chosen_GTE.sum(-1, keepdims=True)
  share_GTE = jnp.einsum("gts,gse->gte", same_GTT, chosen_GTE / k_GT1) / length_GT1
  # Each token adds its part of its sequence's mean probability, so the sum over tokens is one over sequences.
  part_GT = prob_GTE.shape[-1] * (share_GTE * prob_GTE / length_GT1).sum(-1)
  return jnp.where(mask_GT, part_GT, 0.0).sum(), jnp.where(mask_GT, 1 / length_GT1[..., 0], 0.0).sum()


def z(logit_GTE: Array, mask_GT: Array, scope: str = "group") -> Loss:
  """Mean over tokens of (log Σ_e exp logit)²: keeps router logits small.

  Zoph et al. 2022 (ST-MoE), eq. 5.
  """
  return average(jax.nn.logsumexp(logit_GTE, axis=-1) ** 2, mask_GT, scope)


def importance(gate_GTE: Array, mask_GT: Array, scope: str = "group") -> Loss:
  """Squared coefficient of variation, over experts, of Σ_t gate; 0 when even.

  `gate_GTE` is what a paper sums: the gates of the k kept experts, zero elsewhere (Shazeer et al. 2017,
  eq. 6-7), or all probabilities before noise (Riquelme et al. 2021, V-MoE, section A).
  """
  return scoped(scope, variation, sum_over_tokens(gate_GTE, mask_GT), mask_GT)


def load(chance_GTE: Array, mask_GT: Array, scope: str = "group") -> Loss:
  """Squared coefficient of variation, over experts, of Σ_t chance; 0 when even.

  `chance_GTE`: see `chance`; without noise it is 1 for the chosen experts and has no gradient.

  Shazeer et al. 2017, eq. 10-11; Riquelme et al. 2021 (V-MoE), section A.
  """
  return scoped(scope, variation, sum_over_tokens(chance_GTE, mask_GT), mask_GT)


def reward(log_prob_BL: Array, value_BL: Array, reward_BL: Array, mask_BL: Array) -> dict[str, Pair]:
  """REINFORCE with a learned baseline: the losses `policy` and `baseline` as (sum over tokens, their number).

  policy: -(reward - value) · log_prob, the difference without gradient. baseline: Huber loss, with bound 1,
  of value against reward. Williams 1992; Clark et al. 2022 (Unified Scaling Laws), RL-R.
  """
  error_BL = value_BL - jax.lax.stop_gradient(reward_BL)
  absolute_BL = jnp.abs(error_BL)
  huber_BL = jnp.where(absolute_BL < 1, 0.5 * error_BL**2, absolute_BL - 0.5)
  policy_BL = jax.lax.stop_gradient(error_BL) * log_prob_BL
  return {"policy": over_tokens(policy_BL, mask_BL), "baseline": over_tokens(huber_BL, mask_BL)}


def chance(logit_GTE: Array, threshold_GTE: Array, std: Array | float) -> Array:
  """P(logit + noise > threshold), if noise ~ N(0, std²) is drawn again for this expert only: a smooth load.

  The threshold is the k-th largest noisy logit; whether it excludes the expert's own is the router's
  convention. Shazeer et al. 2017, eq. 8-9.
  """
  return jax.scipy.stats.norm.cdf((logit_GTE - threshold_GTE) / std)


def _balance(sums: tuple[Array, Array, Array], tokens: Array) -> Array:
  """`load_balance` of sums of probabilities and numbers of assignments, both [..., E], and all [...]."""
  prob_E, count_E, assigned = sums
  share_E = count_E / jnp.maximum(assigned, 1.0)[..., None]
  return count_E.shape[-1] * (share_E * mean(prob_E, tokens)).sum(-1)


def _average(total: Array, tokens: Array) -> Array:
  return total / jnp.maximum(tokens, 1.0)


def variation(sum_E: Array, tokens: Array) -> Array:
  """Population variance over squared mean of [..., E], which a common factor does not change; 0 for zeros."""
  mean_E = mean(sum_E, tokens)
  center = mean_E.mean(-1)
  return mean_E.var(-1) / jnp.where(center == 0, 1.0, center) ** 2
