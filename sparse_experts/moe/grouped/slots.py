"""Grouped products for CPUs and GPUs: a batched product over slots, a loop of small blocks for what has none.

There `jax.lax.ragged_dot` computes every expert for every row, on a GPU from E copies of them. A batched
product runs at full speed and writes each expert's weight gradient once; a loop over blocks alone reads every
expert's weights, and adds to their gradients, once per block: 1.4 times the floor.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from sparse_experts import partitioning
from sparse_experts.moe.grouped import rows
from sparse_experts.moe.grouped.layout import Layout


class OfExpert(NamedTuple):
  """How a layer reaches the weights of each row's expert."""

  product: Callable[[Array, Array], Array]  # (a, w_EDF): rows times their matrix, in their dtype
  vector: Callable[[Array, Any], Array]  # (v_EF, dtype): their vector, of a shape that broadcasts to rows


@jax.custom_vjp
def _batched_product(a_ECD: Array, w_EDF: Array) -> Array:
  return jnp.einsum("ecd,edf->ecf", a_ECD, w_EDF)


def _batched_product_backward(operands, dy_ECF):
  # JAX's own gives w's gradient transposed. XLA:CPU undoes that while it adds a block's to the others, on one
  # core and with strides: a quarter of a block's time.
  a_ECD, w_EDF = operands
  return jnp.einsum("ecf,edf->ecd", dy_ECF, w_EDF), jnp.einsum("ecd,ecf->edf", a_ECD, dy_ECF)


_batched_product.defvjp(lambda *operands: (_batched_product(*operands), operands), _batched_product_backward)

# For E experts with C rows each.
batched = OfExpert(
    product=lambda a_ECD, w_EDF: _batched_product(a_ECD, w_EDF.astype(a_ECD.dtype)),
    vector=lambda v_EF, dtype: v_EF[:, None].astype(dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def slots(layer, x_PD, layout, weights, per_row, shared):
  return _slots_forward(layer, x_PD, layout, weights, per_row, shared)[0]


def _slots_forward(layer, x_PD, layout, weights, per_row, shared):
  E, S, P = layout.size_E.shape[0], layout.slots, x_PD.shape[0]
  pull = None
  if S:
    mine = jax.tree.map(lambda a: _by_expert(a, E, S), per_row)
    y_ESF, pull = jax.vjp(lambda x, w: layer(batched, x, w, mine, shared), _by_expert(x_PD, E, S), weights)
    y_PF = _as_places(y_ESF, P)
  else:
    y_BF = jax.eval_shape(lambda: _on_block(layer, *_block(layout, 0), x_PD, weights, per_row, shared)[0])
    y_PF = jnp.zeros((P, y_BF.shape[1]), y_BF.dtype)
    y_PF = partitioning.varying_like(y_PF, *jax.tree.leaves((x_PD, weights, layout.size_E)))

  def turn(b, y_PF):
    expert, place_B = _block(layout, b)
    y_BF, _ = _on_block(layer, expert, place_B, x_PD, weights, per_row, shared)
    return y_PF.at[place_B].set(y_BF, mode="drop")

  y_PF = jax.lax.fori_loop(0, num_blocks(layout), turn, y_PF)
  return y_PF, (x_PD, layout, weights, per_row, shared, pull)


def _slots_backward(layer, residuals, dy_PF):
  x_PD, layout, weights, per_row, shared, pull = residuals
  E, S, P = layout.size_E.shape[0], layout.slots, x_PD.shape[0]
  if S:
    own_ES1 = (jnp.arange(S)[None] < layout.size_E[:, None])[..., None]  # guests had another expert's weights
    dx_ESD, dw = pull(jnp.where(own_ES1, _by_expert(dy_PF, E, S), 0))
    dx_PD = _as_places(dx_ESD, P)
  else:
    like = jax.tree.leaves((x_PD, weights, dy_PF, layout.size_E))
    zeros = lambda a: partitioning.varying_like(jnp.zeros_like(a), *like)
    dx_PD, dw = zeros(x_PD), jax.tree.map(zeros, weights)

  def turn(b, carry):
    dx_PD, dw = carry
    expert, place_B = _block(layout, b)
    _, pull = _on_block(layer, expert, place_B, x_PD, weights, per_row, shared)
    dx_1BD, dw_1 = pull(rows.gather(dy_PF, place_B)[None])
    return dx_PD.at[place_B].set(dx_1BD[0], mode="drop"), jax.tree.map(
        lambda d, d_1: _add(d, d_1, expert), dw, dw_1)

  dx_PD, dw = jax.lax.fori_loop(0, num_blocks(layout), turn, (dx_PD, dw))
  return dx_PD, None, dw, None, None


slots.defvjp(_slots_forward, _slots_backward)


def _add(d_EDF: Array, d_1DF: Array, expert: Array) -> Array:
  """In place: a loop's carry has no other reader."""
  old_1DF = jax.lax.dynamic_slice_in_dim(d_EDF, expert, 1)
  return jax.lax.dynamic_update_slice_in_dim(d_EDF, old_1DF + d_1DF, expert, 0)


def _by_expert(a_P: Array, E: int, S: int) -> Array:
  return a_P[:E * S].reshape(E, S, *a_P.shape[1:])


def _as_places(a_ESD: Array, P: int) -> Array:
  E, S, D = a_ESD.shape
  return jnp.pad(a_ESD.reshape(E * S, D), ((0, P - E * S), (0, 0)))


def _blocks_E(layout: Layout) -> Array:
  return -(-layout.guests_E // layout.block)


def num_blocks(layout: Layout) -> Array:
  """Of guests."""
  return _blocks_E(layout).sum()


def _block(layout: Layout, b: Array) -> tuple[Array, Array]:
  """(expert, places of block b's rows; P for none): a block has guests of one expert."""
  blocks_E = _blocks_E(layout)
  end_E = jnp.cumsum(blocks_E)
  e = (end_E <= b).sum(dtype=jnp.int32)
  rank_B = (b - end_E[e] + blocks_E[e]) * layout.block + jnp.arange(layout.block)
  guest_B = layout.first_guest_E[e] + rank_B
  place_B = layout.guest_P.at[guest_B].get(mode="fill", fill_value=layout.places)
  return e, jnp.where(rank_B < layout.guests_E[e], place_B, layout.places)


def _on_block(layer, expert, place_B, x_PD, weights, per_row, shared):
  """(y_BF, the function from its cotangent [1, B, F] to those of the block's x and the expert's weights)."""
  one = jax.tree.map(lambda w: jax.lax.dynamic_slice_in_dim(w, expert, 1), weights)
  x, per_row = jax.tree.map(lambda a: rows.gather(a, place_B)[None], (x_PD, per_row))
  y_1BF, pull = jax.vjp(lambda x, w: layer(batched, x, w, per_row, shared), x, one)
  return y_1BF[0], pull
