"""Files and folders that a power cut or a kill cannot spoil.

A file is written whole: its name holds what it held before or all of the new, never a part. What counts is on
the disk before it counts: a file's content before its rename, a name before anything relies on it.
"""

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from typing import Any, BinaryIO


def flush(path: str) -> None:
  """Puts the content of a file, or the names in a folder, on the disk."""
  place = os.open(path, os.O_RDONLY)
  try:
    os.fsync(place)
  except OSError as e:
    if not (os.path.isdir(path) and e.errno in (errno.EINVAL, errno.ENOTSUP, errno.EBADF)):
      raise  # some network file systems flush no folders: they keep names in order by themselves
  finally:
    os.close(place)


def flush_tree(folder: str) -> None:
  """Puts a folder with all that is in it on the disk; the folder's own name is its parent's."""
  for inside, _, files in os.walk(folder, topdown=False):
    for name in files:
      flush(os.path.join(inside, name))
    flush(inside)


def move(path: str, target: str) -> None:
  """Gives a file or folder whose content is on the disk another name in place of what had it, on the disk."""
  os.replace(path, target)
  flush(os.path.dirname(target) or ".")


def make_folders(folder: str) -> None:
  """Makes a folder and those above it that are missing; their names are on the disk."""
  parent = os.path.dirname(os.path.abspath(folder))
  if not os.path.isdir(folder):
    make_folders(parent)
    os.makedirs(folder, exist_ok=True)
    flush(parent)


def temporary(path: str) -> str:
  """Where a file is written before it gets its name."""
  return path + ".tmp"


@contextlib.contextmanager
def create(path: str) -> Iterator[BinaryIO]:
  """A file to write to, which is `path`, on the disk, once the block ends without an error."""
  try:
    with open(temporary(path), "wb") as f:
      yield f
      f.flush()
      os.fsync(f.fileno())
    move(temporary(path), path)
  except BaseException:
    with contextlib.suppress(OSError):
      os.remove(temporary(path))
    raise


def write(path: str, content: bytes | str) -> None:
  with create(path) as f:
    f.write(content.encode() if isinstance(content, str) else content)


def write_json(path: str, content: Any) -> None:
  write(path, json.dumps(content, indent=2) + "\n")
