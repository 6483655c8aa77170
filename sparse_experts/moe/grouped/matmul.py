"""Rows of many experts, each through its own expert's matrices: one function, a backend per platform.

  slots       CPU and GPU: `moe/grouped/slots.py`.
  ragged_dot  TPU: rows sorted by expert, and the library's product, which the slots are tested against.
  megablox    a choice on one TPU: the same with a kernel whose tiles can be chosen (`benchmark tiles`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sparse_experts.moe.grouped import megablox, rows
from sparse_experts.moe.grouped.layout import Layout, lay_out
from sparse_experts.moe.grouped.slots import OfExpert, slots

Layer = Callable[[OfExpert, Array, Any, Any, Any], Array]  # (of, x, weights, per_row, shared) -> y


def grouped(layer: Layer, x_PD: Array, layout: Layout, weights: Any, per_row: Any = (),
            shared: Any = ()) -> Array:
  """y_PF of `layer` on laid-out rows. Places without a row may hold anything finite, and get anything finite;
  the cotangent there is not looked at.

  layer: static, pure, and for rows one by one, which reach their experts by `of` alone. It gets P rows, or E
    experts with C rows each; every array it needs comes in by its arguments.
  weights: arrays with experts first. per_row: arrays with places first, shared: any; neither has a gradient.
  """
  return (slots if layout.backend == "slots" else _sorted)(layer, x_PD, layout, weights, per_row, shared)


def grouped_matmul(x_RD: Array, w_EDF: Array, size_E: Array, *, expected: int | None = None,
                   backend: str | None = None) -> Array:
  """y[r] = x[r] @ w[expert of r], rows sorted by expert; rows after the last group: zeros, no gradient."""
  layout = lay_out(size_E, x_RD.shape[0], expected, backend)
  return layout.take(grouped(multiply, layout.fill(x_RD), layout, w_EDF), x_RD.shape[0])


def multiply(of, x, w, per_row, shared):
  """The layer that is one product."""
  return of.product(x, w)


def _sorted(layer, x_RD, layout, weights, per_row, shared):
  # Rows past the last group are zero on CPU, but TPU kernels leave them uninitialised: y's and dx's.
  row_R, end_E = jnp.arange(x_RD.shape[0]), jnp.cumsum(layout.size_E)
  real_R1 = (row_R < end_E[-1])[:, None]

  def product(a_RD, w_EDF):
    a_RD, w_EDF = jnp.where(real_R1, a_RD, 0), w_EDF.astype(a_RD.dtype)
    if layout.backend == "ragged_dot":
      y_RF = jax.lax.ragged_dot(a_RD, w_EDF, layout.size_E)
    else:
      y_RF = megablox.product(a_RD, w_EDF, layout.size_E, layout.backend)
    return jnp.where(real_R1, y_RF, 0)

  def vector(v_EF, dtype):
    return rows.gather(v_EF.astype(dtype), jnp.searchsorted(end_E, row_R, side="right"))

  return layer(OfExpert(product, vector), x_RD, weights, per_row, shared)
