"""Backend `slots`, for CPUs and GPUs: one batched product over reserved rows, then a loop over overflow rows.

There `jax.lax.ragged_dot` computes every expert for every row, on a GPU from E copies of them. A batched
product runs at full speed and writes each expert's weight gradient once; a loop over blocks alone reads every
expert's weights, and adds to their gradients, once per block: 1.4 times the floor.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sparse_experts import partitioning
from sparse_experts.moe.grouped import rows
from sparse_experts.moe.grouped.layout import Layout
from sparse_experts.moe.grouped.ops import Layer, batched_ops


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def apply(layer: Layer, x_PD: Array, layout: Layout, weights: Any, per_row: Any, shared: Any) -> Array:
  """y_PF of `layer` on the buffer's rows, see `matmul.grouped`."""
  return _forward(layer, x_PD, layout, weights, per_row, shared)[0]


def _forward(layer: Layer, x_PD: Array, layout: Layout, weights: Any, per_row: Any,
             shared: Any) -> tuple[Array, tuple[Any, ...]]:
  E, S, P = layout.size_E.shape[0], layout.reserved, x_PD.shape[0]
  pull = None
  if S:
    per_reserved, x_ESD = jax.tree.map(lambda a: _by_expert(a, E, S), (per_row, x_PD))
    y_ESF, pull = jax.vjp(lambda x, w: layer(batched_ops, x, w, per_reserved, shared), x_ESD, weights)
    y_PF = _as_buffer(y_ESF, P)
  else:
    y_BF = jax.eval_shape(lambda: _on_block(layer, *_block(layout, 0), x_PD, weights, per_row, shared)[0])
    y_PF = jnp.zeros((P, y_BF.shape[1]), y_BF.dtype)
    y_PF = partitioning.varying_like(y_PF, *jax.tree.leaves((x_PD, weights, layout.size_E)))

  def add_block(b, y_PF):
    expert, row_B = _block(layout, b)
    y_BF, _ = _on_block(layer, expert, row_B, x_PD, weights, per_row, shared)
    return y_PF.at[row_B].set(y_BF, mode="drop")

  y_PF = jax.lax.fori_loop(0, num_blocks(layout), add_block, y_PF)
  return y_PF, (x_PD, layout, weights, per_row, shared, pull)


def _backward(layer: Layer, residuals: tuple[Any, ...], dy_PF: Array) -> tuple[Any, ...]:
  x_PD, layout, weights, per_row, shared, pull = residuals
  E, S, P = layout.size_E.shape[0], layout.reserved, x_PD.shape[0]
  if S:
    own_ES1 = (jnp.arange(S)[None] < layout.size_E[:, None])[..., None]  # overflow rows had another's weights
    dx_ESD, dw = pull(jnp.where(own_ES1, _by_expert(dy_PF, E, S), 0))
    dx_PD = _as_buffer(dx_ESD, P)
  else:
    like = jax.tree.leaves((x_PD, weights, dy_PF, layout.size_E))
    zeros = lambda a: partitioning.varying_like(jnp.zeros_like(a), *like)
    dx_PD, dw = zeros(x_PD), jax.tree.map(zeros, weights)

  def add_block(b, carry):
    dx_PD, dw = carry
    expert, row_B = _block(layout, b)
    _, pull = _on_block(layer, expert, row_B, x_PD, weights, per_row, shared)
    dx_1BD, dw_1 = pull(rows.gather(dy_PF, row_B)[None])
    return dx_PD.at[row_B].set(dx_1BD[0], mode="drop"), jax.tree.map(
        lambda d, d_1: _add(d, d_1, expert), dw, dw_1)

  dx_PD, dw = jax.lax.fori_loop(0, num_blocks(layout), add_block, (dx_PD, dw))
  return dx_PD, None, dw, None, None


apply.defvjp(_forward, _backward)


def _add(d_EDF: Array, d_1DF: Array, expert: Array) -> Array:
  """Adds to one expert's gradient, in place: a loop's carry has no other reader."""
  old_1DF = jax.lax.dynamic_slice_in_dim(d_EDF, expert, 1)
  return jax.lax.dynamic_update_slice_in_dim(d_EDF, old_1DF + d_1DF, expert, 0)


def _by_expert(a_P: Array, E: int, S: int) -> Array:
  return a_P[:E * S].reshape(E, S, *a_P.shape[1:])


def _as_buffer(a_ESD: Array, P: int) -> Array:
  E, S, D = a_ESD.shape
  return jnp.pad(a_ESD.reshape(E * S, D), ((0, P - E * S), (0, 0)))


def _blocks_E(layout: Layout) -> Array:
  return -(-layout.overflow_E // layout.block)


def num_blocks(layout: Layout) -> Array:
  """Blocks of overflow rows in all."""
  return _blocks_E(layout).sum()


def _block(layout: Layout, b: Array | int) -> tuple[Array, Array]:
  """(expert, buffer rows of block b; P for none): a block holds overflow rows of one expert."""
  blocks_E = _blocks_E(layout)
  end_E = jnp.cumsum(blocks_E)
  e = (end_E <= b).sum(dtype=jnp.int32)
  rank_B = (b - end_E[e] + blocks_E[e]) * layout.block + jnp.arange(layout.block)
  overflow_B = layout.first_overflow_E[e] + rank_B
  row_B = layout.overflow_P.at[overflow_B].get(mode="fill", fill_value=layout.buffer_rows)
  return e, jnp.where(rank_B < layout.overflow_E[e], row_B, layout.buffer_rows)


def _on_block(layer: Layer, expert: Array, row_B: Array, x_PD: Array, weights: Any, per_row: Any,
              shared: Any) -> tuple[Array, Callable[[Array], tuple[Array, Any]]]:
  """(y_BF, the function from its cotangent [1, B, F] to those of the block's x and the expert's weights)."""
  one = jax.tree.map(lambda w: jax.lax.dynamic_slice_in_dim(w, expert, 1), weights)
  x, per_row = jax.tree.map(lambda a: rows.gather(a, row_B)[None], (x_PD, per_row))
  y_1BF, pull = jax.vjp(lambda x, w: layer(batched_ops, x, w, per_row, shared), x, one)
  return y_1BF[0], pull
