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


def meta_checksum(meta: dict[str, Any]) -> int:
  """Checksum of `meta` without its `check`."""
  return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def abstract_arrays(arrays: dict[str, list]) -> dict[str, Any]:
  """{"params/decoder/...": [shape, dtype, ...]} as nested dicts of shapes and types."""
  leaves = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype, *_) in arrays.items()}
  return unflatten_dict(leaves, sep="/")


def first_line(error: BaseException) -> str:
  """An error in one line of at most 200 characters."""
  text = " ".join(str(error).split()) or type(error).__name__
  return text if len(text) <= 200 else f"{text[:90]} ... {text[-100:]}"
