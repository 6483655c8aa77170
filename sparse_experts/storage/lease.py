"""One process per folder or address at a time, without locks of a file system: works on NFS and in a store.

What gives a place to one of several is a file that is created if it is not there, or an object that is
written under the condition that its generation is the one that was seen.
"""

import contextlib
import dataclasses
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator

from sparse_experts.errors import UserError
from sparse_experts.storage import generations
from sparse_experts.storage.address import is_address

LEASE = "lease.json"
RENEW = 10.0  # seconds between two signs of life of a holder
STALE = 60.0  # seconds without one after which a folder is free


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


@dataclasses.dataclass(frozen=True)
class _Found:
  content: bytes
  renewed: int  # in nanoseconds, of the clock of whoever keeps the file
  generation: str = ""  # of an object

  @property
  def holder(self) -> Holder | None:
    """None while it is being written, and where its writing was cut short."""
    return _parsed(self.content)


class _File:
  """The lease of a folder."""

  def __init__(self, path: str, me: Holder):
    self.path, self._me = path, me

  def create(self) -> bool:
    """Makes it mine; False if there is one."""
    try:
      place = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
      return False
    try:
      with os.fdopen(place, "wb") as f:
        f.write(json.dumps(dataclasses.asdict(self._me)).encode())
    except OSError:
      os.remove(self.path)
      raise
    return True

  def look(self) -> _Found | None:
    return _look(self.path)

  def renew(self) -> bool:
    """Gives a sign of life; False if the lease is another's by now, or was removed."""
    try:
      place = os.open(self.path, os.O_RDWR)
    except FileNotFoundError:
      return False
    except OSError:
      return True  # a disk that does not answer now; the next sign may reach it
    with os.fdopen(place, "r+b") as f, contextlib.suppress(OSError):
      if _parsed(f.read()) != self._me:
        return False
      os.utime(place)  # of the file that was opened: one that has taken its place is not touched
    return True

  def remove(self, stale: _Found) -> None:
    """Removes a lease if it is still the one that was found stale: of several processes one succeeds."""
    aside = f"{self.path}.{self._me.token}"
    with contextlib.suppress(FileNotFoundError):
      os.rename(self.path, aside)  # no two processes move the same file
      if _look(aside) != stale:  # another process was quicker, and this is its own
        with contextlib.suppress(OSError):
          os.link(aside, self.path)
      os.remove(aside)

  def release(self) -> None:
    with contextlib.suppress(OSError):
      os.remove(self.path)


class _Object:
  """The lease of an address: an object whose generation the holder knows."""

  def __init__(self, path: str, me: Holder):
    self.path, self._me, self._mine = path, me, ""
    self._content = json.dumps(dataclasses.asdict(me)).encode()
    self._lock = threading.Lock()  # `check` and the signs of life write by turns

  def create(self) -> bool:
    return self._write("0")

  def _write(self, generation: str, patience: float | None = None) -> bool:
    written = generations.put_if(self.path, self._content, generation, patience)
    if written is None:  # another's; or mine, and the answer to an earlier try was lost
      found = self.look(patience)
      written = found.generation if found and found.holder == self._me else None
    self._mine = written or self._mine
    return written is not None

  def look(self, patience: float | None = None) -> _Found | None:
    found = generations.look(self.path, patience)
    if found is None:
      return None
    content, generation, when = found
    return _Found(content, int(when.timestamp() * 1e9), generation)

  def renew(self) -> bool:
    with self._lock, contextlib.suppress(OSError):  # a store that does not answer now, as a disk above
      return self._write(self._mine, patience=0)
    return True

  def remove(self, stale: _Found) -> None:
    generations.remove_if(self.path, stale.generation)

  def release(self) -> None:
    with self._lock, contextlib.suppress(OSError):
      generations.remove_if(self.path, self._mine)


class Lease:
  """A folder that is this process's. Another one that finds no sign of life takes it: `check` says so."""

  def __init__(self, place: _File | _Object, what: str):
    self._place, self._what = place, what

  def renew(self) -> bool:
    """Gives a sign of life; False if the lease is another's by now, or was removed."""
    return self._place.renew()

  def check(self) -> None:
    """Raises UserError if the folder is no longer this process's."""
    if not self.renew():
      found = self._place.look()
      who = f"is now that of {found.holder or 'another process'}" if found else f"has lost its {LEASE}"
      raise UserError(f"{self._what} {who}; this process saves no more and ends. Run the same command again "
                      "once no other trains there")

  def release(self) -> None:
    if self.renew():
      self._place.release()


@contextlib.contextmanager
def lease(folder: str, what: str, say: Callable[[str], None], me: Holder | None = None,
          now: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep,
          renew: float = RENEW) -> Iterator[Lease]:
  """Holds `folder`, or an address, within the block.

  A holder of this machine that has ended frees the folder at once. Of any other only signs of life count:
  after STALE seconds without one the folder is taken, and `say` is told of the wait. Clocks of hosts are not
  compared.
  Raises UserError that names the holder. what: what messages call the folder.
  """
  path, me = os.path.join(folder, LEASE), me or Holder.here()
  place = _Object(path, me) if is_address(path) else _File(path, me)
  try:
    _acquire(place, me, what, say, now, sleep)
  except OSError as e:
    raise UserError(f"{what}: {path} cannot be written ({e.strerror}); make room or mend its permissions, or "
                    "choose another folder") from None
  held, ended = Lease(place, what), threading.Event()

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


def _acquire(place: _File | _Object, me: Holder, what: str, say: Callable[[str], None],
             now: Callable[[], float], sleep: Callable[[float], None]) -> None:
  first, since = None, now()
  while not place.create():
    found = place.look()
    if found is None:  # released in between
      continue
    holder = found.holder
    near = holder if holder and me.machine and holder.machine == me.machine else None
    if near and near.gone:
      place.remove(found)
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
      place.remove(found)
      first = None
      continue
    sleep(1.0)


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
