"""Spreading the tokens of each group over the experts: an auction, and an entropic transport plan.

Both loop until every group they are given is done, and know nothing of the others.
"""

import jax
import jax.numpy as jnp
from jax import Array

STEPS = 50  # of the auction: bids rise by at least (largest - smallest score) / STEPS
MARGIN = 1e-3  # of Sinkhorn's row sums, relative


def auction(score_GTE: Array, mask_GT: Array, steps: int = STEPS) -> Array:
  """expert_GT with the largest sum of scores among those that give no expert more than ceil(n / E) tokens.

  n: real tokens of the group; if E divides n every expert gets n / E. The sum is within n * eps of the
  largest, eps = (largest - smallest score of the group) / steps and at least 1e-4; fairseq has 50 steps.
  Scores that are not finite count as the smallest finite one. Padding gets expert 0.

  Tokens bid for places, all that have none at once: what the best expert is worth to them above the second
  best, and eps. An expert keeps the highest bids; its price is the lowest of them, 0 while it has room.
  Bertsekas and Castanon 1989 (auctions with similar objects); fairseq lets experts bid for tokens, which
  may end unbalanced. Every bid raises a price by eps, so the loop ends.
  """
  E = score_GTE.shape[-1]
  finite_GTE = jnp.isfinite(score_GTE) & mask_GT[..., None]
  low_G11 = jnp.where(finite_GTE, score_GTE, jnp.inf).min((1, 2), keepdims=True)
  high_G11 = jnp.where(finite_GTE, score_GTE, -jnp.inf).max((1, 2), keepdims=True)
  value_GTE = jnp.where(finite_GTE, score_GTE, low_G11) - low_G11
  value_GTE = jnp.where(mask_GT[..., None] & jnp.isfinite(low_G11), value_GTE, 0.0)
  eps_G1 = jnp.maximum(jnp.where(jnp.isfinite(low_G11), high_G11 - low_G11, 0.0)[..., 0] / steps, 1e-4)
  places_G1 = -(-mask_GT.sum(1, dtype=jnp.int32) // E)[:, None]

  def bid(state):
    owner_GT, bid_GT = state
    owned_GTE = jax.nn.one_hot(owner_GT, E, dtype=bool)
    lowest_GE = jnp.where(owned_GTE, bid_GT[..., None], jnp.inf).min(1)
    price_GE = jnp.where(owned_GTE.sum(1, dtype=jnp.int32) >= places_G1, lowest_GE, 0.0)
    profit_GTE = value_GTE - price_GE[:, None]
    best_GT = profit_GTE.argmax(-1).astype(jnp.int32)
    is_best_GTE = jax.nn.one_hot(best_GT, E, dtype=bool)
    first_GT = profit_GTE.max(-1)
    second_GT = jnp.where(is_best_GTE, -jnp.inf, profit_GTE).max(-1) if E > 1 else first_GT
    price_GT = jnp.where(is_best_GTE, price_GE[:, None], 0.0).sum(-1)
    bids_GT = (owner_GT < 0) & mask_GT
    bid_GT = jnp.where(bids_GT, price_GT + first_GT - second_GT + eps_G1, bid_GT)
    wants_GTE = owned_GTE | (is_best_GTE & bids_GT[..., None])
    # An expert keeps its highest bids, of equal ones the first.
    order_GET = jnp.argsort(-jnp.where(wants_GTE, bid_GT[..., None], -jnp.inf).swapaxes(1, 2), stable=True)
    rank_GTE = jnp.argsort(order_GET).swapaxes(1, 2)  # argsort of a permutation inverts it
    kept_GTE = wants_GTE & (rank_GTE < places_G1[..., None])
    return jnp.where(kept_GTE.any(-1), kept_GTE.argmax(-1).astype(jnp.int32), -1), bid_GT

  # Made of the inputs: inside `shard_map` a constant would be of another type than what the loop returns.
  start = jnp.where(mask_GT, jnp.int32(-1), jnp.int32(0)), 0.0 * value_GTE[..., 0]
  owner_GT, _ = jax.lax.while_loop(lambda state: ((state[0] < 0) & mask_GT).any(), bid, start)
  return jnp.maximum(owner_GT, 0)


def sinkhorn(logit_GTE: Array, mask_GT: Array, temperature: float = 1.0, max_rounds: int = 200) -> Array:
  """plan_GTE: the transport of mass 1 from n real tokens, 1/n each, to E experts, 1/E each.

  Maximises sum(plan * logit) + temperature * entropy(plan). Columns are exact, rows within 0.1% or as
  near as `max_rounds` bring them. In log space: f_t = logsumexp_e(L - g) + log n, g_e = logsumexp_t(L - f)
  + log E with L = logit / temperature (Cuturi 2013).
  """
  E = logit_GTE.shape[-1]
  n_G1 = jnp.maximum(mask_GT.sum(1, dtype=jnp.float32), 1.0)[:, None]
  scaled_GTE = logit_GTE / temperature

  def rows(g_GE):
    return jax.nn.logsumexp(scaled_GTE - g_GE[:, None], axis=-1) + jnp.log(n_G1)

  def columns(f_GT):
    left_GTE = jnp.where(mask_GT[..., None], scaled_GTE - f_GT[..., None], -jnp.inf)
    g_GE = jax.nn.logsumexp(left_GTE, axis=1) + jnp.log(jnp.float32(E))
    return jnp.where(mask_GT.any(1)[:, None], g_GE, 0.0)  # a group of padding has no tokens to sum over

  def update(state):
    g_GE, _, done = state
    f_GT = rows(g_GE)
    g_GE = columns(f_GT)
    off_GT = jnp.abs(jnp.exp(rows(g_GE) - f_GT) - 1.0)  # of the row sums, relative
    return g_GE, jnp.where(mask_GT, off_GT, 0.0).max(1), done + 1

  zero_GE = 0.0 * scaled_GTE[:, 0]
  start = zero_GE, jnp.where(mask_GT.any(1), jnp.inf, 0.0) + zero_GE[:, 0], jnp.zeros((), jnp.int32)
  g_GE, _, _ = jax.lax.while_loop(
      lambda state: (state[1] > MARGIN).any() & (state[2] < max_rounds), update, start)
  plan_GTE = jnp.exp(scaled_GTE - rows(g_GE)[..., None] - g_GE[:, None])
  plan_GTE /= jnp.maximum(jnp.where(mask_GT[..., None], plan_GTE, 0.0).sum(1, keepdims=True), 1e-30) * E
  return jnp.where(mask_GT[..., None], plan_GTE, 0.0)
