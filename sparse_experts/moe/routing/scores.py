"""Scores of tokens for experts and the choice of the best k: products and passes over [G, T, E].

Those that are slow on XLA:CPU are written by hand, with their gradients.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from sparse_experts.moe.routing import rounds


def linear(x_GTD: Array, w_DE: Array, bias_E: Array | None = None) -> Array:
  """Scores in float32, whatever the activations are (Switch's selective precision)."""
  score_GTE = _linear(x_GTD.astype(jnp.float32), w_DE)
  return score_GTE if bias_E is None else score_GTE + bias_E[None, None]


# HIGHEST: a TPU's default for float32 products is one bfloat16 pass.
_HIGHEST = jax.lax.Precision.HIGHEST


@jax.custom_vjp
def _linear(x_GTD, w_DE):
  return jnp.einsum("gtd,de->gte", x_GTD, w_DE, precision=_HIGHEST)


def _linear_backward(operands, d_GTE):
  x_GTD, w_DE = operands
  (D, E), (G, T, _) = w_DE.shape, x_GTD.shape
  dx_GTD = jnp.einsum("gte,de->gtd", d_GTE, w_DE, precision=_HIGHEST)
  dw_ED = jnp.matmul(d_GTE.reshape(G * T, E).T, x_GTD.reshape(G * T, D), precision=_HIGHEST)
  return dx_GTD, jax.lax.optimization_barrier(dw_ED).T  # without it XLA computes [D, E], 2 to 4 times slower


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
