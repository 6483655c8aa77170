"""What token-choice routers share: scores, the choice of k, and the list in the order of claims.

The products and passes over [G, T, E] that XLA:CPU does slowly are written by hand, with their gradients.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array

from sparse_experts.errors import UserError
from sparse_experts.moe.routers.base import router_metrics
from sparse_experts.moe.routing import Routing, by_token

# Who claims slots first; see `TopKRouter`.
ORDERS = ("choice", "token", "batch_priority")


def linear(x_GTD: Array, w_DE: Array) -> Array:
  """Scores in float32, whatever the activations are (Switch's selective precision)."""
  return _linear(x_GTD.astype(jnp.float32), w_DE)


# HIGHEST: a TPU's default for float32 products is one bfloat16 pass.
_HIGHEST = jax.lax.Precision.HIGHEST


@jax.custom_vjp
def _linear(x_GTD, w_DE):
  return jnp.einsum("gtd,de->gte", x_GTD, w_DE, precision=_HIGHEST)


def _linear_forward(x_GTD, w_DE):
  return _linear(x_GTD, w_DE), (x_GTD, w_DE)


def _linear_backward(residuals, d_GTE):
  x_GTD, w_DE = residuals
  (D, E), (G, T, _) = w_DE.shape, x_GTD.shape
  dx_GTD = jnp.einsum("gte,de->gtd", d_GTE, w_DE, precision=_HIGHEST)
  dw_ED = jnp.matmul(d_GTE.reshape(G * T, E).T, x_GTD.reshape(G * T, D), precision=_HIGHEST)
  return dx_GTD, jax.lax.optimization_barrier(dw_ED).T  # else it is computed as [D, E], 2 to 4 times slower


_linear.defvjp(_linear_forward, _linear_backward)


@jax.custom_vjp
def softmax(logit_GTE: Array) -> Array:
  """Over experts. In two passes of which `losses.z` shares the first; `jax.nn.softmax` makes four."""
  return jnp.exp(logit_GTE - jax.nn.logsumexp(logit_GTE, axis=-1, keepdims=True))


def _softmax_forward(logit_GTE):
  prob_GTE = softmax(logit_GTE)
  return prob_GTE, prob_GTE


def _softmax_backward(prob_GTE, d_GTE):
  return (prob_GTE * (d_GTE - (prob_GTE * d_GTE).sum(-1, keepdims=True)),)


softmax.defvjp(_softmax_forward, _softmax_backward)


def unit(a: Array, axis: int) -> Array:
  # Inside the root: padding is zero, where the gradient of a norm is not a number.
  return a * jax.lax.rsqrt((a * a).sum(axis, keepdims=True) + 1e-12)


def in_order(order: str, expert_GTK: Array, gate_GTK: Array, valid_GTK: Array,
             score_GT: Array | None = None) -> tuple[Array, Array, Array, Array]:
  """The list (token, expert, gate, valid), each _GA, in the order of claims.

  `score_GT`, which falls along the list, is for `batch_priority` only.
  """
  G, T, K = expert_GTK.shape
  token_GTK = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[:, None], (G, T, K))
  arrays = (token_GTK, expert_GTK, gate_GTK, valid_GTK)
  if order == "token":
    return tuple(a.reshape(G, T * K) for a in arrays)
  if order == "batch_priority":
    by_score_GT = jnp.argsort(-score_GT, axis=-1, stable=True)
    arrays = tuple(jnp.take_along_axis(a, by_score_GT[..., None], axis=1) for a in arrays)
  return tuple(a.swapaxes(1, 2).reshape(G, K * T) for a in arrays)


def check_k(k: int, num_experts: int) -> None:
  if not 1 <= k <= num_experts:
    raise UserError(f"router.k={k} is not between 1 and num_experts={num_experts}; lower k or add experts")


