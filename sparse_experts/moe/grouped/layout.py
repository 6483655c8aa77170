"""Where rows stand for `grouped_matmul.grouped`: sorted by expert, or in slots of a batched product."""

import math

import jax.numpy as jnp
from flax import struct
from jax import Array

from sparse_experts import partitioning
from sparse_experts.errors import UserError, nearest
from sparse_experts.moe.grouped import rows

BACKENDS = ("slots", "ragged_dot", "megablox")  # of grouped products; tiles may follow megablox


@struct.dataclass
class Layout:
  """Which of P places belongs to which row; rows are counted by expert, then as they come.

  A place may hold another expert's row (a guest), or none.
  """

  size_E: Array  # int32, rows per expert
  guest_P: Array  # int32, the place of each guest, by expert; P for none
  slots: int = struct.field(pytree_node=False)  # of each expert; 0: places are rows, sorted by expert
  block: int = struct.field(pytree_node=False)  # guests that are computed at once
  expected: int = struct.field(pytree_node=False)  # rows that there usually are
  backend: str = struct.field(pytree_node=False)

  @property
  def places(self) -> int:
    return self.guest_P.shape[0]

  def place(self, expert_A: Array, rank_A: Array) -> Array:
    """Of an expert's rank-th row."""
    if not self.slots:
      return (jnp.cumsum(self.size_E) - self.size_E)[expert_A] + rank_A
    guest_A = (self.first_guest_E - self.slots)[expert_A] + rank_A
    return jnp.where(rank_A < self.slots, expert_A * self.slots + rank_A,
                     self.guest_P.at[guest_A].get(mode="fill", fill_value=self.places))

  def of_rows(self, R: int) -> Array:
    """Place of each of R rows sorted by expert; P after the last."""
    row_R, end_E = jnp.arange(R), jnp.cumsum(self.size_E)
    expert_R = jnp.minimum(jnp.searchsorted(end_E, row_R, side="right"), len(self.size_E) - 1)
    place_R = self.place(expert_R, row_R - (end_E - self.size_E)[expert_R])
    return jnp.where(row_R < end_E[-1], place_R, self.places)

  def fill(self, a_R: Array) -> Array:
    """Rows sorted by expert -> places."""
    if not self.slots:
      return a_R
    place_R = self.of_rows(a_R.shape[0])
    return rows.move(a_R, rows.invert(place_R, self.places), place_R[:, None])

  def take(self, a_P: Array, R: int) -> Array:
    """Places -> R rows sorted by expert, zeros after the last."""
    if not self.slots:
      real_R1 = (jnp.arange(R) < self.size_E.sum())[:, None]
      return jnp.where(real_R1, a_P, 0)
    place_R = self.of_rows(R)
    return rows.move(a_P, place_R, rows.invert(place_R, self.places)[:, None])

  @property
  def guests_E(self) -> Array:
    return jnp.maximum(self.size_E - self.slots, 0)

  @property
  def first_guest_E(self) -> Array:
    return jnp.cumsum(self.guests_E) - self.guests_E


def lay_out(size_E: Array, R: int, expected: int | None = None, backend: str | None = None) -> Layout:
  """A layout for at most R rows in all.

  expected: how many rows there usually are; None: R. backend: one of BACKENDS; None: the platform's own.
  """
  if backend is None:
    backend = "ragged_dot" if partitioning.platform() == "tpu" else "slots"
  if backend not in BACKENDS and not backend.startswith("megablox:"):
    raise UserError(f"backend='{backend}' is unknown{nearest(backend, BACKENDS)}")
  if backend != "slots":
    return sorted_by_expert(size_E, R, expected).replace(backend=backend)
  expected, E = min(expected or R, R), size_E.shape[0]
  slots, block = slots_and_block(expected, E)
  if not slots:
    return sorted_by_expert(size_E, R, expected).replace(backend="slots", block=min(block, R))
  size_E, places = size_E.astype(jnp.int32), max(R, E * slots)
  place_P = jnp.arange(places, dtype=jnp.int32)
  is_free_P = place_P % slots >= size_E.at[place_P // slots].get(mode="fill", fill_value=0)
  rank_P = jnp.cumsum(is_free_P, dtype=jnp.int32) - 1
  guest_P = rows.invert(jnp.where(is_free_P, rank_P, places), places)
  return Layout(size_E, guest_P, slots, min(block, places), expected, backend)


def sorted_by_expert(size_E: Array, R: int, expected: int | None = None) -> Layout:
  """The layout of R places whose rows stand one after another."""
  place_R = jnp.arange(R, dtype=jnp.int32)
  return Layout(size_E.astype(jnp.int32), place_R, 0, 0, min(expected or R, R), "ragged_dot")


def slots_and_block(expected: int, num_experts: int) -> tuple[int, int]:
  """(slots of each expert, rows of a block).

  Slots are about an even share and one standard deviation of fair draws, and a round number: on a CPU 536
  rows take 6 to 9% longer than 512. With fewer than two rows an expert there are none: they would
  read weights that no row wants. Blocks are small: their rows are few, and each reads its expert's weights.
  """
  share = expected / num_experts
  if share < 2:
    return 0, 8
  wanted = share + math.sqrt(share)
  slots = max(round(wanted / 64), math.ceil(share / 64)) * 64 if share >= 256 else math.ceil(wanted / 8) * 8
  return slots, min(max(2 ** round(math.log2(share)) // 16, 8), 128)
