"""Rows of many experts, each through its own expert's matrices: one function, a backend per platform.

  slots       CPU: an expert's first rows, a little more than its even share, fill slots of one batched
              product; those beyond are guests in slots that are free, and go through a loop of small blocks.
              `jax.lax.ragged_dot` computes every expert for every row there.
  ragged_dot  elsewhere: rows sorted by expert, and the library's product, which the slots are tested against.

Why slots: a batched product runs at full speed and writes each expert's weight gradient once. A loop over
blocks alone reads every expert's weights, and adds to their gradients, once per block: 1.4 times the floor.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from sparse_experts import partitioning
from sparse_experts.errors import UserError, nearest
from sparse_experts.moe import rows

BACKENDS = ("slots", "ragged_dot")


class OfExpert(NamedTuple):
  """How a layer reaches the weights of each row's expert."""

  product: Callable[[Array, Array], Array]  # (a, w_EDF): rows times their matrix, in their dtype
  vector: Callable[[Array, Any], Array]  # (v_EF, dtype): their vector, of a shape that broadcasts to rows


Layer = Callable[[OfExpert, Array, Any, Any, Any], Array]  # (of, x, weights, per_row, shared) -> y


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
    guest_A = (self._first_guest_E - self.slots)[expert_A] + rank_A
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
  def _first_guest_E(self) -> Array:
    guests_E = jnp.maximum(self.size_E - self.slots, 0)
    return jnp.cumsum(guests_E) - guests_E


def lay_out(size_E: Array, R: int, expected: int | None = None, backend: str | None = None) -> Layout:
  """A layout for at most R rows in all.

  expected: how many rows there usually are; None: R. backend: one of BACKENDS; None: the platform's own.
  """
  if backend is None:
    backend = "slots" if partitioning.platform() == "cpu" else "ragged_dot"
  if backend not in BACKENDS:
    raise UserError(f"backend='{backend}' is unknown{nearest(backend, BACKENDS)}")
  if backend == "ragged_dot":
    return sorted_by_expert(size_E, R, expected)
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

  Slots are an even share and one standard deviation of fair draws. With fewer than two rows an expert there
  are none: they would read weights that no row wants.
  """
  share = expected / num_experts
  slots = -(-math.ceil(share + math.sqrt(share)) // 8) * 8 if share >= 2 else 0
  return slots, min(max(2 ** round(math.log2(share)) // 8, 8), 128) if share > 1 else 8


def grouped(layer: Layer, x_PD: Array, layout: Layout, weights: Any, per_row: Any = (),
            shared: Any = ()) -> Array:
  """y_PF of `layer` on laid-out rows. Places without a row may hold anything finite, and get anything finite;
  the cotangent there is not looked at.

  layer: static, pure, and for rows one by one, which reach their experts by `of` alone. It gets P rows, or E
    experts with C rows each; every array it needs comes in by its arguments.
  weights: arrays with experts first. per_row: arrays with places first, shared: any; neither has a gradient.
  """
  return (_slots if layout.backend == "slots" else _ragged_dot)(layer, x_PD, layout, weights, per_row, shared)


def grouped_matmul(x_RD: Array, w_EDF: Array, size_E: Array, *, expected: int | None = None,
                   backend: str | None = None) -> Array:
  """y[r] = x[r] @ w[expert of r], rows sorted by expert; rows after the last group: zeros, no gradient."""
  layout = lay_out(size_E, x_RD.shape[0], expected, backend)
  return layout.take(grouped(multiply, layout.fill(x_RD), layout, w_EDF), x_RD.shape[0])


def multiply(of, x, w, per_row, shared):
  """The layer that is one product."""
  return of.product(x, w)


# For E experts with C rows each.
batched = OfExpert(
    product=lambda a_ECD, w_EDF: jnp.einsum("ecd,edf->ecf", a_ECD, w_EDF.astype(a_ECD.dtype)),
    vector=lambda v_EF, dtype: v_EF[:, None].astype(dtype))


def _ragged_dot(layer, x_RD, layout, weights, per_row, shared):
  # Rows past the last group are zero on CPU, but TPU kernels leave them uninitialised: y's and dx's.
  row_R, end_E = jnp.arange(x_RD.shape[0]), jnp.cumsum(layout.size_E)
  real_R1 = (row_R < end_E[-1])[:, None]

  def product(a_RD, w_EDF):
    y_RF = jax.lax.ragged_dot(jnp.where(real_R1, a_RD, 0), w_EDF.astype(a_RD.dtype), layout.size_E)
    return jnp.where(real_R1, y_RF, 0)

  def vector(v_EF, dtype):
    return rows.gather(v_EF.astype(dtype), jnp.searchsorted(end_E, row_R, side="right"))

  return layer(OfExpert(product, vector), x_RD, weights, per_row, shared)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _slots(layer, x_PD, layout, weights, per_row, shared):
  return _slots_forward(layer, x_PD, layout, weights, per_row, shared)[0]


def _slots_forward(layer, x_PD, layout, weights, per_row, shared):
  E, S, P = layout.size_E.shape[0], layout.slots, x_PD.shape[0]
  pull = None
  if S:
    mine = jax.tree.map(lambda a: _by_expert(a, E, S), per_row)
    y_ESF, pull = jax.vjp(lambda x, w: layer(batched, x, w, mine, shared), _by_expert(x_PD, E, S), weights)
    y_PF = _as_places(y_ESF, P)
  else:
    y_BF = jax.eval_shape(lambda: _on_block(layer, *_block(layout, 0), x_PD, weights, per_row, shared)[0])
    y_PF = jnp.zeros((P, y_BF.shape[1]), y_BF.dtype)
    y_PF = varying_like(y_PF, *jax.tree.leaves((x_PD, weights, layout.size_E)))

  def turn(b, y_PF):
    expert, place_B = _block(layout, b)
    y_BF, _ = _on_block(layer, expert, place_B, x_PD, weights, per_row, shared)
    return y_PF.at[place_B].set(y_BF, mode="drop")

  y_PF = jax.lax.fori_loop(0, num_blocks(layout), turn, y_PF)
  return y_PF, (x_PD, layout, weights, per_row, shared, pull)


def _slots_backward(layer, residuals, dy_PF):
  x_PD, layout, weights, per_row, shared, pull = residuals
  E, S, P = layout.size_E.shape[0], layout.slots, x_PD.shape[0]
  if S:
    own_ES1 = (jnp.arange(S)[None] < layout.size_E[:, None])[..., None]  # guests had another expert's weights
    dx_ESD, dw = pull(jnp.where(own_ES1, _by_expert(dy_PF, E, S), 0))
    dx_PD = _as_places(dx_ESD, P)
  else:
    zeros = lambda a: varying_like(jnp.zeros_like(a), *jax.tree.leaves((x_PD, weights, dy_PF, layout.size_E)))
    dx_PD, dw = zeros(x_PD), jax.tree.map(zeros, weights)

  def turn(b, carry):
    dx_PD, dw = carry
    expert, place_B = _block(layout, b)
    _, pull = _on_block(layer, expert, place_B, x_PD, weights, per_row, shared)
    dx_1BD, dw_1 = pull(rows.gather(dy_PF, place_B)[None])
    return dx_PD.at[place_B].set(dx_1BD[0], mode="drop"), jax.tree.map(
        lambda d, d_1: _add(d, d_1, expert), dw, dw_1)

  dx_PD, dw = jax.lax.fori_loop(0, num_blocks(layout), turn, (dx_PD, dw))
  return dx_PD, None, dw, None, None


_slots.defvjp(_slots_forward, _slots_backward)


def _add(d_EDF: Array, d_1DF: Array, expert: Array) -> Array:
  """In place: a loop's carry has no other reader."""
  old_1DF = jax.lax.dynamic_slice_in_dim(d_EDF, expert, 1)
  return jax.lax.dynamic_update_slice_in_dim(d_EDF, old_1DF + d_1DF, expert, 0)


