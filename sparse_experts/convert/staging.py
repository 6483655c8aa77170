"""A folder for what a conversion makes before it has its place; what killed ones left is removed."""

import os
import re
import shutil
import socket
import tempfile

_PREFIX = "converting-"


def make_staging(folder: str) -> tempfile.TemporaryDirectory:
  """A new folder in `folder`, named by this process. OSError where none can be made."""
  mine = f"{_PREFIX}{socket.gethostname()}-{os.getpid()}-"
  return tempfile.TemporaryDirectory(prefix=mine, dir=folder, ignore_cleanup_errors=True)


def clear(folder: str) -> None:
  """Removes such folders of processes of this host that are no more, and those that name no process."""
  for name in os.listdir(folder) if os.path.isdir(folder) else ():
    if name.startswith(_PREFIX) and not _lives(name):
      shutil.rmtree(os.path.join(folder, name), ignore_errors=True)


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
