"""Keys of random numbers by name."""

import zlib
from typing import TypeVar

import jax

Key = TypeVar("Key", jax.Array, jax.Array | None)


def fold(key: Key, name: str | int) -> Key:
  """The key of a part called `name`; None stays None.

  A parameter's key depends on the names down to it and on nothing else, so models that differ
  elsewhere (a dense twin, other segments) start from the same values.
  """
  if key is None:
    return None
  return jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF if isinstance(name, str) else name)
