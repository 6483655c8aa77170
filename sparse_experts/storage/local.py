"""Files and folders of a file system: what counts is on the disk before it counts.

A file's content is flushed before its rename, a name before anything relies on it.
"""

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from sparse_experts.errors import UserError
from sparse_experts.full_disk import naming
from sparse_experts.storage.address import Facts


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


def rename(path: str, target: str) -> None:
  os.rename(path, target)


def make_folders(folder: str) -> None:
  """Makes a folder and those above it that are missing; their names are on the disk."""
  parent = os.path.dirname(os.path.abspath(folder))
  if not os.path.isdir(folder):
    make_folders(parent)
    os.makedirs(folder, exist_ok=True)
    flush(parent)


def prepare(folder: str, what: str) -> None:
  """Makes a folder; raises UserError where it cannot be, or cannot be written."""
  if os.path.exists(folder) and not os.path.isdir(folder):
    raise UserError(f"{what} is a file; name a folder")
  try:
    make_folders(folder)
  except OSError as e:
    raise UserError(f"{what} cannot be made ({e.strerror}); choose another folder") from None
  if not os.access(folder, os.W_OK | os.X_OK):
    raise UserError(f"{what} cannot be written; choose another folder or mend its permissions")


def check_out(path: str, flag: str) -> None:
  """Raises UserError where a file cannot be written; flag: what messages call it."""
  folder = os.path.dirname(path) or "."
  if not os.path.isdir(folder):
    raise UserError(f"{flag}: there is no folder {folder}; make it, or choose another")
  if os.path.isdir(path):
    raise UserError(f"{flag} is a folder; name a file in it")
  try:
    with open(temporary(path), "wb"):
      pass
    os.remove(temporary(path))
  except OSError as e:
    raise UserError(f"{flag} cannot be written ({e.strerror}); choose another folder") from None


def temporary(path: str) -> str:
  """Where a file is written before it gets its name."""
  return path + ".tmp"


@contextlib.contextmanager
def create(path: str) -> Iterator[BinaryIO]:
  """A file to write to, which is `path`, on the disk, once the block ends; after an error nothing is left.

  On a full disk the OSError names `path`.
  """
  try:
    with naming(path):
      with open(temporary(path), "wb") as f:
        yield f
        f.flush()
        os.fsync(f.fileno())
      move(temporary(path), path)
  except BaseException:
    with contextlib.suppress(OSError):
      os.remove(temporary(path))
    raise


def facts(path: str) -> Facts:
  found = os.stat(path)
  return Facts(found.st_size, stat.S_ISREG(found.st_mode), stat.S_ISDIR(found.st_mode))


def exists(path: str) -> bool:
  return os.path.exists(path)


def is_folder(path: str) -> bool:
  return os.path.isdir(path)


def is_complete(folder: str) -> bool:
  return os.path.isdir(folder)  # it got its name when it was


def names(folder: str) -> list[str]:
  return sorted(os.listdir(folder))


def open_file(path: str) -> BinaryIO:
  return open(path, "rb")


def remove(path: str) -> None:
  os.remove(path)


def remove_folder(folder: str) -> None:
  shutil.rmtree(folder, ignore_errors=True)


def absolute(path: str) -> str:
  return os.path.abspath(path)


def real(path: str) -> str:
  return os.path.realpath(path)


def join(folder: str, path: str) -> str:
  return os.path.normpath(os.path.join(folder, path))


def relative(path: str, start: str) -> str:
  return os.path.relpath(path, start)


def deliver(path: str, target: str) -> None:
  move(path, target)


def kvstore(path: str) -> dict[str, Any]:
  return {"driver": "file", "path": path}


@contextlib.contextmanager
def fetched(folder: str) -> Iterator[str]:
  yield folder


def prune(folder: str, most: int, end: str = "") -> None:
  """Removes the least recently used files whose names end so, until the others have at most `most` bytes."""
  files = []
  for entry in os.scandir(folder):
    if entry.name.endswith(end) and entry.is_file():
      with contextlib.suppress(FileNotFoundError):  # another process removes them too
        found = entry.stat()
        files.append((max(found.st_atime, found.st_mtime), found.st_size, entry.path))
  total = 0
  for _, size, path in sorted(files, reverse=True):
    total += size
    if total > most:
      with contextlib.suppress(FileNotFoundError):
        os.remove(path)


def user_cache(name: str, environ: Mapping[str, str]) -> str:
  """The folder of what is kept from run to run, $XDG_CACHE_HOME/sparse_experts/NAME; ~/.cache by default."""
  home = environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
  return os.path.join(home, "sparse_experts", name)
