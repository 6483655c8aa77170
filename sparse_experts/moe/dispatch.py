"""How rows travel: from tokens to experts and back, given a router's list.

A dispatch is a function (x_GTD, routing, experts, capacity, key) -> (y_GTD, kept_GA). It decides who
is dropped (only by `slots`, so all agree), lays the kept rows out for `experts`, and sums what comes
back, each row times its gate. `capacity` is the number of slots per expert and group, or None:
dropless. `key` is for dropout inside the experts, which may change the width of rows. Group is an axis;
nothing is vmapped over it. A profile shows the way there as `dispatch`, the way back as `combine`.

  einsum   one-hot products, as GShard, Switch and V-MoE ran on TPU: O(T·E·C) memory; gates are rounded
           to the dtype of x.
  scatter  C slots per expert and group, filled by index: linear, but empty slots are computed.
  ragged   rows by expert, grouped products: linear, and no slot of an expert that is not full is computed.

Dropless, einsum and scatter reserve C = T slots, enough for a list that names no (token, expert) twice:
for tests and small sizes only.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from sparse_experts.errors import UserError, nearest
from sparse_experts.moe.experts import Dropout, Experts
from sparse_experts.moe.grouped import rows
from sparse_experts.moe.routing import Routing, by_token, count_experts, slots

Dispatch = Callable[[Array, Routing, Experts, int | None, Array | None], tuple[Array, Array]]


def _claim(routing: Routing, num_experts: int, capacity: int | None) -> tuple[Array, Array]:
  """(slot_GA, kept_GA)."""
  slot_GA = slots(routing.expert, routing.valid, num_experts)
  return slot_GA, routing.valid if capacity is None else routing.valid & (slot_GA < capacity)


def _claim_row(routing: Routing, num_experts: int, capacity: int) -> tuple[Array, Array, Array]:
  """(slot_GA, kept_GA, row_GA) in a buffer [E, G, C]; E·G·C: nowhere."""
  slot_GA, kept_GA = _claim(routing, num_experts, capacity)
  G = routing.expert.shape[0]
  row_GA = (routing.expert * G + jnp.arange(G)[:, None]) * capacity + slot_GA
  return slot_GA, kept_GA, jnp.where(kept_GA, row_GA, num_experts * G * capacity)


def einsum(x_GTD, routing, experts, capacity, key=None):
  G, T, D = x_GTD.shape
  E, C = experts.num_experts, T if capacity is None else capacity
  with jax.named_scope("dispatch"):
    slot_GA, kept_GA, row_GA = _claim_row(routing, E, C)
    place = (jnp.arange(G)[:, None], routing.token, routing.expert, jnp.where(kept_GA, slot_GA, C))
    empty_GTEC = jnp.zeros((G, T, E, C), jnp.float32)
    dispatch_GTEC = empty_GTEC.at[place].add(1.0, mode="drop").astype(x_GTD.dtype)
    combine_GTEC = empty_GTEC.at[place].add(routing.gate, mode="drop").astype(x_GTD.dtype)
    x_ECD = jnp.einsum("gtec,gtd->egcd", dispatch_GTEC, x_GTD).reshape(E, G * C, D)
    dropout = _dropout(routing, key, row_GA, (E, G * C))
  y_ECD = experts.batched(x_ECD, dropout)
  with jax.named_scope("combine"):
    return jnp.einsum("gtec,egcd->gtd", combine_GTEC, y_ECD.reshape(E, G, C, -1)), kept_GA


def scatter(x_GTD, routing, experts, capacity, key=None):
  G, T, D = x_GTD.shape
  E, C = experts.num_experts, T if capacity is None else capacity
  with jax.named_scope("dispatch"):
    _, kept_GA, row_GA = _claim_row(routing, E, C)
    x_RD, back = _lay_out(x_GTD, routing, row_GA, E * G * C)
    dropout = _dropout(routing, key, row_GA, (E, G * C))
  y_ECD = experts.batched(x_RD.reshape(E, G * C, D), dropout)
  with jax.named_scope("combine"):
    return back(y_ECD.reshape(E * G * C, -1), kept_GA), kept_GA


def ragged(x_GTD, routing, experts, capacity, key=None):
  """With a capacity the list's tail is cut, and what is cut is not computed."""
  G, T, _ = x_GTD.shape
  E, A = experts.num_experts, routing.token.shape[1]
  with jax.named_scope("dispatch"):
    slot_GA, kept_GA = _claim(routing, E, capacity)
    R = G * A if capacity is None else min(G * A, E * G * capacity)
    count_GE = count_experts(routing.expert, kept_GA, E)
    before_GE = jnp.cumsum(count_GE, 0) - count_GE  # rows go by expert, then group, then slot
    rank_GA = jnp.take_along_axis(before_GE, routing.expert, axis=1) + slot_GA
    layout = experts.plan_layout(count_GE.sum(0), R, min(R, routing.expected_rows))
    P = layout.buffer_rows
    row_GA = jnp.where(kept_GA, layout.buffer_row(routing.expert, rank_GA), P)
    x_PD, back = _lay_out(x_GTD, routing, row_GA, P)
    dropout = _dropout(routing, key, row_GA, (P,))
  y_PD, served_P = experts.grouped(x_PD, layout, dropout)
  with jax.named_scope("combine"):
    kept_GA &= served_P.at[row_GA].get(mode="fill", fill_value=False)
    return back(y_PD, kept_GA), kept_GA


