"""Writes a file whole: after a kill or a full disk its name holds what it held before or all of the new."""

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
  import numpy as np

_FULL = (errno.ENOSPC, errno.EDQUOT)


def temporary(path: str) -> str:
  """Where a file is written before it gets its name."""
  return path + ".tmp"


@contextlib.contextmanager
def create(path: str) -> Iterator[BinaryIO]:
  """A file to write to, which is `path` once the block ends without an error; else nothing is left of it.

  On a full disk the OSError names `path`.
  """
  try:
    with naming(path):
      with open(temporary(path), "wb") as f:
        yield f
      os.replace(temporary(path), path)
  except BaseException:
    with contextlib.suppress(OSError):
      os.remove(temporary(path))
    raise


def write(path: str, content: bytes | str) -> None:
  with create(path) as f:
    f.write(content.encode() if isinstance(content, str) else content)


def write_json(path: str, content: Any) -> None:
  write(path, json.dumps(content, indent=2) + "\n")


def mapped(path: str, dtype: Any, shape: tuple[int, ...]) -> "np.memmap":
  """A new file mapped as an array, whose room on the disk is taken at once: a page without room kills."""
  import numpy as np

  with naming(path):
    array: np.memmap = np.memmap(path, dtype, "w+", shape=shape)
    if hasattr(os, "posix_fallocate"):  # not on macOS
      with open(path, "r+b") as f:
        os.posix_fallocate(f.fileno(), 0, max(array.nbytes, 1))
  return array


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
  """What says in the block that the disk is full, in whatever type, becomes an OSError that names `path`."""
  try:
    yield
  except Exception as e:
    if is_full(e):
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path) from None
    raise


def is_full(error: BaseException) -> bool:
  """Whether the error is that of a full disk; orbax and tensorstore have types of their own for it."""
  return getattr(error, "errno", None) in _FULL or os.strerror(errno.ENOSPC) in str(error)
