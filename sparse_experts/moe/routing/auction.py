"""BASE's balanced assignment of the tokens of each group to experts, found by an auction.

It loops until all groups that it is given are done; on a mesh these are a device's own.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

STEPS = 200  # the sum of scores is within (largest - smallest score) / STEPS per token of the largest
# First prices come from entropic plans at one temperature after the other: the range of the scores over each
# temperature, and the number of updates at it.
COLDNESS, UPDATES = (16, 64, 256), 16


class _Bids(NamedTuple):
  owner_GT: Array  # int32, the expert at which a token has a slot; -1: none
  bid_GT: Array  # int32, what it bid there, in units
  price_GE: Array  # int32
  best_GT: Array  # int32, the expert with the largest profit for a token at these prices
  raise_GT: Array  # int32, what it can bid there above the price
  open_G: Array  # bool, whether the auction of the group goes on


def auction(score_GTE: Array, mask_GT: Array, steps: int = STEPS) -> Array:
  """expert_GT with the largest sum of scores among those that give no expert more than ceil(n / E) tokens.

  n: real tokens of the group; if E divides n every expert gets n / E. The sum is within n * eps of the
  largest, eps = (largest - smallest score of the group) / steps and at least 1e-4; fairseq has 50 steps.
  Scores that are not finite count as the smallest finite one. Padding gets expert 0.

  All tokens without a slot bid at once, at their best expert: its profit above the second best, at most eps.
  An expert keeps the highest bids, of equal ones the first; its price is the lowest of them. Bertsekas and
  Castanon 1989 (auctions with similar objects); in fairseq experts bid for tokens, which may end unbalanced.
  Slots that must stay free are taken by fillers, for which every expert has the value 0.

  The profits of all tokens at their best experts, at the current prices, bound the sum of every assignment.
  The auction ends as soon as its own assignment, with the remaining tokens in the free slots, is within n *
  eps of that bound; every bid raises a price, so it ends at the latest when all have slots. It starts from
  the prices of an entropic plan: from 0, similar tokens would raise them step by step.
  """
  G, T, E = score_GTE.shape
  finite_GTE = jnp.isfinite(score_GTE) & mask_GT[..., None]
  low_G = jnp.where(finite_GTE, score_GTE, jnp.inf).min((1, 2))
  high_G = jnp.where(finite_GTE, score_GTE, -jnp.inf).max((1, 2))
  range_G = jnp.maximum(jnp.where(low_G < high_G, high_G - low_G, 0.0), 1e-4 * steps)
  value_GTE = jnp.where(finite_GTE, score_GTE - low_G[:, None, None], 0.0)
  n_G = mask_GT.sum(1, dtype=jnp.int32)
  slots_G = -(-n_G // E)

  # From here on T includes E fillers; only as many as needed take part.
  value_GTE = jnp.pad(value_GTE, ((0, 0), (0, E), (0, 0)))
  takes_GT = jnp.concatenate([mask_GT, jnp.arange(E)[None] < (slots_G * E - n_G)[:, None]], axis=1)
  eps_G = range_G / steps
  may_miss_G = eps_G * n_G.astype(jnp.float32)  # all tokens together
  # Prices are whole numbers of units, so that rounding, which depends on shapes, rarely changes a result. A
  # token with a slot loses at most one unit: all of them n * eps.
  unit_G = jnp.where(n_G > 0, may_miss_G, eps_G) / jnp.maximum(slots_G * E, 1).astype(jnp.float32)
  expert_11E, index_1T = jnp.arange(E, dtype=jnp.int32)[None, None], jnp.arange(T + E, dtype=jnp.uint32)[None]
  # One number of 32 bits to sort by: expert, then bid, highest first, then token.
  index_bits, expert_bits = (T + E - 1).bit_length(), E.bit_length()
  bid_bits = 32 - expert_bits - index_bits
  highest = 2**bid_bits - 1  # above the price

  def look(owner_GT, bid_GT, price_GE):
    profit_GTE = value_GTE - (unit_G[:, None] * price_GE.astype(jnp.float32))[:, None]
    first_GT = profit_GTE.max(-1)
    # XLA:CPU's argmax takes six times as long.
    best_GT = jnp.where(profit_GTE == first_GT[..., None], expert_11E, E - 1).min(-1)
    second_GT = jnp.where(best_GT[..., None] == expert_11E, -jnp.inf, profit_GTE).max(-1)
    units_GT = (first_GT - second_GT) / unit_G[:, None]
    raise_GT = jnp.clip(units_GT, 0, highest - 1).astype(jnp.int32) + 1
    owned_GTE = owner_GT[..., None] == expert_11E
    has_room_GE = owned_GTE.sum(1, dtype=jnp.int32) < slots_G[:, None]
    # A token without a slot may get the worst of the free ones.
    may_get_GTE = jnp.where(owner_GT[..., None] < 0, has_room_GE[:, None], owned_GTE)
    least_GT = jnp.where(may_get_GTE, profit_GTE, jnp.inf).min(-1)
    missed_G = jnp.where(takes_GT, first_GT - least_GT, 0.0).sum(1)
    open_G = (missed_G > may_miss_G) & ((owner_GT < 0) & takes_GT).any(1)
    return _Bids(owner_GT, bid_GT, price_GE, best_GT, raise_GT, open_G)

  def bid(now):
    # In a group that is done nobody bids.
    bids_GT = (now.owner_GT < 0) & takes_GT & now.open_G[:, None]
    wanted_GT = jnp.where(bids_GT, now.best_GT, now.owner_GT)
    wants_GTE = wanted_GT[..., None] == expert_11E
    price_GT = jnp.where(wants_GTE, now.price_GE[:, None], 0).sum(-1, dtype=jnp.int32)
    bid_GT = jnp.where(bids_GT, price_GT + now.raise_GT, now.bid_GT)
    below_GT = (highest - (bid_GT - price_GT)).astype(jnp.uint32)
    key_GT = (wanted_GT.astype(jnp.uint32) << index_bits + bid_bits) | (below_GT << index_bits) | index_1T
    key_GT = jnp.where(wanted_GT < 0, jnp.uint32(2**32 - 1), key_GT)
    sorted_GT = jax.lax.sort(key_GT, is_stable=False)
    count_GE = wants_GTE.sum(1, dtype=jnp.int32)
    kept_GE = jnp.minimum(count_GE, slots_G[:, None])
    last_GE = jnp.maximum(jnp.cumsum(count_GE, axis=1) - count_GE + kept_GE - 1, 0)
    last_GE = jnp.take_along_axis(sorted_GT, last_GE, axis=1)
    is_kept_GT = (wants_GTE & (key_GT[..., None] <= last_GE[:, None])).any(-1)
    lowest_GE = highest - ((last_GE >> index_bits) & highest).astype(jnp.int32)
    price_GE = now.price_GE + jnp.where(count_GE >= slots_G[:, None], lowest_GE, 0)
    return look(jnp.where(is_kept_GT, wanted_GT, -1), bid_GT, price_GE)

  first_GE = jnp.round(_prices(value_GTE, takes_GT, slots_G, range_G) / unit_G[:, None]).astype(jnp.int32)
  # Made from the inputs: inside `shard_map` a constant has another type than what the loop returns.
  zero_GT = 0 * takes_GT.astype(jnp.int32)
  end = jax.lax.while_loop(lambda now: now.open_G.any(), bid, look(zero_GT - 1, zero_GT, first_GE))

  # Remaining tokens get the free slots in order.
  left_GT = (end.owner_GT < 0) & takes_GT
  free_GE = slots_G[:, None] - (end.owner_GT[..., None] == expert_11E).sum(1, dtype=jnp.int32)
  rank_GT = jnp.cumsum(left_GT, axis=1, dtype=jnp.int32) - 1
  into_GT = (jnp.cumsum(free_GE, axis=1)[:, None] <= rank_GT[..., None]).sum(-1, dtype=jnp.int32)
  return jnp.where(left_GT, into_GT, jnp.maximum(end.owner_GT, 0))[:, :T]


def _prices(value_GTE: Array, takes_GT: Array, slots_G: Array, range_G: Array) -> Array:
  """price_GE at which the tokens' softmax over profits nearly fills every expert's slots.

  Sinkhorn's updates as products with a kernel, which costs one exponential per temperature.
  """
  slots_G1 = jnp.maximum(slots_G, 1).astype(jnp.float32)[:, None]
  price_GE = 0.0 * value_GTE[:, 0]
  for coldness in COLDNESS:
    temperature_G1 = range_G[:, None] / coldness
    profit_GTE = (value_GTE - price_GE[:, None]) / temperature_G1[..., None]
    kernel_GTE = jnp.exp(profit_GTE - profit_GTE.max(-1, keepdims=True))
    kernel_GTE = jnp.where(takes_GT[..., None], kernel_GTE, 0.0)

    def update(_, factor_GE, kernel_GTE=kernel_GTE):
      sum_GT = jnp.einsum("gte,ge->gt", kernel_GTE, factor_GE)
      sum_GE = jnp.einsum("gte,gt->ge", kernel_GTE, 1 / jnp.maximum(sum_GT, 1e-30))
      return jnp.clip(slots_G1 / jnp.maximum(sum_GE, 1e-30), 1e-30, 1e30)  # what float32 can hold

    factor_GE = jax.lax.fori_loop(0, UPDATES, update, 1.0 + 0.0 * price_GE)
    price_GE -= temperature_G1 * jnp.log(factor_GE)
  return price_GE