def _lay_out(x_GTD: Array, routing: Routing, row_GA: Array, R: int):
  """Rows x_RD with assignment a's token in row_GA[a] (R: nowhere), and the way back to sums y_GTD.

  One group, tokens 0 and 1, the list [0, 1, 0, 1] (K = 2), its second assignment dropped, R = 3:
    row_GA = [2, R, 0, 1]
    to_tokens: places [[0, 2], [1, 3]] of the list
    row_NK = [[2, 0], [R, 1]]      each token's rows: y[0] = gate y_RD[2] + gate y_RD[0]
    entry_R = [1, 3, 0]            its inverse, each row's entry; entry_R // K: its token
  """
  G, T, D = x_GTD.shape
  K = routing.rows_per_token
  if K is None:
    token_A = (jnp.arange(G)[:, None] * T + routing.token).reshape(-1)
    token_R = token_A.at[rows.invert(row_GA, R)].get(mode="fill", fill_value=G * T)
    x_RD = rows.gather(x_GTD.reshape(G * T, D), token_R)

    def back(y_RD, kept_GA):
      gate_GA = jnp.where(kept_GA, routing.gate, 0.0)  # a dropped assignment gets no gradient
      y_AD = rows.weigh(rows.gather(y_RD, row_GA.reshape(-1)), gate_GA.reshape(-1))
      y_ND = jnp.zeros((G * T, y_RD.shape[1]), jnp.float32).at[token_A].add(y_AD)
      return y_ND.reshape(G, T, -1).astype(x_GTD.dtype)

    return x_RD, back

  # Each token's K assignments, in list order: every move is a gather, also in the gradient.
  to_tokens = by_token(routing.token, K)
  row_NK = to_tokens(row_GA).reshape(G * T, K)
  entry_R = rows.invert(row_NK, R)
  x_RD = rows.move_in(x_GTD.reshape(G * T, D), entry_R // K, row_NK)

  def back(y_RD, kept_GA):
    gate_GTK = to_tokens(jnp.where(kept_GA, routing.gate, 0.0))  # a dropped assignment gets no gradient
    y_ND = rows.combine(y_RD, gate_GTK.reshape(G * T, K), row_NK, entry_R)
    return y_ND.reshape(G, T, -1).astype(x_GTD.dtype)

  return x_RD, back


def _dropout(routing: Routing, key: Array | None, row_GA: Array, shape: tuple[int, ...]) -> Dropout | None:
  if key is None or routing.seed is None:
    return None
  seed = jnp.zeros(shape, jnp.uint32).reshape(-1)
  return Dropout(key, seed.at[row_GA.reshape(-1)].set(routing.seed.reshape(-1), mode="drop").reshape(shape))


DISPATCHES: dict[str, Dispatch] = {"einsum": einsum, "scatter": scatter, "ragged": ragged}


def get_dispatch(name: str) -> Dispatch:
  if name not in DISPATCHES:
    raise UserError(f"dispatch='{name}' is unknown{nearest(name, DISPATCHES)}")
  return DISPATCHES[name]