def top_k(score_GTE: Array, k: int) -> tuple[Array, Array]:
  """(expert_GTK, value_GTK), largest first, ties to the lower index.

  k rounds of argmax, each over the largest of about sqrt(E) blocks of experts and then within one: XLA:CPU
  takes a maximum seven times faster than an argmax. For `jax.lax.top_k` the partitioner would gather all
  groups' scores.
  """
  E = score_GTE.shape[-1]
  size = 2 ** round(math.log2(E) / 2)
  fill = [(0, 0)] * (score_GTE.ndim - 1) + [(0, -E % size)]
  block_GTNM = jnp.pad(jax.lax.stop_gradient(score_GTE), fill, constant_values=-jnp.inf)
  block_GTNM = block_GTNM.reshape(*score_GTE.shape[:-1], -1, size)
  best_GTN = block_GTNM.max(-1)
  experts = []
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
  expert_GTK = jnp.stack(experts, -1)
  return expert_GTK, pick(score_GTE, expert_GTK)


@jax.custom_vjp
def pick(value_GTE: Array, expert_GTK: Array) -> Array:
  """Values of these experts, which differ; the gradient is `spread`, not the scatter of a gather."""
  return jnp.take_along_axis(value_GTE, expert_GTK, axis=-1)


def _pick_forward(value_GTE, expert_GTK):
  return pick(value_GTE, expert_GTK), (expert_GTK, value_GTE.shape[-1])


def _pick_backward(residuals, d_GTK):
  expert_GTK, E = residuals
  d_GTE = 0.0
  for k in range(expert_GTK.shape[-1]):  # in one pass over E
    d_GTE += jnp.where(jax.nn.one_hot(expert_GTK[..., k], E, dtype=bool), d_GTK[..., k, None], 0.0)
  return d_GTE, None


pick.defvjp(_pick_forward, _pick_backward)


def every_expert(gate_GTE: Array, mask_GT: Array) -> tuple[Array, Array, Array, Array]:
  """The list of all experts of each token, E rows per token: valid where the gate is above 0.

  A token's largest gate comes first, of equal ones the lower index, and all first choices claim before any
  second. For gates that learn to be exactly 0: what is not valid is not computed.
  """
  expert_GTK = jnp.argsort(-jax.lax.stop_gradient(gate_GTE), axis=-1, stable=True).astype(jnp.int32)
  gate_GTK = jnp.take_along_axis(gate_GTE, expert_GTK, axis=-1)
  return in_order("choice", expert_GTK, gate_GTK, (gate_GTK > 0) & mask_GT[..., None])


def spread(value_GTK: Array, expert_GTK: Array, num_experts: int) -> Array:
  """Values at their experts, zero elsewhere, _GTE."""
  hit_GTKE = jax.nn.one_hot(expert_GTK, num_experts, dtype=bool)
  return jnp.where(hit_GTKE, value_GTK[..., None], 0.0).sum(-2)


def renormalize(gate_GA: Array, token_GA: Array, k: int) -> Array:
  """Gates divided by their token's sum; each token appears k times. Zero where that sum is."""
  total_GT = by_token(token_GA, k)(gate_GA).sum(-1)
  total_GA = jnp.take_along_axis(total_GT, token_GA, axis=-1)
  return gate_GA / jnp.where(total_GA > 0, total_GA, 1.0)


def fixed(expert_GTK: Array, mask_GT: Array, num_experts: int) -> Routing:
  """The routing of routers without scores: gates are 1, tokens claim in order, nothing is lost or learnt."""
  valid_GTK = jnp.broadcast_to(mask_GT[..., None], expert_GTK.shape)
  gate_GTK = jnp.ones(expert_GTK.shape, jnp.float32)
  token_GA, expert_GA, gate_GA, valid_GA = in_order("token", expert_GTK, gate_GTK, valid_GTK)
  share_GTE = jax.nn.one_hot(expert_GTK, num_experts).mean(-2)
  return Routing(
      token=token_GA, expert=expert_GA, gate=gate_GA, valid=valid_GA, rows_per_token=expert_GTK.shape[-1],
      metrics=router_metrics(expert_GA, valid_GA, share_GTE, mask_GT, num_experts))


def scramble(number: Array, salt: Array) -> Array:
  """uint32 -> uint32, another bijection for each salt: the finalizer of MurmurHash3, before and after it."""

  def finalize(x):
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
      x = (x ^ (x >> jnp.uint32(shift))) * jnp.uint32(factor)
    return x ^ (x >> jnp.uint32(16))

  return finalize(finalize(number.astype(jnp.uint32)) ^ salt)
