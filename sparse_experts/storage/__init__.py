"""Where runs and their data are: files and folders of this machine, or objects of a store such as gs://.

The rest of the package calls the verbs below with a path or an address and does not ask which it is; `local`
and `objects` have the same ones. What they promise:

  create, write   a file or an object has its old content or all of the new one, never a part
  open_log        a log that grows line by line (`logs`)
  lease           a place is one process's at a time (`lease`)
  rename          what has the new name is whole; the old name goes last
  remove_folder   a checkpoint that is removed by halves is no longer complete

A file system appends, renames at once and keeps what was flushed (`local`). A store does neither: an object
is written whole, there are no folders, and what is stored is stored. So a log is a series of objects; a
checkpoint counts by orbax's marker, an object that is written last and removed first; the lease is written
under the condition that the generation is the one that was seen. epath, which orbax reads and writes small
files with, has no conditions: these verbs go to fsspec, on which epath stands, and set up both alike.

A bucket that is mounted and NFS are folders.
"""

import contextlib
import functools
import json
import os
from types import ModuleType
from typing import Any, BinaryIO

from sparse_experts.storage import local, objects
from sparse_experts.storage.address import Facts, check, check_keeps_runs, is_address
from sparse_experts.storage.cache import cached
from sparse_experts.storage.lease import LEASE, Holder, Lease, lease
from sparse_experts.storage.local import flush, flush_tree, move, prune, temporary, user_cache
from sparse_experts.storage.logs import FileLog, ObjectLog, open_log, steadily, whole_log
from sparse_experts.storage.logs import parts as log_parts
from sparse_experts.storage.outbox import Outbox


def _at(path: str) -> ModuleType:
  return objects if is_address(path) else local


def create(path: str) -> contextlib.AbstractContextManager[BinaryIO]:
  """A file to write to, which is `path` once the block ends; after an error nothing is left."""
  return _at(path).create(path)


def write(path: str, content: bytes | str) -> None:
  with create(path) as f:
    f.write(content.encode() if isinstance(content, str) else content)


def write_json(path: str, content: Any) -> None:
  write(path, json.dumps(content, indent=2) + "\n")


def facts(path: str) -> Facts:
  """Its size and kind; FileNotFoundError if nothing has that name."""
  return _at(path).facts(path)


def exists(path: str) -> bool:
  return _at(path).exists(path)


def is_folder(path: str) -> bool:
  """Whether it is a folder, or there are objects below it."""
  return _at(path).is_folder(path)


def is_complete(folder: str) -> bool:
  """Whether a checkpoint was saved to its end."""
  return _at(folder).is_complete(folder)


def names(folder: str) -> list[str]:
  """Names of what is in a folder, sorted; FileNotFoundError or NotADirectoryError without one."""
  return _at(folder).names(folder)


def open_file(path: str) -> BinaryIO:
  """A file to read; of an object, all of it in memory."""
  return _at(path).open_file(path)


def read(path: str) -> bytes:
  with open_file(path) as f:
    return f.read()


def remove(path: str) -> None:
  _at(path).remove(path)


def remove_folder(folder: str) -> None:
  """Removes a folder and all that is in it, as far as that can be done."""
  _at(folder).remove_folder(folder)


def rename(path: str, target: str) -> None:
  """Gives a file or folder a name that is free."""
  _at(path).rename(path, target)


def make_folders(folder: str) -> None:
  """Makes a folder and those above it that are missing; their names are on the disk."""
  _at(folder).make_folders(folder)


def prepare(folder: str, what: str) -> None:
  """Makes a folder; raises UserError where it cannot be made or written. what: what messages call it."""
  _at(folder).prepare(folder, what)


def check_out(path: str, flag: str) -> None:
  """Raises UserError where a file cannot be written. flag: what messages call it, such as --out=x.html."""
  check(path, flag)
  _at(path).check_out(path, flag)


def absolute(path: str) -> str:
  """The path from the root, or the address as it is always spelt."""
  return _at(path).absolute(path)


def real(path: str) -> str:
  """`absolute`, links followed: the same for the same place."""
  return _at(path).real(path)


def join(folder: str, path: str) -> str:
  """Where `path` leads from a folder; it may go up, or be absolute or an address."""
  return path if is_address(path) else _at(folder).join(folder, path)


def relative(path: str, start: str) -> str:
  """How `join(start, ...)` is told of `path`."""
  return _at(path).relative(path, start) if is_address(path) == is_address(start) else absolute(path)


def deliver(path: str, target: str) -> None:
  """Gives a file or a folder of checkpoints, which lies on this machine and the same disk, its place."""
  _at(target).deliver(path, target)


def kvstore(path: str) -> dict[str, Any]:
  """What tensorstore calls the place."""
  return _at(path).kvstore(path)


def fetched(folder: str) -> contextlib.AbstractContextManager[str]:
  """The same files in a folder of this machine, for what reads only those, within the block."""
  return _at(folder).fetched(folder)
