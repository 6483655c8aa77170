"""Dispatches: ways of moving rows from tokens to experts and back, given a router's list.

  ragged   rows sorted by expert, grouped products: linear, and empty slots are not computed.
  scatter  C slots per expert and group, filled by index: linear, but empty slots are computed.
  einsum   one-hot products, as GShard, Switch and V-MoE ran on TPU: O(T·E·C) memory; gates are rounded
           to the dtype of x.

Dropless, einsum and scatter reserve C = T slots, enough for a list that names no (token, expert) twice:
for tests and small sizes only. Groups are an axis; nothing is vmapped over them. A profile shows the way
there as `dispatch`, the way back as `combine`.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from sparse_experts.moe.arguments import check_known
from sparse_experts.moe.experts import Dropout, Experts
from sparse_experts.moe.grouped import rows
from sparse_experts.moe.routing import Routing, by_token, count_experts, slots

Move = Callable[[Array, Routing, Experts, int | None, Array | None], tuple[Array, Array]]


@dataclasses.dataclass(frozen=True)
class Dispatch:
  """One way of moving rows, and what it costs: all that other files need to know of it.

  move: (x_GTD, routing, experts, capacity, key) -> (y_GTD, kept_GA). `slots` alone decides who is dropped, so
    all dispatches agree. Kept rows are laid out for `experts`, and each result is added times its gate.
    experts: on a mesh they are `ExchangedExperts`, which are called alike. capacity: slots per expert and
    group; None: dropless. key: for dropout inside the experts.
  rows_per_token: (E, k, C, T) -> rows computed per token, empty slots included; C = T when dropless.
  one_hot_flops: (E, C, width) -> FLOPs per token of products that move rows; width: of a row there plus back.
  dropless: whether it suits layers without capacity: rows do not grow with E.
  """

  move: Move
  rows_per_token: Callable[[int, int, int, int], float]
  one_hot_flops: Callable[[int, int, int], float] = lambda E, C, width: 0
  dropless: bool = False


def _claim_slots(routing: Routing, num_experts: int, capacity: int | None) -> tuple[Array, Array]:
  """(slot_GA, kept_GA)."""
  slot_GA = slots(routing.expert, routing.valid, num_experts)
  return slot_GA, routing.valid if capacity is None else routing.valid & (slot_GA < capacity)


def _claim_rows(routing: Routing, num_experts: int, capacity: int) -> tuple[Array, Array, Array]:
  """(slot_GA, kept_GA, row_GA) in a buffer [E, G, C]; dropped rows get E·G·C."""
  slot_GA, kept_GA = _claim_slots(routing, num_experts, capacity)
  G = routing.expert.shape[0]
  row_GA = (routing.expert * G + jnp.arange(G)[:, None]) * capacity + slot_GA
  return slot_GA, kept_GA, jnp.where(kept_GA, row_GA, num_experts * G * capacity)


def ragged(x_GTD: Array, routing: Routing, experts: Experts, capacity: int | None,
           key: Array | None = None) -> tuple[Array, Array]:
  """With a capacity the list's tail is cut, and what is cut is not computed."""
  G, T, _ = x_GTD.shape
  E, A = experts.num_experts, routing.token.shape[1]
  with jax.named_scope("dispatch"):
    slot_GA, kept_GA = _claim_slots(routing, E, capacity)
    R = G * A if capacity is None else min(G * A, E * G * capacity)
    count_GE = count_experts(routing.expert, kept_GA, E)
    before_GE = jnp.cumsum(count_GE, 0) - count_GE  # rows go by expert, then group, then slot
    rank_GA = jnp.take_along_axis(before_GE, routing.expert, axis=1) + slot_GA
    layout = experts.plan_layout(count_GE.sum(0), R, min(R, routing.expected_rows))
    P = layout.buffer_rows
    row_GA = jnp.where(kept_GA, layout.buffer_row(routing.expert, rank_GA), P)
    x_PD, combine = _fill_buffer(x_GTD, routing, row_GA, P)
    dropout = _dropout(routing, key, row_GA, (P,))
  y_PD = experts.grouped(x_PD, layout, dropout)
  with jax.named_scope("combine"):
    return combine(y_PD, kept_GA), kept_GA


def scatter(x_GTD: Array, routing: Routing, experts: Experts, capacity: int | None,
            key: Array | None = None) -> tuple[Array, Array]:
  G, T, D = x_GTD.shape
  E, C = experts.num_experts, T if capacity is None else capacity
  with jax.named_scope("dispatch"):
    _, kept_GA, row_GA = _claim_rows(routing, E, C)
    x_RD, combine = _fill_buffer(x_GTD, routing, row_GA, E * G * C)
    dropout = _dropout(routing, key, row_GA, (E, G * C))
  y_ECD = experts.batched(x_RD.reshape(E, G * C, D), dropout)
  with jax.named_scope("combine"):
    return combine(y_ECD.reshape(E * G * C, -1), kept_GA), kept_GA


