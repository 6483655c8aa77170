"""Plan which rows travel where in a dropless exchange: every device works it out from the sizes of all.

Rows are sorted by expert at their source and, where they arrive, by expert, then source. s: source;
d: destination; n: devices along `expert`; e: experts of one; me: this device; N: rows that one has room for.
Rows for which there is no room wait for the next round; in each one every device has room for N again.
No collectives here: `all_to_all.py` does the moving.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from sparse_experts.moe.grouped import rows

# Runs of rows: where each begins here, its size, where it begins there, sizes of the runs that come.
Runs = tuple[Array, Array, Array, Array]

# (there, back, size_e) of a round: functions from x_RD at the sources to N rows sorted by local expert, and
# from those back to R rows, zeros for those of other rounds; the rows of each local expert.
Moves = tuple[Callable[[Array], Array], Callable[[Array], Array], Array]


class Exchange(NamedTuple):
  """A way of sending R rows of each device to where there is room for N at a time."""

  num_rounds: Callable[[Array, int], Array]  # (size_sE, N) -> rounds until all rows have travelled
  moves: Callable[[Array, int, int, Array | int], Moves]  # (size_sE, R, N, k), of round k


def padded_rounds(size_sE: Array, N: int) -> Array:
  """How many rounds of `padded` move all rows."""
  n = size_sE.shape[0]
  return -(-_by_device(size_sE).sum(2).max() // (N // n))


def padded(size_sE: Array, me: Array, R: int, N: int, k: Array | int) -> tuple[Array, ...]:
  """(row_N, sent_R, to_N, from_N, size_e) of round k: each source has N / n of the room.

  row_N: which row is sent at each index, R for none; sent_R: at which index each row is sent, N if it stays.
  to_N: where each received row goes, N for the empty ones; from_N: the inverse.
  """
  n, B = size_sE.shape[0], N // size_sE.shape[0]
  # Rows are sorted by expert, so those for one device are a run; B of it travel in each round.
  end_n, start_n = _ends(size_sE[me], n)
  row_nB = start_n[:, None] + k * B + jnp.arange(B)[None]
  row_N = jnp.where(row_nB < end_n[:, None], row_nB, R).reshape(-1)
  to_N, size_e = _arrange(_between(_by_device(size_sE)[:, me], k * B, (k + 1) * B), B)
  return row_N, rows.invert(row_N, R), to_N, rows.invert(to_N, N), size_e


def ragged_rounds(size_sE: Array, N: int) -> Array:
  """How many rounds of `ragged` move all rows."""
  return -(-_by_device(size_sE).sum((0, 2)).max() // N)


def ragged(size_sE: Array, me: Array, R: int, N: int, k: Array | int) -> tuple[Runs, Runs, Array]:
  """(there, back, size_e) of round k: all sources share the room; a run is what one sends one expert.

  Rows come in the order of their sources, the k-th N of them in round k.
  """
  size_sde = _by_device(size_sE)
  count_sd = size_sde.sum(2)
  first_sd = k * N - (jnp.cumsum(count_sd, 0) - count_sd)  # of a source's rows for a device
  going_sde = _between(size_sde, first_sd, first_sd + N)
  size_de = going_sde.sum(0)
  # Where a run begins: at its source, after the rows of earlier rounds; and there, by expert, then source.
  start_sde = (jnp.cumsum(size_sE, 1) - size_sE).reshape(size_sde.shape)
  from_sde = start_sde + _between(size_sde, jnp.zeros_like(first_sd), first_sd)
  to_sde = (jnp.cumsum(size_de, 1) - size_de)[None] + jnp.cumsum(going_sde, 0) - going_sde
  flat = lambda *arrays: tuple(a.reshape(-1) for a in arrays)
  there = flat(from_sde[me], going_sde[me], to_sde[me], going_sde[:, me])
  back = flat(to_sde[:, me], going_sde[:, me], from_sde[:, me], going_sde[me])
  return there, back, size_de[me]


def _by_device(size_sE: Array) -> Array:
  """size_sde"""
  n, E = size_sE.shape
  return size_sE.reshape(n, n, E // n)


def _ends(size_E: Array, n: int) -> tuple[Array, Array]:
  """Where the rows for each device end and start."""
  end_n = jnp.cumsum(size_E).reshape(n, -1)[:, -1]
  return end_n, jnp.concatenate([jnp.zeros_like(end_n[:1]), end_n[:-1]])


def _between(size_e: Array, first: Array | int, last: Array | int) -> Array:
  """Sizes [..., e] of runs that follow each other, if only their rows `first` to `last` - 1 [...] count."""
  end_e = jnp.cumsum(size_e, -1)
  one_each = lambda row: jnp.broadcast_to(row, size_e.shape[:-1])[..., None]
  before = lambda row: jnp.clip(one_each(row) - (end_e - size_e), 0, size_e)
  return before(last) - before(first)


def _arrange(size_se: Array, B: int) -> tuple[Array, Array]:
  """(to_N: where each received row goes, n * B for the empty ones; size_e: rows per expert)."""
  n, e = size_se.shape
  end_se = jnp.cumsum(size_se, 1)
  index_B = jnp.arange(B)
  expert_sB = jax.vmap(lambda end_e: jnp.searchsorted(end_e, index_B, side="right"))(end_se)
  size_e = size_se.sum(0)
  # Row 0 of a (source, expert) run, less where the run starts in what came from that source.
  first_se = (jnp.cumsum(size_e) - size_e)[None] + jnp.cumsum(size_se, 0) - size_se
  shift_se = first_se - (end_se - size_se)
  shift_sB = jnp.take_along_axis(shift_se, jnp.minimum(expert_sB, e - 1), axis=1)
  to_sB = jnp.where(expert_sB < e, index_B[None] + shift_sB, n * B)
  return to_sB.reshape(-1), size_e
