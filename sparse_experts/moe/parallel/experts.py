"""Experts divided over devices, called inside `shard_map` as if each device held all of them.

Forward: two all-to-alls over `expert`, one sum over `model`, for `grouped` one exchange of sizes. Backward:
the same without the sizes, and the sum of weight gradients over `data`. Over axes of size 1 they are skipped
here: the compiler would keep them. With a bound on the rows that a device receives, `grouped` first takes the
maximum over all devices of the rounds that they need, and exchanges again in each round after the first.

Rows travel in the type of the activations, and so do the parts that are summed over `model`: each is the
rounded result of a product, so a wider sum would double the bytes and still hold their rounding. Gradients of
weights are summed in float32, the type of the weights.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sparse_experts import partitioning
from sparse_experts.moe.experts import Dropout, Experts
from sparse_experts.moe.grouped.layout import Layout, sorted_by_expert
from sparse_experts.moe.parallel import all_to_all
from sparse_experts.moe.parallel.rounds import sum_rounds


class ExchangedExperts:
  """Sends each row to the device that holds its expert, and the result back.

  local: the experts of this device, e of them, of whose hidden units it may hold a share. sizes: of the mesh
  axes larger than 1. n: devices along `expert`. rounds: how many exchanges each way the last call needed.
  """

  rounds: Array | int = 1

  def __init__(self, local: Experts, sizes: dict[str, int], rows_factor: float | None):
    self.local, self.sizes, self.rows_factor = local, sizes, rows_factor
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

  def grouped(self, x_PD: Array, layout: Layout, dropout: Dropout | None = None) -> Array:
    R, D = x_PD.shape
    if self.n == 1:
      with jax.named_scope("dispatch"):
        x_PD, dropout = self._unpack(pack(x_PD, dropout), D, dropout)
      return self._sum_model(self.local.grouped(self._vary_model(x_PD), layout, dropout))
    # At least one row of each device, whatever the factor.
    B = R if self.rows_factor is None else min(R, max(1, math.ceil(R * self.rows_factor / self.n)))
    N, expected = self.n * B, layout.expected
    exchange = all_to_all.EXCHANGES.get(partitioning.platform(), all_to_all.RAGGED)
    with jax.named_scope("dispatch"):
      size_sE, packed_RD = all_to_all.sizes_of_all(layout.size_E), pack(x_PD, dropout)
    graphdef, state = nnx.split(self.local)

    def one_round(k, packed_RD, state, fixed):
      size_sE, dropout = fixed
      with jax.named_scope("dispatch"):
        there, back, size_e = exchange.moves(size_sE, R, N, k)
        x_ND = there(packed_RD)
      of_round = ExchangedExperts(nnx.merge(graphdef, state), self.sizes, self.rows_factor)
      y_ND = of_round._grouped_local(x_ND, D, size_e, expected, dropout)
      with jax.named_scope("combine"):
        return back(y_ND)

    if B == R:  # room for all rows of all devices
      return one_round(0, packed_RD, state, (size_sE, dropout))
    with jax.named_scope("dispatch"):
      # All devices of the mesh turn a loop equally often: there are exchanges in it.
      batch_axes = tuple(axis for axis in partitioning.BATCH_AXES if axis in self.sizes)
      self.rounds = all_to_all.all_agree(exchange.num_rounds(size_sE, N), batch_axes)
    return sum_rounds(one_round, self.rounds, packed_RD, state, (size_sE, dropout))

  def _grouped_local(self, packed_ND: Array, D: int, size_e: Array, expected: int,
                     dropout: Dropout | None) -> Array:
    """Packed rows, sorted by local expert -> their y_ND."""
    N = packed_ND.shape[0]
    with jax.named_scope("dispatch"):
      layout = self.local.plan_layout(size_e, N, expected)
      x_PD, dropout = self._unpack(layout.to_buffer(packed_ND), D, dropout)
    y_PD = self._sum_model(self.local.grouped(self._vary_model(x_PD), layout, dropout))
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


def pack(x: Array, dropout: Dropout | None) -> Array:
  """Rows with their seeds as four more columns, so that both travel at once.

  A column holds one of a seed's bytes: whole numbers up to 255 are exact in bfloat16 too.
  """
  if dropout is None:
    return x
  byte = jax.lax.bitcast_convert_type(dropout.seed, jnp.uint8)  # four of a seed, as its last axis
  return jnp.concatenate([x, byte.astype(x.dtype)], axis=-1)
