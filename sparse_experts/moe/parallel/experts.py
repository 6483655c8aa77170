"""Experts spread over devices, called inside `shard_map` as if they were here.

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
  """`Experts` whose weights are spread over `expert` and `model`: same calls, rows exchanged.

  Inside `shard_map`. e: experts held here; n: devices along `expert`; B: rows sent to each of them.
  """

  def __init__(self, experts: Experts, sizes: dict[str, int], exchange_rows_factor: float | None):
    self.here, self.rows_factor = experts, exchange_rows_factor
    self.num_experts = experts.num_experts
    self.n, self.model = sizes.get("expert", 1), sizes.get("model", 1)

  def batched(self, x_ECD: Array, dropout: Dropout | None = None) -> Array:
    E, C, D = x_ECD.shape
    n, e = self.n, E // self.n
    with jax.named_scope("dispatch"):
      packed = pack(x_ECD, dropout)
      packed = all_to_all.all_to_all(packed.reshape(n, e, C, -1)).swapaxes(0, 1).reshape(e, n * C, -1)
      x_eCD, dropout = self._unpack(packed, D, dropout)
    y_eCD = self._sum_model(self.here.batched(self._vary_model(x_eCD), dropout))
    with jax.named_scope("combine"):
      return all_to_all.all_to_all(y_eCD.reshape(e, n, C, -1).swapaxes(0, 1)).reshape(E, C, -1)

  def lay_out(self, size_E: Array, R: int, expected: int | None = None) -> Layout:
    """Rows that will travel are sorted by expert; those that stay lie as the experts want them."""
    return (self.here.lay_out if self.n == 1 else sorted_by_expert)(size_E, R, expected)

  def grouped(self, x_PD: Array, layout: Layout, dropout: Dropout | None = None) -> tuple[Array, Array]:
    R, D = x_PD.shape
    if self.n == 1:
      with jax.named_scope("dispatch"):
        x_PD, dropout = self._unpack(pack(x_PD, dropout), D, dropout)
      y_PD, served_P = self.here.grouped(self._vary_model(x_PD), layout, dropout)
      return self._sum_model(y_PD), served_P
    n = self.n
    N = n * (R if self.rows_factor is None else min(R, math.ceil(R * self.rows_factor / n)))
    plan = all_to_all.EXCHANGES.get(partitioning.platform(), all_to_all.exchange_ragged)
    with jax.named_scope("dispatch"):
      there, back, size_e, served_R = plan(all_to_all.sizes_of_all(layout.size_E), R, N)
      x_ND = there(pack(x_PD, dropout))
    y_ND = self._here(x_ND, D, size_e, layout.expected, dropout)
    with jax.named_scope("combine"):
      return back(y_ND), served_R

  def _here(self, packed_ND: Array, D: int, size_e: Array, expected: int, dropout: Dropout | None) -> Array:
    """Rows sorted by the experts held here, packed -> their y_ND."""
    N = packed_ND.shape[0]
    with jax.named_scope("dispatch"):
      layout = self.here.lay_out(size_e, N, expected)
      x_PD, dropout = self._unpack(layout.fill(packed_ND), D, dropout)
    y_PD = self._sum_model(self.here.grouped(self._vary_model(x_PD), layout, dropout)[0])
    with jax.named_scope("combine"):
      return layout.take(y_PD, N)

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
    digits = packed[..., D:].astype(jnp.uint32)
    byte = jnp.arange(0, 32, 8, dtype=jnp.uint32).reshape((1,) * (digits.ndim - 1) + (4,))
    seed = (digits << byte).sum(-1, dtype=jnp.uint32)
    width = self.here.w_in.shape[-1]
    column = jax.lax.axis_index("model") * width if self.model > 1 else 0
    return packed[..., :D], Dropout(dropout.key, seed, column)


class HomeExperts(ExchangedExperts):
  """The same calls for rows that all want experts held here; the others' are zero. Nothing is exchanged."""

  def _mine(self, a: Array, axis: int = 0) -> Array:
    e = self.num_experts // self.n
    return jax.lax.dynamic_slice_in_dim(a, jax.lax.axis_index("expert") * e, e, axis) if self.n > 1 else a

  def batched(self, x_ECD: Array, dropout: Dropout | None = None) -> Array:
    packed = self._mine(pack(x_ECD, dropout))
    x_eCD, dropout = self._unpack(packed, x_ECD.shape[-1], dropout)
    y_eCD = self._sum_model(self.here.batched(self._vary_model(x_eCD), dropout))
    if self.n == 1:
      return y_eCD
    nowhere = partitioning.varying_like(jnp.zeros((x_ECD.shape[0], *y_eCD.shape[1:]), y_eCD.dtype), y_eCD)
    return jax.lax.dynamic_update_slice_in_dim(
        nowhere, y_eCD, jax.lax.axis_index("expert") * y_eCD.shape[0], 0)

  def grouped(self, x_PD: Array, layout: Layout, dropout: Dropout | None = None) -> tuple[Array, Array]:
    if self.n == 1:
      return super().grouped(x_PD, layout, dropout)
    # All sizes but ours are 0, so our rows are the first.
    y_RD = self._here(
        pack(x_PD, dropout), x_PD.shape[-1], self._mine(layout.size_E), layout.expected, dropout)
    return y_RD, jnp.ones(y_RD.shape[0], bool)


def pack(x: Array, dropout: Dropout | None) -> Array:
  """Rows with their seeds as four more columns, so that both travel at once.

  A column holds one of a seed's bytes: whole numbers up to 255 are exact in bfloat16 too.
  """
  if dropout is None:
    return x
  byte = jnp.arange(0, 32, 8, dtype=jnp.uint32).reshape((1,) * dropout.seed.ndim + (4,))
  digits = (dropout.seed[..., None] >> byte) & jnp.uint32(255)
  return jnp.concatenate([x, digits.astype(x.dtype)], axis=-1)
