"""A log that grows line by line: a file that is appended to, or in a store a series of whole objects.

Objects do not grow. So the log at gs://bucket/run/metrics.jsonl is written as objects in
metrics.jsonl.parts/, SSSSSS-NNNNNN: number N of series S, whole lines each. A series begins with an object
that holds all lines that count so far and then gets one per interval; the newest series is the log. So a kill
leaves the log before or after an object, and a log that is begun anew needs no rename. A log that is closed
becomes one object of its own name.
"""

import contextlib
import errno
import os
import re
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from sparse_experts.storage import local, objects
from sparse_experts.storage.address import is_address

T = TypeVar("T")

PARTS = ".parts"
INTERVAL = 10.0  # seconds between two objects
MOST = 200  # objects of a series
_PART = re.compile(r"([0-9]{6,})-([0-9]{6,})")


def parts(path: str) -> list[str]:
  """Paths whose contents, one after another, are the log at `path`; that path alone if there are no parts.

  A folder of this machine has parts if it is a copy of one in a store.
  """
  found = _numbers(path)
  if not found:
    return [path]
  newest = max(series for series, _ in found)
  return [_part(path, series, number) for series, number in found if series == newest]


def steadily(path: str, read: Callable[[list[str]], T], nothing: T) -> T:
  """read(parts of the log), again if it was written anew meanwhile; `nothing` if there is no log."""
  for last in (False, False, True):
    found = parts(path)
    try:
      return read(found)
    except FileNotFoundError:
      if found == [path] and parts(path) == found:
        return nothing
      if last:
        raise
  raise AssertionError("the last try returns or raises")


def _numbers(path: str) -> list[tuple[int, int]]:
  """(series, number) of all parts, in order."""
  try:
    names = (objects if is_address(path) else local).names(path + PARTS)
  except (FileNotFoundError, NotADirectoryError):
    return []
  return sorted((int(found[1]), int(found[2])) for name in names if (found := _PART.fullmatch(name)))


def _part(path: str, series: int, number: int) -> str:
  return f"{path}{PARTS}/{series:06d}-{number:06d}"


def whole_log(path: str) -> str:
  """The log at `path` as one file of that name."""
  if is_address(path) and (found := parts(path)) != [path]:
    objects.put(path, b"".join(map(objects.read, found)))
  return path


def open_log(path: str, content: bytes) -> "FileLog | ObjectLog":
  """The log at `path` to write to; it holds `content` and nothing else from now on."""
  return ObjectLog(path, content) if is_address(path) else FileLog(path, content)


class FileLog:
  """Lines of `flush` survive a power cut, others a kill."""

  def __init__(self, path: str, content: bytes):
    with local.create(path) as f:
      f.write(content)
    if os.path.isdir(path + PARTS):
      local.remove_folder(path + PARTS)  # of a copy
    self._file = open(path, "ab", buffering=0)  # noqa: SIM115  closed by `close`
    self._waiting = b""

  def write(self, lines: bytes) -> None:
    """All of the lines or nothing of them; what could not be written is written before the next."""
    self._waiting += lines
    size, written = os.fstat(self._file.fileno()).st_size, 0
    try:
      written = self._file.write(self._waiting)
    finally:
      if written < len(self._waiting):
        self._file.truncate(size)
    if written < len(self._waiting):  # a disk that is nearly full takes a part
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    self._waiting = b""

  def flush(self) -> None:
    """Puts the lines on the disk."""
    os.fsync(self._file.fileno())

  def close(self) -> None:
    self._file.close()


class ObjectLog:
  """Lines of `flush` are stored; others within INTERVAL, by a thread that training does not wait for.

  What a store did not take waits and goes with the next object; until then `write` raises what happened.
  After another process has begun the log anew nothing is written.
  """

  def __init__(self, path: str, content: bytes):
    self._path = path
    self._turn, self._lock = threading.Lock(), threading.Lock()  # one stores at a time; of `_waiting`
    self._waiting = b""
    self._failed: OSError | None = None
    self._last, self._thread = time.monotonic(), threading.Thread()
    self._series = self._number = 0  # of the next object
    self._begin(content)

  def _begin(self, content: bytes) -> None:
    """Begins a series that holds all of the log; those before no longer count."""
    before = _numbers(self._path)
    series = max((series for series, _ in before), default=0) + 1
    objects.put(_part(self._path, series, 0), content)
    self._series, self._number = series, 1
    self._remove(before)

  def _remove(self, numbers: list[tuple[int, int]]) -> None:
    for series, number in numbers:
      with contextlib.suppress(OSError):
        objects.remove(_part(self._path, series, number))

  def _content(self) -> bytes:
    return b"".join(objects.read(_part(self._path, self._series, i)) for i in range(self._number))

  def write(self, lines: bytes) -> None:
    with self._lock:
      self._waiting += lines
    if time.monotonic() - self._last >= INTERVAL and not self._thread.is_alive():
      self._thread = threading.Thread(target=self._try, name="log", daemon=True)
      self._thread.start()
    if self._failed is not None:
      raise self._failed

  def _try(self) -> None:
    with contextlib.suppress(OSError):  # `write` tells it
      self.flush()

  def flush(self) -> None:
    """Stores what waits, as one object."""
    with self._turn:
      lines = self._waiting
      try:
        if not objects.exists(_part(self._path, self._series, 0)):
          raise OSError(errno.ESTALE, "another process has begun the log anew", self._path)
        if lines:  # what is stored although the answer was lost is written again, with what has come since
          objects.put(_part(self._path, self._series, self._number), lines)
          with self._lock:
            self._waiting = self._waiting[len(lines):]
          self._number += 1
        if self._number > MOST:
          self._begin(self._content())
        self._failed = None
      except OSError as e:
        self._failed = e
        raise
      finally:
        self._last = time.monotonic()

  def close(self) -> None:
    """Makes it one object of its own name, as that of a folder is."""
    self.flush()
    content = self._content()
    if self._number > 1:
      self._begin(content)
    objects.put(self._path, content)
    self._remove([(self._series, 0)])
