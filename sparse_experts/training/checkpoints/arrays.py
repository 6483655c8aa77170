"""Reads the arrays of a checkpoint by their names, with tensorstore alone."""

import collections
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import tensorstore
from jax import Array

from sparse_experts import storage

_IN_FLIGHT = 1 << 30  # bytes of arrays that wait for their place on the devices


def open_arrays(folder: str, wanted: Mapping[str, Any]) -> Iterator[tuple[str, tensorstore.TensorStore]]:
  """The arrays of these names ("params/...") in the folder of a step, in order, nothing read yet.

  wanted: {name: what has its shape and dtype}. All are asked for at once, as each may be a way to a store and
  back. Raises ValueError if one has another shape or type, and what tensorstore raises.
  """
  base, context = os.path.join(folder, "state") + "/", tensorstore.Context()
  _refuse_what_is_no_file(base)
  together = storage.exists(base + "manifest.ocdbt")

  def opening(name: str) -> tensorstore.Future:
    path = name.replace("/", ".") + "/"
    kvstore = ({"driver": "ocdbt", "base": storage.kvstore(base), "path": path} if together
               else storage.kvstore(base + path))
    return tensorstore.open({"driver": "zarr", "kvstore": kvstore}, open=True, context=context)

  for name, future in [(name, opening(name)) for name in wanted]:
    there, x = future.result(), wanted[name]
    if (there.shape, there.dtype.name) != (tuple(x.shape), str(x.dtype)):
      raise ValueError(f"{name} is {there.dtype.name} {list(there.shape)}, not {x.dtype} {list(x.shape)}")
    yield name, there


def _refuse_what_is_no_file(folder: str) -> None:
  """Tensorstore would wait for ever for a pipe that stands in a file's place."""
  for place, _, names in os.walk(folder):  # an address has no such things, and nothing is walked
    for name in names:
      if not os.path.isfile(path := os.path.join(place, name)):
        raise ValueError(f"{path} is not a file")


def read_arrays(folder: str, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Array]:
  """The arrays of these names, with the shardings of `wanted`; a process reads what its devices hold."""
  found: dict[str, Array] = {}
  waiting: collections.deque = collections.deque()
  in_flight = 0

  def finish() -> int:
    name, x, sharding, parts = waiting.popleft()
    found[name] = jax.make_array_from_callback(x.shape, sharding, lambda index: parts[str(index)].result())
    return _bytes(x)

  for name, there in open_arrays(folder, wanted):
    x = wanted[name]
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
