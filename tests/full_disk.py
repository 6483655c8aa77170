"""A disk that takes half of what is written and is then full, without one."""

import contextlib
import errno
import os

from sparse_experts import storage


class _Half:
  """A file whose first write ends in the middle."""

  def __init__(self, file):
    self._file = file

  def __getattr__(self, name):
    return getattr(self._file, name)

  def write(self, content):
    self._file.write(bytes(content)[:len(bytes(content)) // 2])
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a file says it: without a name


def fill(monkeypatch, but=lambda path: False):
  """Files that `storage` creates cannot be written any more, except those of which `but(path)` is true."""

  @contextlib.contextmanager
  def half(path, mode):
    with open(path, mode) as f:
      yield f if but(path) else _Half(f)

  def allocate(fd, start, length):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  opened = lambda path, mode: half(path, mode) if "w" in mode else open(path, mode)  # noqa: SIM115
  monkeypatch.setattr(storage.local, "open", opened, raising=False)
  monkeypatch.setattr(os, "posix_fallocate", allocate)
