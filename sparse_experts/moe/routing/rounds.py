"""The k best experts in k rounds of argmax, written out for few and in a loop for many.

Each round looks over the largest scores of about sqrt(E) blocks of experts and then within one: XLA:CPU takes
a maximum seven times faster than an argmax.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array

UNROLLED = 8  # most rounds that are written out: 64 would take 20 s to compile


def _blocks(score_GTE: Array, size: int) -> Array:
  """The experts in blocks of `size`, _GTNM; the last one is filled up."""
  fill = [(0, 0)] * (score_GTE.ndim - 1) + [(0, -score_GTE.shape[-1] % size)]
  return jnp.pad(score_GTE, fill, constant_values=-jnp.inf).reshape(*score_GTE.shape[:-1], -1, size)


def written_out(score_GTE: Array, k: int) -> Array:
  """The best k experts, _GTK. Each round looks at all that were chosen before, so they are few."""
  size = 2 ** round(math.log2(score_GTE.shape[-1]) / 2)
  block_GTNM = _blocks(score_GTE, size)
  best_GTN = block_GTNM.max(-1)
  experts: list[Array] = []
  for _ in range(k):
    n_GT1 = best_GTN.argmax(-1, keepdims=True).astype(jnp.int32)
    here_GTM = jnp.take_along_axis(block_GTNM, n_GT1[..., None], axis=-2)[..., 0, :]
    index_GTM = n_GT1 * size + jax.lax.broadcasted_iota(jnp.int32, here_GTM.shape, here_GTM.ndim - 1)
    for expert_GT in experts:
      here_GTM = jnp.where(index_GTM == expert_GT[..., None], -jnp.inf, here_GTM)
    experts.append(n_GT1[..., 0] * size + here_GTM.argmax(-1).astype(jnp.int32))
    rest_GTM = jnp.where(index_GTM == experts[-1][..., None], -jnp.inf, here_GTM)
    taken_from_GTN = jax.nn.one_hot(n_GT1[..., 0], best_GTN.shape[-1], dtype=bool)
    best_GTN = jnp.where(taken_from_GTN, rest_GTM.max(-1, keepdims=True), best_GTN)
  return jnp.stack(experts, -1)


def in_a_loop(score_GTE: Array, k: int) -> Array:
  """The same in a loop, whose program does not grow with k; bits of a block's number say who is taken."""
  size = min(2 ** round(math.log2(score_GTE.shape[-1]) / 2), 32)
  block_GTNM = _blocks(score_GTE, size)

  def choose(carry, _):
    best_GTN, taken_GTN = carry
    n_GT1 = best_GTN.argmax(-1, keepdims=True).astype(jnp.int32)
    here_GTM = jnp.take_along_axis(block_GTNM, n_GT1[..., None], axis=-2)[..., 0, :]
    bit_GTM = jnp.uint32(1) << jax.lax.broadcasted_iota(jnp.uint32, here_GTM.shape, here_GTM.ndim - 1)
    taken_GTM = jnp.take_along_axis(taken_GTN, n_GT1, axis=-1) & bit_GTM
    here_GTM = jnp.where(taken_GTM != 0, -jnp.inf, here_GTM)
    m_GT1 = here_GTM.argmax(-1, keepdims=True).astype(jnp.int32)
    chosen_GTM = jax.nn.one_hot(m_GT1[..., 0], size, dtype=bool)
    rest_GT1 = jnp.where(chosen_GTM, -jnp.inf, here_GTM).max(-1, keepdims=True)
    taken_from_GTN = jax.nn.one_hot(n_GT1[..., 0], best_GTN.shape[-1], dtype=bool)
    taken_now_GT1 = jnp.uint32(1) << m_GT1.astype(jnp.uint32)
    carry = (jnp.where(taken_from_GTN, rest_GT1, best_GTN),
             jnp.where(taken_from_GTN, taken_GTN | taken_now_GT1, taken_GTN))
    return carry, (n_GT1 * size + m_GT1)[..., 0]

  best_GTN = block_GTNM.max(-1)
  nobody_GTN = (best_GTN > jnp.inf).astype(jnp.uint32)  # of best_GTN's kind: `zeros` vary over no mesh axis
  _, expert_KGT = jax.lax.scan(choose, (best_GTN, nobody_GTN), length=k)
  return jnp.moveaxis(expert_KGT, 0, -1)
