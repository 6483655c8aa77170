"""Files and folders that a power cut, a kill or a second process cannot spoil.

A file is written whole: its name holds what it held before or all of the new, never a part. What counts is on
the disk before it counts: a file's content before its rename, a name before anything relies on it. `lease`
gives a folder to one process at a time.
"""

import contextlib
import dataclasses
import errno
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

from sparse_experts.errors import UserError
from sparse_experts.full_disk import naming

LEASE = "lease.json"
RENEW = 10.0  # seconds between two signs of life of a holder
STALE = 60.0  # seconds without one after which a folder is free


# Written means on the disk


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


def write(path: str, content: bytes | str) -> None:
  with create(path) as f:
    f.write(content.encode() if isinstance(content, str) else content)


def write_json(path: str, content: Any) -> None:
  write(path, json.dumps(content, indent=2) + "\n")


def user_cache(name: str, environ: Mapping[str, str]) -> str:
  """The folder of what is kept from run to run, $XDG_CACHE_HOME/sparse_experts/NAME; ~/.cache by default."""
  home = environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
  return os.path.join(home, "sparse_experts", name)


# One process per folder


@dataclasses.dataclass(frozen=True)
class Holder:
  """A process, so that another one, or a later one with its number, is told from it.

  machine: one boot of one host, and which of its processes see each other; "" where the system does not say.
  """

  host: str
  machine: str
  process: int
  started: str
  token: str  # of this lease

  @classmethod
  def here(cls) -> "Holder":
    machine, process = "", os.getpid()
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id", encoding="ascii") as f:
      machine = f"{f.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    return cls(socket.gethostname(), machine, process, _started(process), uuid.uuid4().hex)

  @property
  def gone(self) -> bool:
    """Whether the process, of this machine, has ended."""
    return _started(self.process) != self.started

  def __str__(self) -> str:
    return f"process {self.process} on host {self.host}"


def _started(process: int) -> str:
  """When a process of this machine began, in the system's ticks; "" if there is none."""
  try:
    with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as f:
      state, *others = f.read().rpartition(")")[2].split()  # the name before it may hold anything
  except OSError:
    return ""
  return "" if state in "ZX" else others[18]


class Lease:
  """A folder that is this process's. Another one that finds no sign of life takes it: `check` says so."""

  def __init__(self, path: str, me: Holder, what: str):
    self._path, self._me, self._what = path, me, what

  def renew(self) -> bool:
    """Gives a sign of life; False if the lease is another's by now, or was removed."""
    try:
      place = os.open(self._path, os.O_RDWR)
    except FileNotFoundError:
      return False
    except OSError:
      return True  # a disk that does not answer now; the next sign may reach it
    with os.fdopen(place, "r+b") as f, contextlib.suppress(OSError):
      if _parsed(f.read()) != self._me:
        return False
      os.utime(place)  # of the file that was opened: one that has taken its place is not touched
    return True

  def check(self) -> None:
    """Raises UserError if the folder is no longer this process's."""
    if not self.renew():
      found = _look(self._path)
      who = f"is now that of {found.holder or 'another process'}" if found else f"has lost its {LEASE}"
      raise UserError(f"{self._what} {who}; this process saves no more and ends. Run the same command again "
                      "once no other trains there")

  def release(self) -> None:
    if self.renew():
      with contextlib.suppress(OSError):
        os.remove(self._path)


@contextlib.contextmanager
def lease(folder: str, what: str, say: Callable[[str], None], me: Holder | None = None,
          now: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep,
          renew: float = RENEW) -> Iterator[Lease]:
  """Holds `folder` within the block, without locks of the file system: works on NFS.

  A holder of this machine that has ended frees the folder at once. Of any other only signs of life count:
  after STALE seconds without one the folder is taken, and `say` is told of the wait. Clocks of hosts are not
  compared.
  Raises UserError that names the holder. what: what messages call the folder.
  """
  path, me = os.path.join(folder, LEASE), me or Holder.here()
  try:
    _acquire(path, me, what, say, now, sleep)
  except OSError as e:
    raise UserError(f"{what}: {path} cannot be written ({e.strerror}); make room or mend its permissions, or "
                    "choose another folder") from None
  held, ended = Lease(path, me, what), threading.Event()

  def beat() -> None:
    while not ended.wait(renew) and held.renew():
      pass

  thread = threading.Thread(target=beat, name="lease", daemon=True)
  thread.start()
  try:
    yield held
  finally:
    ended.set()
    thread.join()
    held.release()


def _acquire(path: str, me: Holder, what: str, say: Callable[[str], None], now: Callable[[], float],
             sleep: Callable[[float], None]) -> None:
  first, since = None, now()
  while not _created(path, me):
    found = _look(path)
    if found is None:  # released in between
      continue
    holder = found.holder
    near = holder if holder and me.machine and holder.machine == me.machine else None
    if near and near.gone:
      _remove(path, found, me)
      continue
    # A copy of a folder in use has a lease too, which nobody renews.
    if (near and abs(time.time() - found.renewed / 1e9) < STALE) or (first and found != first):
      raise UserError(f"{what} is in use by {holder or 'another process'}; wait until it ends, or choose "
                      "another folder")
    if first is None:
      first, since = found, now()
      say(f"{what} is in use by {holder or 'another process'} or was left by it; waiting up to {STALE:.0f} "
          "seconds for a sign of life")
    elif now() - since >= STALE:
      _remove(path, found, me)
      first = None
      continue
    sleep(1.0)


@dataclasses.dataclass(frozen=True)
class _Found:
  content: bytes
  renewed: int  # in nanoseconds, of the clock of whoever keeps the file

  @property
  def holder(self) -> Holder | None:
    """None while it is being written, and where its writing was cut short."""
    return _parsed(self.content)


def _created(path: str, me: Holder) -> bool:
  try:
    place = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
  except FileExistsError:
    return False
  try:
    with os.fdopen(place, "wb") as f:
      f.write(json.dumps(dataclasses.asdict(me)).encode())
  except OSError:
    os.remove(path)
    raise
  return True


def _look(path: str) -> _Found | None:
  try:
    with open(path, "rb") as f:
      return _Found(f.read(4096), os.fstat(f.fileno()).st_mtime_ns)
  except FileNotFoundError:
    return None


def _parsed(content: bytes) -> Holder | None:
  try:
    return Holder(**json.loads(content))
  except (TypeError, ValueError):
    return None


def _remove(path: str, stale: _Found, me: Holder) -> None:
  """Removes a lease if it is still the one that was found stale: of several processes one succeeds."""
  aside = f"{path}.{me.token}"
  with contextlib.suppress(FileNotFoundError):
    os.rename(path, aside)  # no two processes move the same file
    if _look(aside) != stale:  # another process was quicker, and this is its own
      with contextlib.suppress(OSError):
        os.link(aside, path)
    os.remove(aside)
