"""Scores of tokens for experts and the choice of the best k: products and passes over [G, T, E].

Those that are slow on XLA:CPU are written by hand, with their gradients.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from sparse_experts import partitioning
from sparse_experts.moe.routing import rounds


def linear(x_GTD: Array, w_DE: Array, bias_E: Array | None = None) -> Array:
  """Scores in float32, whatever the activations are (Switch's selective precision).

  A TPU multiplies bfloat16 numbers; what float32 ones need is six products of their parts. It is three where
  x comes in bfloat16.
  """
  score_GTE = _linear(x_GTD, w_DE)
  return score_GTE if bias_E is None else score_GTE + bias_E[None, None]


# HIGHEST: a TPU's default for float32 products is one bfloat16 pass. HIGH: three, for what is then rounded to
# bfloat16.
_HIGHEST, _HIGH = jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGH


@jax.custom_vjp
def _linear(x_GTD, w_DE):
  if _in_parts(x_GTD):
    product = functools.partial(jnp.einsum, "gtd,de->gte", preferred_element_type=jnp.float32)
    return _sum_parts(product(x_GTD, _parts(w_DE)))
  return jnp.einsum("gtd,de->gte", x_GTD.astype(jnp.float32), w_DE, precision=_HIGHEST)


def _linear_backward(operands, d_GTE):
  x_GTD, w_DE = operands
  (D, E), (G, T, _) = w_DE.shape, x_GTD.shape
  x_ND, d_NE, in_parts = x_GTD.reshape(G * T, D), d_GTE.reshape(G * T, E), _in_parts(x_GTD)
  dx_GTD = jnp.einsum("gte,de->gtd", d_GTE, w_DE, precision=_HIGH if in_parts else _HIGHEST)
  if in_parts:
    dw_DE = _sum_parts(jnp.matmul(x_ND.T, _parts(d_NE), preferred_element_type=jnp.float32))
    return dx_GTD.astype(x_GTD.dtype), dw_DE
  dw_ED = jnp.matmul(d_NE.T, x_ND.astype(jnp.float32), precision=_HIGHEST)
  # Without the barrier XLA computes [D, E], 2 to 4 times slower.
  return dx_GTD.astype(x_GTD.dtype), jax.lax.optimization_barrier(dw_ED).T


def _in_parts(x: Array) -> bool:
  return x.dtype == jnp.bfloat16 and partitioning.platform() == "tpu"


def _parts(a_NE: Array) -> Array:
  """a as the sum of three bfloat16 arrays, _N(3E): their 24 bits are all that a float32 number has."""
  rounded = lambda a: jax.lax.reduce_precision(a, 8, 7)  # XLA may leave out a conversion there and back
  high = rounded(a_NE)
  middle = rounded(a_NE - high)
  return jnp.concatenate([high, middle, a_NE - high - middle], axis=1).astype(jnp.bfloat16)


def _sum_parts(a: Array) -> Array:
  """The three products with `_parts`, summed, the small ones first."""
  high, middle, low = jnp.split(a, 3, axis=-1)
  return low + middle + high


_linear.defvjp(lambda *operands: (_linear(*operands), operands), _linear_backward)


@jax.custom_vjp
def softmax(logit_GTE: Array) -> Array:
  """Softmax over experts, in two passes, the first shared with `losses.z`; `jax.nn.softmax` makes four."""
  return jnp.exp(logit_GTE - jax.nn.logsumexp(logit_GTE, axis=-1, keepdims=True))


def _softmax_forward(logit_GTE):
  prob_GTE = softmax(logit_GTE)
  return prob_GTE, prob_GTE


def _softmax_backward(prob_GTE, d_GTE):
  return (prob_GTE * (d_GTE - (prob_GTE * d_GTE).sum(-1, keepdims=True)),)


softmax.defvjp(_softmax_forward, _softmax_backward)


def entropy(prob_GTE: Array) -> Array:
  """-Σ_e p log p in nats, _GT."""
  return -(prob_GTE * jnp.log(jnp.maximum(prob_GTE, 1e-30))).sum(-1)


def unit(a: Array, axis: int) -> Array:
  """Vectors along `axis` divided by their norm."""
  # The epsilon is inside the root: padding is zero, where the gradient of a norm is NaN.
  return a * jax.lax.rsqrt((a * a).sum(axis, keepdims=True) + 1e-12)


def top_k(score_GTE: Array, k: int) -> tuple[Array, Array]:
  """(expert_GTK, value_GTK), largest first, ties to the lower index.

  For `jax.lax.top_k` the partitioner would gather all groups' scores, and a sort takes up to a hundred times
  as long.
  """
  choose = rounds.written_out if k <= rounds.UNROLLED else rounds.in_a_loop
  expert_GTK = choose(jax.lax.stop_gradient(score_GTE), k)
  return expert_GTK, pick(score_GTE, expert_GTK)


@jax.custom_vjp
def pick(value_GTE: Array, expert_GTK: Array) -> Array:
  """Values of these experts, all different; its gradient is `scatter_to_experts`, not a gather's scatter."""
  return jnp.take_along_axis(value_GTE, expert_GTK, axis=-1)


def _pick_forward(value_GTE, expert_GTK):
  return pick(value_GTE, expert_GTK), (expert_GTK, value_GTE.shape[-1])


def _pick_backward(residuals, d_GTK):
  expert_GTK, E = residuals
  return scatter_to_experts(d_GTK, expert_GTK, E), None


pick.defvjp(_pick_forward, _pick_backward)


def scatter_to_experts(value_GTK: Array, expert_GTK: Array, num_experts: int) -> Array:
  """Values at their experts, zero elsewhere, _GTE."""
  if expert_GTK.shape[-1] > rounds.UNROLLED:
    return _scatter_many(value_GTK, expert_GTK, num_experts)
  hit = lambda k: jax.nn.one_hot(expert_GTK[..., k], num_experts, dtype=bool)
  return functools.reduce(jnp.add, (  # in one pass over E
      jnp.where(hit(k), value_GTK[..., k, None], 0.0) for k in range(expert_GTK.shape[-1])))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _scatter_many(value_GTK, expert_GTK, num_experts):
  """A pass over E for each choice, in a loop."""

  def add(sum_GTE, choice):
    value_GT, expert_GT = choice
    hit_GTE = jax.nn.one_hot(expert_GT, num_experts, dtype=bool)
    return sum_GTE + jnp.where(hit_GTE, value_GT[..., None], 0.0), None

  value_KGT, expert_KGT = jnp.moveaxis(value_GTK, -1, 0), jnp.moveaxis(expert_GTK, -1, 0)
  first_GTE, _ = add(0.0, (value_KGT[0], expert_KGT[0]))
  return jax.lax.scan(add, first_GTE, (value_KGT[1:], expert_KGT[1:]))[0]


_scatter_many.defvjp(
    lambda value_GTK, expert_GTK, E: (_scatter_many(value_GTK, expert_GTK, E), expert_GTK),
    lambda E, expert_GTK, d_GTE: (jnp.take_along_axis(d_GTE, expert_GTK, axis=-1), None))