def einsum(x_GTD: Array, routing: Routing, experts: Experts, capacity: int | None,
           key: Array | None = None) -> tuple[Array, Array]:
  G, T, D = x_GTD.shape
  E, C = experts.num_experts, T if capacity is None else capacity
  with jax.named_scope("dispatch"):
    slot_GA, kept_GA, row_GA = _claim_rows(routing, E, C)
    index = (jnp.arange(G)[:, None], routing.token, routing.expert, jnp.where(kept_GA, slot_GA, C))
    zero_GTEC = jnp.zeros((G, T, E, C), jnp.float32)
    dispatch_GTEC = zero_GTEC.at[index].add(1.0, mode="drop").astype(x_GTD.dtype)
    combine_GTEC = zero_GTEC.at[index].add(routing.gate, mode="drop").astype(x_GTD.dtype)
    x_ECD = jnp.einsum("gtec,gtd->egcd", dispatch_GTEC, x_GTD).reshape(E, G * C, D)
    dropout = _dropout(routing, key, row_GA, (E, G * C))
  y_ECD = experts.batched(x_ECD, dropout)
  with jax.named_scope("combine"):
    return jnp.einsum("gtec,egcd->gtd", combine_GTEC, y_ECD.reshape(E, G, C, -1)), kept_GA


def _fill_buffer(x_GTD: Array, routing: Routing, row_GA: Array,
                 R: int) -> tuple[Array, Callable[[Array, Array], Array]]:
  """Buffer rows x_RD with assignment a's token in row_GA[a] (R: nowhere), and a function that sums them back.

  One group, tokens 0 and 1, the list [0, 1, 0, 1] (K = 2), its second assignment dropped, R = 3:
    row_GA = [2, R, 0, 1]
    to_tokens: indices [[0, 2], [1, 3]] of the list
    row_NK = [[2, 0], [R, 1]]      each token's rows: y[0] = gate y_RD[2] + gate y_RD[0]
    entry_R = [1, 3, 0]            its inverse, each row's entry; entry_R // K: its token
  """
  G, T, D = x_GTD.shape
  K, x_ND = routing.rows_per_token, x_GTD.reshape(G * T, D)
  if K is None:
    token_A = (jnp.arange(G)[:, None] * T + routing.token).reshape(-1)
    x_RD = rows.gather(x_ND, token_A.at[rows.invert(row_GA, R)].get(mode="fill", fill_value=G * T))

    def add(y_RD: Array, gate_GA: Array) -> Array:
      y_AD = rows.weigh(rows.gather(y_RD, row_GA.reshape(-1)), gate_GA.reshape(-1))
      return jnp.zeros((G * T, y_RD.shape[1]), jnp.float32).at[token_A].add(y_AD)
  else:
    # Each token's K assignments, in list order: every move is a gather, also in the gradient.
    to_tokens = by_token(routing, K)
    row_NK = to_tokens(row_GA).reshape(G * T, K)
    entry_R = rows.invert(row_NK, R)
    x_RD = rows.move(x_ND, entry_R // K, row_NK, "clip")

    def add(y_RD: Array, gate_GA: Array) -> Array:
      return rows.combine(y_RD, to_tokens(gate_GA).reshape(G * T, K), row_NK, entry_R)

  def combine(y_RD: Array, kept_GA: Array) -> Array:
    y_ND = add(y_RD, jnp.where(kept_GA, routing.gate, 0.0))  # a dropped assignment gets no gradient
    return y_ND.reshape(G, T, -1).astype(x_GTD.dtype)

  return x_RD, combine


def _dropout(routing: Routing, key: Array | None, row_GA: Array, shape: tuple[int, ...]) -> Dropout | None:
  if key is None or routing.seed is None:
    return None
  seed = jnp.zeros(shape, jnp.uint32).reshape(-1)
  return Dropout(key, seed.at[row_GA.reshape(-1)].set(routing.seed.reshape(-1), mode="drop").reshape(shape))


_every_slot = lambda E, k, C, T: E * C / T

DISPATCHES = {
    "ragged": Dispatch(ragged, rows_per_token=lambda E, k, C, T: k, dropless=True),
    "scatter": Dispatch(scatter, _every_slot),
    "einsum": Dispatch(einsum, _every_slot, one_hot_flops=lambda E, C, width: 2 * E * C * width),
}


def get_dispatch(name: str) -> Dispatch:
  """The dispatch of that name. Raises UserError if there is none."""
  check_known("dispatch", name, DISPATCHES)
  return DISPATCHES[name]


def dropless_dispatch(name: str) -> str:
  """`name` if that dispatch is made for layers without capacity, else the first one that is."""
  return name if get_dispatch(name).dropless else next(n for n, d in DISPATCHES.items() if d.dropless)