def _by_expert(a_P: Array, E: int, S: int) -> Array:
  return a_P[:E * S].reshape(E, S, *a_P.shape[1:])


def _as_places(a_ESD: Array, P: int) -> Array:
  E, S, D = a_ESD.shape
  return jnp.pad(a_ESD.reshape(E * S, D), ((0, P - E * S), (0, 0)))


def _blocks_of(layout: Layout) -> tuple[Array, Array]:
  """(guests_E, number of blocks that hold them _E)."""
  guests_E = jnp.maximum(layout.size_E - layout.slots, 0)
  return guests_E, -(-guests_E // layout.block)


def num_blocks(layout: Layout) -> Array:
  """Of guests."""
  return _blocks_of(layout)[1].sum()


def _block(layout: Layout, b: Array) -> tuple[Array, Array]:
  """(expert, places of block b's rows; P for none): a block has guests of one expert."""
  guests_E, blocks_E = _blocks_of(layout)
  end_E = jnp.cumsum(blocks_E)
  e = (end_E <= b).sum(dtype=jnp.int32)
  rank_B = (b - end_E[e] + blocks_E[e]) * layout.block + jnp.arange(layout.block)
  first = (jnp.cumsum(guests_E) - guests_E)[e]
  place_B = layout.guest_P.at[first + rank_B].get(mode="fill", fill_value=layout.places)
  return e, jnp.where(rank_B < guests_E[e], place_B, layout.places)


def _on_block(layer, expert, place_B, x_PD, weights, per_row, shared):
  """(y_BF, the function from its cotangent [1, B, F] to those of the block's x and the expert's weights)."""
  one = jax.tree.map(lambda w: jax.lax.dynamic_slice_in_dim(w, expert, 1), weights)
  x, per_row = jax.tree.map(lambda a: rows.gather(a, place_B)[None], (x_PD, per_row))
  y_1BF, pull = jax.vjp(lambda x, w: layer(batched, x, w, per_row, shared), x, one)
  return y_1BF[0], pull


def varying_like(x: Array, *others: Array) -> Array:
  """`x`, a loop's first carry, marked as varying over the mesh axes that `others` vary over."""

  def axes(a):
    kind = jax.typeof(a)
    kind = getattr(kind, "manual_axis_type", kind)  # jax 0.10.2 against 0.12
    return frozenset(getattr(kind, "varying", getattr(kind, "vma", frozenset())) or frozenset())

  missing = tuple(sorted(frozenset().union(*map(axes, others)) - axes(x)))
  return jax.lax.pcast(x, missing, to="varying") if missing else x
