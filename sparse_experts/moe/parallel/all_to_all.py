"""All-to-alls of rows between the devices along `expert`: padded, or of real rows only."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from sparse_experts import partitioning
from sparse_experts.moe.grouped import rows
from sparse_experts.moe.parallel import exchange
from sparse_experts.moe.parallel.exchange import Exchange, Moves


def all_to_all(a: Array) -> Array:
  """[n, ...]: sends part i to device i along `expert`, and receives one part of each device."""
  if a.shape[0] == 1:
    return a  # the compiler would keep it
  with jax.named_scope("all_to_all"):
    return jax.lax.all_to_all(a, "expert", 0, 0, tiled=True)


def sizes_of_all(size_E: Array) -> Array:
  """size_sE: the rows that each device along `expert` has for each expert."""
  with jax.named_scope("all_to_all"):
    return jax.lax.all_gather(size_E, "expert")


def all_agree(number: Array, axes: tuple[str, ...]) -> Array:
  """The largest of the numbers of all devices along `axes`, which then take the same turn."""
  with jax.named_scope("all_to_all"):
    return jax.lax.pmax(number, axes)


def _padded(size_sE: Array, R: int, N: int, k: Array | int) -> Moves:
  n = size_sE.shape[0]
  row_N, sent_R, to_N, from_N, size_e = exchange.padded(size_sE, jax.lax.axis_index("expert"), R, N, k)
  swap = lambda a_ND: all_to_all(a_ND.reshape(n, N // n, -1)).reshape(N, -1)
  there = lambda x_RD: rows.move(swap(rows.move(x_RD, row_N, sent_R[:, None])), from_N, to_N[:, None])
  back = lambda y_ND: rows.move(swap(rows.move(y_ND, to_N, from_N[:, None])), sent_R, row_N[:, None])
  return there, back, size_e


def _ragged(size_sE: Array, R: int, N: int, k: Array | int) -> Moves:
  out_runs, back_runs, size_e = exchange.ragged(size_sE, jax.lax.axis_index("expert"), R, N, k)
  there = lambda x_RD: _send(R, N, x_RD, out_runs, back_runs)
  back = lambda y_ND: _send(N, R, y_ND, back_runs, out_runs)
  return there, back, size_e


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _send(R: int, N: int, x_RD: Array, out: exchange.Runs, back: exchange.Runs) -> Array:
  """x_ND: the rows that arrive by the runs `out`, zeros between them. The gradient travels by `back`.

  JAX's own gradient first asks the other devices for offsets, which are known here: two more exchanges.
  """
  with jax.named_scope("all_to_all"):
    empty_ND = partitioning.varying_like(jnp.zeros((N, x_RD.shape[1]), x_RD.dtype), x_RD, *out)
    return jax.lax.ragged_all_to_all(x_RD, empty_ND, *out, axis_name="expert")


def _send_backward(R, N, runs, d_ND):
  out, back = runs
  return _send(N, R, d_ND, back, out), None, None


_send.defvjp(lambda R, N, x_RD, *runs: (_send(R, N, x_RD, *runs), runs), _send_backward)

PADDED = Exchange(exchange.padded_rounds, _padded)  # every pair of devices exchanges N / n rows, real or not
RAGGED = Exchange(exchange.ragged_rounds, _ragged)  # only real rows travel
EXCHANGES = {"cpu": PADDED}  # by platform, else RAGGED, which XLA lacks on CPUs
