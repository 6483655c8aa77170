"""An entropic transport plan of the tokens of each group to the experts (Sinkhorn).

It loops until all groups that it is given are done; on a mesh these are a device's own.
"""

import jax
import jax.numpy as jnp
from jax import Array

MARGIN = 1e-3  # relative error of row sums at which it stops


def sinkhorn(logit_GTE: Array, mask_GT: Array, temperature: float = 1.0, max_rounds: int = 200) -> Array:
  """plan_GTE: the transport of mass 1 from n real tokens, 1/n each, to E experts, 1/E each.

  Maximises sum(plan * logit) + temperature * entropy(plan). Column sums are exact, row sums within 0.1% or as
  near as `max_rounds` allow. In log space: f_t = logsumexp_e(L - g) + log n, g_e = logsumexp_t(L - f)
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
    off_GT = jnp.abs(jnp.exp(rows(g_GE) - f_GT) - 1.0)  # relative error of row sums
    return g_GE, jnp.where(mask_GT, off_GT, 0.0).max(1), done + 1

  zero_GE = 0.0 * scaled_GTE[:, 0]
  start = zero_GE, jnp.where(mask_GT.any(1), jnp.inf, 0.0) + zero_GE[:, 0], jnp.zeros((), jnp.int32)
  g_GE, _, _ = jax.lax.while_loop(
      lambda state: (state[1] > MARGIN).any() & (state[2] < max_rounds), update, start)
  plan_GTE = jnp.exp(scaled_GTE - rows(g_GE)[..., None] - g_GE[:, None])
  plan_GTE /= jnp.maximum(jnp.where(mask_GT[..., None], plan_GTE, 0.0).sum(1, keepdims=True), 1e-30) * E
  return jnp.where(mask_GT[..., None], plan_GTE, 0.0)
