"""Disks without room: how they are recognised, whoever writes, and the path that is named."""

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  import numpy as np

_FULL = (errno.ENOSPC, errno.EDQUOT)


def is_full(error: BaseException) -> bool:
  """Whether the error is that of a full disk; orbax and tensorstore have types of their own for it."""
  return getattr(error, "errno", None) in _FULL or os.strerror(errno.ENOSPC) in str(error)


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
  """What says in the block that the disk is full, in whatever type, becomes an OSError that names `path`."""
  try:
    yield
  except Exception as e:
    if is_full(e):
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path) from None
    raise


def mapped(path: str, dtype: Any, shape: tuple[int, ...]) -> "np.memmap":
  """A new file mapped as an array, whose room on the disk is taken at once: a page without room kills."""
  import numpy as np

  with naming(path):
    array: np.memmap = np.memmap(path, dtype, "w+", shape=shape)
    if hasattr(os, "posix_fallocate"):  # not on macOS
      with open(path, "r+b") as f:
        os.posix_fallocate(f.fileno(), 0, max(array.nbytes, 1))
  return array
