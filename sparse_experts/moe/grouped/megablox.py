"""Grouped products by JAX's kernel for TPUs: backend `megablox`, or with tiles `megablox:MxKxN`."""

import re

import jax.numpy as jnp
from jax import Array

from sparse_experts import partitioning
from sparse_experts.errors import UserError


def tiles(backend: str) -> tuple[int, ...]:
  """Of rows, of what is summed over, of the result's width; `megablox` alone has the library's own."""
  sizes = re.fullmatch(r"megablox(?::([1-9]\d*)x([1-9]\d*)x([1-9]\d*))?", backend)
  if not sizes:
    raise UserError(f"backend='{backend}' is not megablox:MxKxN with three tile sizes; write for example "
                    "megablox:512x512x512")
  return tuple(int(size or 128) for size in sizes.groups())


def product(x_RD: Array, w_EDF: Array, size_E: Array, backend: str) -> Array:
  """`jax.lax.ragged_dot`, but rows after the last group hold anything, and so do their gradients."""
  from jax.experimental.pallas.ops.tpu.megablox import ops  # takes a while, and nobody else needs it

  mesh = partitioning.current_mesh()
  if mesh is not None:  # the kernel says nothing about mesh axes, which `shard_map` asks for
    raise UserError(f"backend='megablox' is for one device and the mesh has {mesh.size}; choose 'ragged_dot'")
  R, sizes = x_RD.shape[0], tiles(backend)
  x_RD = jnp.pad(x_RD, ((0, -R % sizes[0]), (0, 0)))
  interpret = partitioning.platform() != "tpu"  # slow: for tests
  return ops.gmm(x_RD, w_EDF, size_E, x_RD.dtype, sizes, interpret=interpret)[:R]
