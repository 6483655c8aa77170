"""Checksums of arrays that do not depend on the mesh, computed where the arrays are."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sparse_experts.models.names import by_path

_STEP = 1 << 20  # elements whose products are held at once


def checksums(tree: Any) -> dict[str, list]:
  """{name: [shape, dtype, checksum]} of all leaves."""
  arrays = {"/".join(path): x for path, x in by_path(tree).items()}
  found = jax.device_get(_checksums(list(arrays.values())))
  return {name: [list(x.shape), str(x.dtype), int(value)]
          for (name, x), value in zip(arrays.items(), found, strict=True)}


@jax.jit
def _checksums(arrays: list[Array]) -> Array:
  return jnp.stack([checksum(x) for x in arrays])


def checksum(x: Array) -> Array:
  """sum_i (2 i + 1) * bits_i mod 2^32 over the flattened array.

  Whole numbers add up to the same in any order, so on any mesh; the weights are odd, so no change of a
  single element goes unseen.
  """
  if x.dtype == bool:
    x = x.astype(jnp.uint8)
  bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
  place = jnp.zeros(x.shape, jnp.uint32)
  for axis in range(x.ndim):
    stride = np.uint32(math.prod(x.shape[axis + 1:]) % 2**32)
    place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * stride
  return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)


def add_to_checksum(so_far: int, block: np.ndarray, first: int) -> int:
  """`checksum` of an array of which `block` is the part from element `first` of the flattened array on."""
  flat = block.reshape(-1)
  for start in range(0, flat.size, _STEP):
    bits = flat[start:start + _STEP].view(np.uint32)
    place = np.arange(bits.size, dtype=np.uint32) + np.uint32((first + start) % 2**32)
    so_far += int((bits * (2 * place + 1)).sum(dtype=np.uint32))
  return so_far % 2**32
