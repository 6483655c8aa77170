"""All-to-alls of rows between the devices along `expert`, there and back."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from sparse_experts import partitioning
from sparse_experts.moe.grouped import rows
from sparse_experts.moe.parallel import exchange


def all_to_all(a: Array) -> Array:
  """[n, ...]: part i goes to device i along `expert`; back come the parts of all devices."""
  if a.shape[0] == 1:
    return a  # the compiler would keep it
  with jax.named_scope("all_to_all"):
    return jax.lax.all_to_all(a, "expert", 0, 0, tiled=True)


def sizes_of_all(size_E: Array) -> Array:
  """size_sE: the rows that each device along `expert` has for each expert."""
  with jax.named_scope("all_to_all"):
    return jax.lax.all_gather(size_E, "expert")


def exchange_padded(size_sE: Array, R: int, N: int):
  """(there, back, size_e, served_R): from x_RD at the sources to N rows by expert here, and the way back.

  Every pair of devices exchanges as many rows, real or not.
  """
  n = size_sE.shape[0]
  place_N, sent_R, row_N, index_N, size_e = exchange.padded(size_sE, jax.lax.axis_index("expert"), R, N)
  swap = lambda a_ND: all_to_all(a_ND.reshape(n, N // n, -1)).reshape(N, -1)
  there = lambda x_RD: rows.move(swap(rows.move(x_RD, place_N, sent_R[:, None])), index_N, row_N[:, None])
  back = lambda y_ND: rows.move(swap(rows.move(y_ND, row_N, index_N[:, None])), sent_R, place_N[:, None])
  return there, back, size_e, sent_R < N


def exchange_ragged(size_sE: Array, R: int, N: int):
  """The same, but only real rows travel."""
  out, home, size_e, served_R = exchange.ragged(size_sE, jax.lax.axis_index("expert"), R, N)
  there = lambda x_RD: _send(R, N, x_RD, out, home)
  back = lambda y_ND: _send(N, R, y_ND, home, out)
  return there, back, size_e, served_R


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _send(R: int, N: int, x_RD: Array, out: exchange.Runs, home: exchange.Runs) -> Array:
  """x_ND: the rows that come here by the runs `out`, zeros between them. Its gradient travels by `home`.

  The library's own gradient asks the others for offsets first, which are known here: two more exchanges.
  """
  del home
  with jax.named_scope("all_to_all"):
    empty_ND = partitioning.varying_like(jnp.zeros((N, x_RD.shape[1]), x_RD.dtype), x_RD, *out)
    return jax.lax.ragged_all_to_all(x_RD, empty_ND, *out, axis_name="expert")


def _send_forward(R, N, x_RD, out, home):
  return _send(R, N, x_RD, out, home), (out, home)


def _send_backward(R, N, runs, d_ND):
  out, home = runs
  return _send(N, R, d_ND, home, out), None, None


_send.defvjp(_send_forward, _send_backward)

# By platform; XLA has no ragged exchange for CPUs.
EXCHANGES = {"cpu": exchange_padded}
