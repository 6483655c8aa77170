"""Plan which rows travel where in a dropless exchange: every device works it out from the sizes of all.

Rows are sorted by expert at their source and, where they arrive, by expert, then source. s: source;
d: destination; n: devices along `expert`; e: experts of one; me: this device; N: rows that one has room for.
No collectives here: `all_to_all.py` does the moving.
"""

import jax
import jax.numpy as jnp
from jax import Array

from sparse_experts.moe.grouped import rows

# Runs of rows: where each begins here, its size, where it begins there, sizes of the runs that come.
Runs = tuple[Array, Array, Array, Array]


def padded(size_sE: Array, me: Array, R: int, N: int) -> tuple[Array, Array, Array, Array, Array]:
  """(row_N, sent_R, to_N, from_N, size_e): each source has N / n of the room.

  row_N: which row is sent at each index, R for none; sent_R: at which index each row is sent, N if it stays.
  to_N: where each received row goes, N for the empty ones; from_N: the inverse.
  """
  n, B = size_sE.shape[0], N // size_sE.shape[0]
  # Rows are sorted by expert, so those for one device are a run; at most its first B travel.
  end_n, start_n = _ends(size_sE[me], n)
  row_nB = start_n[:, None] + jnp.arange(B)[None]
  row_N = jnp.where(row_nB < end_n[:, None], row_nB, R).reshape(-1)
  to_N, size_e = _arrange(_first(_by_device(size_sE)[:, me], jnp.full((n,), B)), B)
  return row_N, rows.invert(row_N, R), to_N, rows.invert(to_N, N), size_e


def ragged(size_sE: Array, me: Array, R: int, N: int) -> tuple[Runs, Runs, Array, Array]:
  """(there, back, size_e, served_R): all sources share the room; a run is what one sends one expert.

  Where more want to come than there is room for, every source sends as many rows as the others at most, so
  everything that `padded` would send arrives here too.
  """
  n, size_sde = size_sE.shape[0], _by_device(size_sE)
  bound_d = _bounds(size_sde.sum(2), N)
  going_sde = _first(size_sde, jnp.broadcast_to(bound_d, (n, n)))
  size_de = going_sde.sum(0)
  # Where a run begins: at its source, rows that stay included; and there, by expert, then source.
  from_sde = (jnp.cumsum(size_sE, 1) - size_sE).reshape(size_sde.shape)
  to_sde = (jnp.cumsum(size_de, 1) - size_de)[None] + jnp.cumsum(going_sde, 0) - going_sde
  flat = lambda *arrays: tuple(a.reshape(-1) for a in arrays)
  there = flat(from_sde[me], going_sde[me], to_sde[me], going_sde[:, me])
  back = flat(to_sde[:, me], going_sde[:, me], from_sde[:, me], going_sde[me])
  end_n, start_n = _ends(size_sE[me], n)
  row_R = jnp.arange(R)
  device_R = jnp.searchsorted(end_n, row_R, side="right")
  held = lambda a_n: a_n[jnp.minimum(device_R, n - 1)]
  return there, back, size_de[me], (device_R < n) & (row_R - held(start_n) < held(bound_d))


def _by_device(size_sE: Array) -> Array:
  """size_sde"""
  n, E = size_sE.shape
  return size_sE.reshape(n, n, E // n)


def _ends(size_E: Array, n: int) -> tuple[Array, Array]:
  """Where the rows for each device end and start."""
  end_n = jnp.cumsum(size_E).reshape(n, -1)[:, -1]
  return end_n, jnp.concatenate([jnp.zeros_like(end_n[:1]), end_n[:-1]])


def _first(size_e: Array, bound: Array) -> Array:
  """Sizes [..., e] of runs that follow each other, if only the first `bound` [...] of their rows count."""
  return jnp.diff(jnp.minimum(jnp.cumsum(size_e, -1), bound[..., None]), axis=-1, prepend=0)


def _bounds(count_sd: Array, N: int) -> Array:
  """bound_d: the largest for which Σ_s min(count_sd, bound_d) <= N; at least every count if all have room.

  With counts in ascending order that sum is the least, over k, of the k first counts and n - k bounds.
  """
  n = count_sd.shape[0]
  count_sd = jnp.sort(count_sd, axis=0)
  before_sd = jnp.cumsum(count_sd, 0) - count_sd
  return ((N - before_sd) // (n - jnp.arange(n, dtype=count_sd.dtype))[:, None]).max(0)


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
