"""y[r] = x[r] @ w[expert of r] for rows sorted by expert: one function, a backend per platform.

On CPU `jax.lax.ragged_dot` computes every expert for every row. Here each expert's rows are cut into
blocks, and a loop with as many turns as there are used blocks does one small product each. A block
that overruns its expert's last row reads the next expert's rows, masked; as blocks are written in
order, the next expert's block then overwrites what the overrun wrote.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

BLOCK = 128  # rows; larger ones were slower on two cores, smaller ones waste the product's set-up


def grouped_matmul(x_RD: Array, w_EDF: Array, size_E: Array) -> Array:
  """Rows sorted by expert times their expert's matrix; rows after the last group give zeros and no gradient.

  x_RD: rows, those of expert 0 first. size_E: int32 rows per expert, at most R in sum.
  """
  return jax.lax.platform_dependent(
      x_RD, w_EDF, size_E, cpu=functools.partial(_blocked, BLOCK), default=reference)


def reference(x_RD: Array, w_EDF: Array, size_E: Array) -> Array:
  """The library's own, and what the blocks are tested against."""
  # Rows past the last group are zero on CPU, but TPU kernels leave them uninitialised: y's and dx's.
  real_R1 = (jnp.arange(x_RD.shape[0]) < size_E.sum())[:, None]
  y_RF = jax.lax.ragged_dot(jnp.where(real_R1, x_RD, 0), w_EDF, size_E.astype(jnp.int32))
  return jnp.where(real_R1, y_RF, 0)


def varying_like(x: Array, *others: Array) -> Array:
  """`x`, a loop's first carry, marked as varying over the mesh axes that `others` vary over."""

  def axes(a):
    kind = jax.typeof(a)
    kind = getattr(kind, "manual_axis_type", kind)  # jax 0.10.2 against 0.12
    return frozenset(getattr(kind, "varying", getattr(kind, "vma", frozenset())) or frozenset())

  missing = tuple(sorted(frozenset().union(*map(axes, others)) - axes(x)))
  return jax.lax.pcast(x, missing, to="varying") if missing else x


def _blocks(size_E: Array, block: int):
  """(number of used blocks, function of a block's index -> (expert, first row, rows of it that count))."""
  size_E = size_E.astype(jnp.int32)
  first_E = jnp.cumsum(size_E) - size_E
  blocks_E = -(-size_E // block)
  end_E = jnp.cumsum(blocks_E)

  def locate(b):
    e = (end_E <= b).sum(dtype=jnp.int32)
    done = (b - (end_E[e] - blocks_E[e])) * block
    return e, first_E[e] + done, jnp.minimum(size_E[e] - done, block)

  return end_E[-1], locate


def _read(x, start, count, block):
  """`block` rows from `start`, zero beyond `count`."""
  rows = jax.lax.dynamic_slice_in_dim(x, start, block)
  return jnp.where(jnp.arange(block)[:, None] < count, rows, 0)


def _pad_rows(x, block):
  return jnp.pad(x, ((0, block), (0, 0)))  # so that the last block may overrun


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocked(block, x_RD, w_EDF, size_E):
  return _product(block, x_RD, w_EDF, size_E, transpose=False)


def _product(block, x, w, size_E, transpose):
  """x @ w[e] by blocks, or x @ w[e].T."""
  R, out = x.shape[0], w.shape[1 if transpose else 2]
  turns, locate = _blocks(size_E, block)
  padded = _pad_rows(x, block)

  def turn(b, y):
    e, start, count = locate(b)
    w_e = jax.lax.dynamic_index_in_dim(w, e, keepdims=False)
    rows = _read(padded, start, count, block)
    product = jax.lax.dot_general(
        rows, w_e, (((1,), (1 if transpose else 0,)), ((), ())), preferred_element_type=jnp.float32)
    return jax.lax.dynamic_update_slice_in_dim(y, product.astype(y.dtype), start, 0)

  y = varying_like(jnp.zeros((R + block, out), x.dtype), x, w, size_E)
  return jax.lax.fori_loop(0, turns, turn, y)[:R]


def _blocked_forward(block, x_RD, w_EDF, size_E):
  return _blocked(block, x_RD, w_EDF, size_E), (x_RD, w_EDF, size_E)


def _blocked_backward(block, residuals, dy_RF):
  x_RD, w_EDF, size_E = residuals
  turns, locate = _blocks(size_E, block)
  x, dy = _pad_rows(x_RD, block), _pad_rows(dy_RF, block)

  def turn(b, dw_EDF):
    e, start, count = locate(b)
    product = jax.lax.dot_general(
        _read(x, start, count, block), _read(dy, start, count, block), (((0,), (0,)), ((), ())),
        preferred_element_type=jnp.float32)
    return dw_EDF.at[e].add(product)  # in place: the carry has no other reader

  dw_EDF = varying_like(jnp.zeros(w_EDF.shape, jnp.float32), x_RD, w_EDF, dy_RF, size_E)
  dw_EDF = jax.lax.fori_loop(0, turns, turn, dw_EDF)
  return _product(block, dy_RF, w_EDF, size_E, transpose=True), dw_EDF.astype(w_EDF.dtype), None


_blocked.defvjp(_blocked_forward, _blocked_backward)
