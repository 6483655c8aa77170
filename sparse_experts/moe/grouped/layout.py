"""Layouts of the buffer that grouped products read: rows sorted by expert, or reserved per expert."""

import math

import jax.numpy as jnp
from flax import struct
from jax import Array

from sparse_experts import partitioning
from sparse_experts.moe.arguments import check_known
from sparse_experts.moe.grouped import rows

BACKENDS = ("slots", "ragged_dot", "tokamax")  # of grouped products


class Layout(struct.PyTreeNode):
  """Maps rows, counted by expert and then in order of arrival, to the P rows of a buffer.

  Each expert has `reserved` buffer rows. Its rows beyond them, the overflow rows, take buffer rows that other
  experts leave free. A buffer row may stay empty.
  """

  size_E: Array  # int32, rows per expert
  overflow_P: Array  # int32, the buffer row of each overflow row, by expert; P for none
  reserved: int = struct.field(pytree_node=False)  # buffer rows of each expert; 0: rows are sorted by expert
  block: int = struct.field(pytree_node=False)  # overflow rows that are computed at once
  expected: int = struct.field(pytree_node=False)  # rows that there usually are
  backend: str = struct.field(pytree_node=False)

  @property
  def buffer_rows(self) -> int:
    return self.overflow_P.shape[0]

  def buffer_row(self, expert_A: Array, rank_A: Array) -> Array:
    """The buffer row of an expert's rank-th row."""
    if not self.reserved:
      return (jnp.cumsum(self.size_E) - self.size_E)[expert_A] + rank_A
    overflow_A = (self.first_overflow_E - self.reserved)[expert_A] + rank_A
    return jnp.where(rank_A < self.reserved, expert_A * self.reserved + rank_A,
                     self.overflow_P.at[overflow_A].get(mode="fill", fill_value=self.buffer_rows))

  def buffer_row_of_sorted(self, R: int) -> Array:
    """The buffer row of each of R rows sorted by expert; P after the last."""
    row_R, end_E = jnp.arange(R), jnp.cumsum(self.size_E)
    expert_R = jnp.minimum(jnp.searchsorted(end_E, row_R, side="right"), len(self.size_E) - 1)
    buffer_row_R = self.buffer_row(expert_R, row_R - (end_E - self.size_E)[expert_R])
    return jnp.where(row_R < end_E[-1], buffer_row_R, self.buffer_rows)

  def to_buffer(self, a_R: Array) -> Array:
    """Rows sorted by expert -> buffer rows."""
    if not self.reserved:
      return a_R
    buffer_row_R = self.buffer_row_of_sorted(a_R.shape[0])
    return rows.move(a_R, rows.invert(buffer_row_R, self.buffer_rows), buffer_row_R[:, None])

  def from_buffer(self, a_P: Array, R: int) -> Array:
    """Buffer rows -> R rows sorted by expert, zeros after the last."""
    if not self.reserved:
      real_R1 = (jnp.arange(R) < self.size_E.sum())[:, None]
      return jnp.where(real_R1, a_P, 0)
    buffer_row_R = self.buffer_row_of_sorted(R)
    return rows.move(a_P, buffer_row_R, rows.invert(buffer_row_R, self.buffer_rows)[:, None])

  @property
  def overflow_E(self) -> Array:
    return jnp.maximum(self.size_E - self.reserved, 0)

  @property
  def first_overflow_E(self) -> Array:
    return jnp.cumsum(self.overflow_E) - self.overflow_E


def plan_layout(size_E: Array, R: int, expected: int | None = None, backend: str | None = None) -> Layout:
  """A layout for at most R rows in all.

  expected: how many rows there usually are; None: R. backend: one of BACKENDS; None: the platform's own.
  """
  if backend is None:
    backend = "ragged_dot" if partitioning.platform() == "tpu" else "slots"
  check_known("backend", backend, BACKENDS)
  if backend != "slots":
    return sorted_by_expert(size_E, R, expected).replace(backend=backend)
  expected, E = min(expected or R, R), size_E.shape[0]
  reserved, block = reserved_and_block(expected, E)
  if not reserved:
    return sorted_by_expert(size_E, R, expected).replace(backend="slots", block=min(block, R))
  size_E, P = size_E.astype(jnp.int32), max(R, E * reserved)
  row_P = jnp.arange(P, dtype=jnp.int32)
  is_free_P = row_P % reserved >= size_E.at[row_P // reserved].get(mode="fill", fill_value=0)
  rank_P = jnp.cumsum(is_free_P, dtype=jnp.int32) - 1
  overflow_P = rows.invert(jnp.where(is_free_P, rank_P, P), P)
  return Layout(size_E, overflow_P, reserved, min(block, P), expected, backend)


def sorted_by_expert(size_E: Array, R: int, expected: int | None = None) -> Layout:
  """The layout of R buffer rows without reserved ones: rows sorted by expert, without gaps."""
  row_R = jnp.arange(R, dtype=jnp.int32)
  return Layout(size_E.astype(jnp.int32), row_R, 0, 0, min(expected or R, R), "ragged_dot")


def reserved_and_block(expected: int, num_experts: int) -> tuple[int, int]:
  """(rows reserved for each expert, overflow rows of a block).

  Reserved are about an even share and one standard deviation of fair draws, and a round number: on a CPU 536
  rows take 6 to 9% longer than 512. With fewer than two rows an expert none are reserved: they would read
  weights that no row needs. Blocks are small: overflow rows are few, and each reads its expert's weights.
  """
  share = expected / num_experts
  if share < 2:
    return 0, 8
  wanted = share + math.sqrt(share)
  if share >= 256:
    reserved = max(round(wanted / 64), math.ceil(share / 64)) * 64
  else:
    reserved = math.ceil(wanted / 8) * 8
  return reserved, min(max(2 ** round(math.log2(share)) // 16, 8), 128)
