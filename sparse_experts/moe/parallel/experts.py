"""Experts divided over devices, called inside `shard_map` as if each device held all of them.

Forward: two all-to-alls over `expert`, one sum over `model`, for `grouped` one exchange of sizes. Backward:
the same without the sizes, and the sum of weight gradients over `data`. Over axes of size 1 they are skipped
here: the compiler would keep them. Rows travel in the type of the activations, and so do the parts that are
summed over `model`: each is the rounded result of a product, so a wider sum would double the bytes and still
hold their rounding. Gradients of weights are summed in float32, the type of the weights.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array

from sparse_experts import partitioning
from sparse_experts.moe.experts import Dropout, Experts
from sparse_experts.moe.grouped.layout import Layout, sorted_by_expert
from sparse_experts.moe.parallel import all_to_all


class ExchangedExperts:
  """Sends each row to the device that holds its expert, and the result back.

  local: the experts of this device, e of them, of whose hidden units it may hold a share. sizes: of the mesh
  axes larger than 1. n: devices along `expert`.
  """

  def __init__(self, local: Experts, sizes: dict[str, int], rows_factor: float | None):
    self.local, self.rows_factor = local, rows_factor
    self.num_experts = local.num_experts
    self.n, self.model = sizes.get("expert", 1), sizes.get("model", 1)

  def batched(self, x_ECD: Array, dropout: Dropout | None = None) -> Array:
    E, C, D = x_ECD.shape
    n, e = self.n, E // self.n
    with jax.named_scope("dispatch"):
      packed = pack(x_ECD, dropout)
      packed = all_to_all.all_to_all(packed.reshape(n, e, C, -1)).swapaxes(0, 1).reshape(e, n * C, -1)
      x_eCD, dropout = self._unpack(packed, D, dropout)
    y_eCD = self._sum_model(self.local.batched(self._vary_model(x_eCD), dropout))
    with jax.named_scope("combine"):
      return all_to_all.all_to_all(y_eCD.reshape(e, n, C, -1).swapaxes(0, 1)).reshape(E, C, -1)

  def plan_layout(self, size_E: Array, R: int, expected: int | None = None) -> Layout:
    """Rows that will travel are sorted by expert; else the local experts choose the layout."""
    return (self.local.plan_layout if self.n == 1 else sorted_by_expert)(size_E, R, expected)

  def grouped(self, x_PD: Array, layout: Layout, dropout: Dropout | None = None) -> tuple[Array, Array]:
    R, D = x_PD.shape
    if self.n == 1:
      with jax.named_scope("dispatch"):
        x_PD, dropout = self._unpack(pack(x_PD, dropout), D, dropout)
      y_PD, served_P = self.local.grouped(self._vary_model(x_PD), layout, dropout)
      return self._sum_model(y_PD), served_P
    n = self.n
    N = n * (R if self.rows_factor is None else min(R, math.ceil(R * self.rows_factor / n)))
    plan = all_to_all.EXCHANGES.get(partitioning.platform(), all_to_all.exchange_ragged)
    with jax.named_scope("dispatch"):
      there, back, size_e, served_R = plan(all_to_all.sizes_of_all(layout.size_E), R, N)
      x_ND = there(pack(x_PD, dropout))
    y_ND = self._grouped_local(x_ND, D, size_e, layout.expected, dropout)
    with jax.named_scope("combine"):
      return back(y_ND), served_R

  def _grouped_local(self, packed_ND: Array, D: int, size_e: Array, expected: int,
                     dropout: Dropout | None) -> Array:
    """Packed rows, sorted by local expert -> their y_ND."""
    N = packed_ND.shape[0]
    with jax.named_scope("dispatch"):
      layout = self.local.plan_layout(size_e, N, expected)
      x_PD, dropout = self._unpack(layout.to_buffer(packed_ND), D, dropout)
    y_PD = self._sum_model(self.local.grouped(self._vary_model(x_PD), layout, dropout)[0])
    with jax.named_scope("combine"):
      return layout.from_buffer(y_PD, N)

  def _vary_model(self, a: Array) -> Array:
    return a if self.model == 1 else jax.lax.pcast(a, "model", to="varying")

  def _sum_model(self, a: Array) -> Array:
    """Each device along `model` holds some hidden units, hence a part of the sum over them."""
    if self.model == 1:
      return a
    with jax.named_scope("experts"):
      return jax.lax.psum(a, "model")

  def _unpack(self, packed: Array, D: int, dropout: Dropout | None) -> tuple[Array, Dropout | None]:
    if dropout is None:
      return packed, None
    seed = jax.lax.bitcast_convert_type(packed[..., D:].astype(jnp.uint8), jnp.uint32)
    width = self.local.w_in.shape[-1]
    column = jax.lax.axis_index("model") * width if self.model > 1 else 0
    return packed[..., :D], Dropout(dropout.key, seed, column)


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

  def grouped(self, x_PD: Array, layout: Layout, dropout: Dropout | None = None) -> tuple[Array, Array]:
    if self.n == 1:
      return super().grouped(x_PD, layout, dropout)
    # All sizes but those of the own experts are 0, so their rows are the first.
    y_RD = self._grouped_local(
        pack(x_PD, dropout), x_PD.shape[-1], self._own(layout.size_E), layout.expected, dropout)
    return y_RD, jnp.ones(y_RD.shape[0], bool)


def pack(x: Array, dropout: Dropout | None) -> Array:
  """Rows with their seeds as four more columns, so that both travel at once.

  A column holds one of a seed's bytes: whole numbers up to 255 are exact in bfloat16 too.
  """
  if dropout is None:
    return x
  byte = jax.lax.bitcast_convert_type(dropout.seed, jnp.uint8)  # four of a seed, as its last axis
  return jnp.concatenate([x, byte.astype(x.dtype)], axis=-1)
