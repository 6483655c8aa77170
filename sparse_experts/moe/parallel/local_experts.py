"""Experts of this device alone: what exchanges nothing, for Gating Dropout."""

import jax
import jax.numpy as jnp
from jax import Array

from sparse_experts import partitioning
from sparse_experts.moe.experts import Dropout
from sparse_experts.moe.grouped.layout import Layout
from sparse_experts.moe.parallel.experts import ExchangedExperts, pack


class LocalExperts(ExchangedExperts):
  """For rows that are all routed to this device's experts: nothing is exchanged; other rows get zero."""

  def _own(self, a: Array, axis: int = 0) -> Array:
    e = self.num_experts // self.n
    return jax.lax.dynamic_slice_in_dim(a, jax.lax.axis_index("expert") * e, e, axis) if self.n > 1 else a

  def batched(self, x_ECD: Array, dropout: Dropout | None = None) -> Array:
    packed = self._own(pack(x_ECD, dropout))
    x_eCD, dropout = self._unpack(packed, x_ECD.shape[-1], dropout)
    y_eCD = self._sum_model(self.local.batched(self._vary_model(x_eCD), dropout))
    if self.n == 1:
      return y_eCD
    zero_ECD = partitioning.varying_like(jnp.zeros((x_ECD.shape[0], *y_eCD.shape[1:]), y_eCD.dtype), y_eCD)
    return jax.lax.dynamic_update_slice_in_dim(
        zero_ECD, y_eCD, jax.lax.axis_index("expert") * y_eCD.shape[0], 0)

  def grouped(self, x_PD: Array, layout: Layout, dropout: Dropout | None = None) -> Array:
    if self.n == 1:
      return super().grouped(x_PD, layout, dropout)
    # All sizes but those of the own experts are 0, so their rows are the first.
    return self._grouped_local(
        pack(x_PD, dropout), x_PD.shape[-1], self._own(layout.size_E), layout.expected, dropout)
