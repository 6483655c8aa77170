"""Grouped matmul: each row through its own expert's matrices, by a backend per platform.

  slots       CPU and GPU: reserved rows and blocks, `moe/grouped/slots.py`.
  ragged_dot  TPU: rows sorted by expert, and JAX's own product, which `slots` is tested against.
  tokamax     a choice on TPUs and GPUs: the same with a library's kernels, `moe/grouped/kernels.py`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sparse_experts.moe.grouped import kernels, rows, slots
from sparse_experts.moe.grouped.layout import Layout, plan_layout
from sparse_experts.moe.grouped.ops import ExpertOps, Layer


def grouped(layer: Layer, x_PD: Array, layout: Layout, weights: Any, per_row: Any = (),
            shared: Any = ()) -> Array:
  """y_PF of `layer` on the rows of a buffer. Empty rows may hold and get anything finite; the cotangent there
  is not read.

  layer: static and pure; treats rows one by one and reaches their experts by `ops` alone. It gets P rows, or
    E experts with C rows each; every array it needs is an argument.
  weights: arrays with experts first. per_row: arrays with buffer rows first. shared: any arrays. The last two
    have no gradient.
  """
  backend = slots.apply if layout.backend == "slots" else _sorted
  return backend(layer, x_PD, layout, weights, per_row, shared)


def grouped_matmul(x_RD: Array, w_EDF: Array, size_E: Array, *, expected: int | None = None,
                   backend: str | None = None) -> Array:
  """y[r] = x[r] @ w[expert of r], rows sorted by expert; rows after the last group: zeros, no gradient."""
  layout = plan_layout(size_E, x_RD.shape[0], expected, backend)
  return layout.from_buffer(grouped(linear, layout.to_buffer(x_RD), layout, w_EDF), x_RD.shape[0])


def linear(ops: ExpertOps, x: Array, w: Array, per_row: Any, shared: Any) -> Array:
  """The layer of one product."""
  return ops.product(x, w)


def _sorted(layer: Layer, x_RD: Array, layout: Layout, weights: Any, per_row: Any, shared: Any) -> Array:
  # What no row is summed into is zero on CPU, but kernels may leave it uninitialised: rows past the last
  # group of y and dx, and dw of experts without rows.
  row_R, end_E = jnp.arange(x_RD.shape[0]), jnp.cumsum(layout.size_E)
  real_R1 = (row_R < end_E[-1])[:, None]

  def product(a_RD: Array, w_EDF: Array) -> Array:
    a_RD = jnp.where(real_R1, a_RD, 0)
    w_EDF = _gradient_where(w_EDF.astype(a_RD.dtype), layout.size_E > 0)
    kernel = jax.lax.ragged_dot if layout.backend == "ragged_dot" else kernels.product
    return jnp.where(real_R1, kernel(a_RD, w_EDF, layout.size_E), 0)

  def vector(v_EF: Array, dtype: Any) -> Array:
    return rows.gather(v_EF.astype(dtype), jnp.searchsorted(end_E, row_R, side="right"))

  return layer(ExpertOps(product, vector), x_RD, weights, per_row, shared)


@jax.custom_vjp
def _gradient_where(w_EDF: Array, has_rows_E: Array) -> Array:
  """`w_EDF`, whose gradient is zero where an expert has no rows, whatever comes back."""
  return w_EDF


_gradient_where.defvjp(lambda w_EDF, has_rows_E: (w_EDF, has_rows_E),
                       lambda has_rows_E, dw_EDF: (jnp.where(has_rows_E[:, None, None], dw_EDF, 0), None))
