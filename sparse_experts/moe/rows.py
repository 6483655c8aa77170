"""Moving rows by index, as gathers forward and backward.

XLA's gradient of a gather is a scatter-add: slow on CPU and TPU, and it sums in no fixed order. Where
the inverse index is known, the gradient is a gather too.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array


def gather(x_ND: Array, index_M: Array) -> Array:
  """x_ND[index_M]; an index >= N gives a row of zeros."""
  return x_ND.at[index_M].get(mode="fill", fill_value=0)


def move(x_ND: Array, index_M: Array, inverse_NK: Array) -> Array:
  """`gather(x_ND, index_M)` whose gradient is a gather: inverse_NK lists the rows of the result that
  hold row n (an entry >= M for none)."""
  return _move(False, False, x_ND, index_M, inverse_NK)


def move_in(x_ND: Array, index_P: Array, inverse_NK: Array) -> Array:
  """`move` to places for `grouped_matmul.grouped`: one that no row wants holds any row, and spares a pass."""
  return _move(True, False, x_ND, index_P, inverse_NK)


def move_out(x_PD: Array, index_M: Array, inverse_P1: Array) -> Array:
  """`move` from such places: a place that no row reads may get any gradient, which is not used there."""
  return _move(False, True, x_PD, index_M, inverse_P1)


def _gather(any_row: bool, x_ND: Array, index_M: Array) -> Array:
  return x_ND.at[index_M].get(mode="clip") if any_row else gather(x_ND, index_M)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _move(any_row, any_gradient, x_ND, index_M, inverse_NK):
  return _gather(any_row, x_ND, index_M)


def _move_forward(any_row, any_gradient, x_ND, index_M, inverse_NK):
  return _gather(any_row, x_ND, index_M), inverse_NK


def _move_backward(any_row, any_gradient, inverse_NK, d_MD):
  d_ND = _gather(any_gradient, d_MD, inverse_NK[:, 0])
  for k in range(1, inverse_NK.shape[1]):
    d_ND += gather(d_MD, inverse_NK[:, k])
  return d_ND, None, None


_move.defvjp(_move_forward, _move_backward)


def invert(row_A: Array, num_rows: int) -> Array:
  """For each of `num_rows` rows the index a with row_A[a] == row, or the length of row_A.

  Rows below `num_rows` must be distinct; the others are nowhere.
  """
  row_A = row_A.reshape(-1)
  A = row_A.shape[0]
  empty = jnp.full((num_rows,), A, jnp.int32)
  return empty.at[row_A].set(jnp.arange(A, dtype=jnp.int32), mode="drop")
