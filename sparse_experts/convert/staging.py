"""A folder for what a conversion makes before it has its place; what killed ones left is removed."""

import os
import re
import socket
import tempfile

from sparse_experts import storage

_PREFIX = "converting-"


def make_staging(folder: str) -> tempfile.TemporaryDirectory:
  """A new folder in `folder`, named by this process; of an address, among the temporary files.

  OSError where none can be made.
  """
  if storage.is_address(folder):
    return tempfile.TemporaryDirectory(prefix="sparse_experts-", ignore_cleanup_errors=True)
  mine = f"{_PREFIX}{socket.gethostname()}-{os.getpid()}-"
  return tempfile.TemporaryDirectory(prefix=mine, dir=folder, ignore_cleanup_errors=True)


def clear(folder: str) -> None:
  """Removes such folders of processes of this host that are no more, and those that name no process."""
  for name in storage.names(folder) if storage.is_folder(folder) else ():
    if name.startswith(_PREFIX) and not _lives(name):
      storage.remove_folder(os.path.join(folder, name))


def _lives(name: str) -> bool:
  found = re.fullmatch(rf"{_PREFIX}(.+)-(\d+)-[^-]+", name)
  if not found:
    return False
  host, process = found.groups()
  try:
    if host == socket.gethostname():
      os.kill(int(process), 0)
  except ProcessLookupError:
    return False
  except OSError:  # another user's
    pass
  return True
