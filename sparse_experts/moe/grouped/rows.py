"""Move rows by index with gathers, forward and backward.

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


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def move(x_ND: Array, index_M: Array, inverse_NK: Array, mode: str = "fill") -> Array:
  """`gather(x_ND, index_M)` whose gradient is a gather: inverse_NK lists the rows of the result that
  hold row n (an entry >= M for none).

  mode: with `clip`, the result is a buffer whose empty rows may hold any row: they are not read, and their
    cotangent is 0 (`combine`). That saves a pass over the buffer to clear them.
  """
  return x_ND.at[index_M].get(mode=mode, fill_value=0)


def _move_backward(mode, inverse_NK, d_MD):
  K = inverse_NK.shape[1]
  return functools.reduce(jnp.add, (gather(d_MD, inverse_NK[:, k]) for k in range(K))), None, None


move.defvjp(lambda *operands: (move(*operands), operands[2]), _move_backward)


@jax.custom_vjp
def combine(y_PD: Array, gate_NK: Array, buffer_row_NK: Array, inverse_P: Array) -> Array:
  """y_ND = sum over k of gate_NK times buffer row buffer_row_NK (>= P: none), in float32.

  inverse_P: the index of each buffer row in the flattened buffer_row_NK; N·K for a row that is not read.
  """
  row = lambda k: gate_NK[:, k, None] * gather(y_PD, buffer_row_NK[:, k]).astype(jnp.float32)
  # K gathers in one pass; XLA:CPU's sum over an axis is slow.
  return functools.reduce(jnp.add, (row(k) for k in range(gate_NK.shape[1])))


def _combine_backward(operands, d_ND):
  y_PD, gate_NK, buffer_row_NK, inverse_P = operands
  K = gate_NK.shape[1]
  gate_P = gather(gate_NK.reshape(-1), inverse_P)
  dy_PD = gate_P[:, None] * d_ND.at[inverse_P // K].get(mode="clip")
  d_gate_NK = jnp.stack([_row_products(gather(y_PD, buffer_row_NK[:, k]), d_ND) for k in range(K)], axis=1)
  return dy_PD.astype(y_PD.dtype), d_gate_NK, None, None


combine.defvjp(lambda *operands: (combine(*operands), operands), _combine_backward)


def _row_products(x_ND: Array, d_ND: Array) -> Array:
  """Inner product of each row of x with that of d; XLA:CPU's sum over a row is ten times slower than this."""
  one_D = jnp.ones(x_ND.shape[1], jnp.float32)
  return jnp.dot(x_ND.astype(jnp.float32) * d_ND, one_D, precision=jax.lax.Precision.HIGHEST)


@jax.custom_vjp
def weigh(x_ND: Array, gate_N: Array) -> Array:
  """x_ND * gate_N in float32."""
  return x_ND.astype(jnp.float32) * gate_N[:, None]


def _weigh_backward(operands, d_ND):
  x_ND, gate_N = operands
  return (gate_N[:, None] * d_ND).astype(x_ND.dtype), _row_products(x_ND, d_ND)


weigh.defvjp(lambda *operands: (weigh(*operands), operands), _weigh_backward)


def invert(row_A: Array, num_rows: int) -> Array:
  """For each of `num_rows` rows the index a with row_A[a] == row, or the length of row_A.

  Rows below `num_rows` must be distinct; entries >= num_rows are ignored.
  """
  row_A = row_A.reshape(-1)
  A = row_A.shape[0]
  empty = jnp.full((num_rows,), A, jnp.int32)
  return empty.at[row_A].set(jnp.arange(A, dtype=jnp.int32), mode="drop")
