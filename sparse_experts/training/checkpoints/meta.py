"""What a checkpoint says of itself: format, shapes, types and checksums of its arrays, as JSON."""

import json
import zlib
from typing import Any

import jax
from flax.traverse_util import unflatten_dict

FORMAT = 1  # of what a checkpoint holds; a change that older code cannot read makes it larger


def seal(meta: dict[str, Any], arrays: dict[str, list]) -> dict[str, Any]:
  """`meta` with the format, the arrays' shapes, types and checksums, and a checksum of it all."""
  meta = meta | {"format": FORMAT, "arrays": arrays}
  return meta | {"check": meta_checksum(meta)}


def is_sealed(meta: dict[str, Any]) -> bool:
  """Whether this is what `seal` returned; of newer formats too, so what it checks stays as it is."""
  own = {name: value for name, value in meta.items() if name != "check"}
  return {"format", "arrays"} <= own.keys() and meta.get("check") == meta_checksum(own)


def meta_checksum(meta: dict[str, Any]) -> int:
  """Checksum of `meta` without its `check`."""
  return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def abstract_arrays(arrays: dict[str, list]) -> dict[str, Any]:
  """{"params/decoder/...": [shape, dtype, ...]} as nested dicts of shapes and types."""
  leaves = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype, *_) in arrays.items()}
  return unflatten_dict(leaves, sep="/")
