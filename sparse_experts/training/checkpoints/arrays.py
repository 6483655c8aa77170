"""Reads the arrays of a checkpoint by their names, with tensorstore alone."""

import collections
import os
from collections.abc import Mapping
from typing import Any

import jax
import tensorstore
from jax import Array

from sparse_experts import storage

_IN_FLIGHT = 1 << 30  # bytes of arrays that wait for their place on the devices


def open_array(folder: str, name: str, shape: Any, dtype: str) -> tensorstore.TensorStore:
  """The array of that name ("params/...") in the folder of a step, nothing read yet.

  Raises ValueError if it has another shape or type, and what tensorstore raises.
  """
  base, path = os.path.join(folder, "state") + "/", name.replace("/", ".") + "/"
  kvstore = ({"driver": "ocdbt", "base": storage.kvstore(base), "path": path}
             if storage.exists(base + "manifest.ocdbt") else storage.kvstore(base + path))
  there = tensorstore.open({"driver": "zarr", "kvstore": kvstore}, open=True).result()
  if (there.shape, there.dtype.name) != (tuple(shape), dtype):
    raise ValueError(f"{name} is {there.dtype.name} {list(there.shape)}, not {dtype} {list(shape)}")
  return there


def read_arrays(folder: str, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Array]:
  """The arrays of these names, with the shardings of `wanted`; a process reads what its devices hold."""
  found: dict[str, Array] = {}
  waiting: collections.deque = collections.deque()
  in_flight = 0

  def finish() -> int:
    name, x, sharding, parts = waiting.popleft()
    found[name] = jax.make_array_from_callback(x.shape, sharding, lambda index: parts[str(index)].result())
    return _bytes(x)

  for name, x in wanted.items():
    there = open_array(folder, name, x.shape, str(x.dtype))
    sharding = x.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    places = {str(index): index for index in sharding.addressable_devices_indices_map(x.shape).values()}
    waiting.append((name, x, sharding, {at: there[index].read() for at, index in places.items()}))
    in_flight += _bytes(x)
    while in_flight > _IN_FLIGHT:
      in_flight -= finish()
  while waiting:
    finish()
  return found


def _bytes(x: jax.ShapeDtypeStruct) -> int:
  return x.size * x.dtype.itemsize
