"""The memory of this machine: what a process may have of it, and to keep what XLA frees after a step."""

import contextlib
import ctypes
import os
import resource

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # of glibc's malloc.h
_NEVER = -1


def keep() -> None:
  """Makes malloc keep freed memory. Call it before jax is used: existing threads keep their own arenas.

  glibc maps large arrays anew each time, and the system clears every page of them: a third of the time of a
  step on two CPU cores. One arena that grows and never shrinks is faulted in once. Its price: the process
  stays as large as it ever was, and threads that compile wait for each other, which took 1.6 to 1.8 times as
  long; so it is for many steps. Environment variables named MALLOC_* win; without a mallopt nothing is done.
  """
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
  if mallopt is None or any(name.startswith("MALLOC_") for name in os.environ):
    return
  for option, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER)):
    mallopt(option, value)


def limit() -> int:
  """Bytes that this process may have: of the machine with its swap, its control group or its ulimit."""
  found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") + _swap()]
  found += [int(text) for path in _group_files() if (text := _read(path).strip()).isdecimal()]
  address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
  return min(found + [address_space] * (address_space != resource.RLIM_INFINITY))


def words(size: float) -> str:
  """A number of bytes as people say it: 24.0 GiB."""
  units = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
  power = 0
  while size >= 1024 and power < len(units) - 1:
    size, power = size / 1024, power + 1
  return f"{size:,.1f} {units[power]}" if power else f"{size:,.0f} bytes"


def _read(path: str) -> str:
  with contextlib.suppress(OSError, UnicodeDecodeError), open(path, encoding="ascii") as f:
    return f.read()
  return ""


def _swap() -> int:
  """Bytes of swap space, where /proc tells it."""
  rows = dict(line.split(":", 1) for line in _read("/proc/meminfo").splitlines() if ":" in line)
  return int(rows.get("SwapTotal", "0 kB").split()[0]) * 1024


def _group_files() -> list[str]:
  """Where the limits of this process's control group, and of those around it, stand (versions 2 and 1)."""
  group = next((row[3:] for row in _read("/proc/self/cgroup").splitlines() if row.startswith("0::")), "/")
  names = [part for part in group.split("/") if part and part != ".."]
  above = ["/".join(names[:n]) for n in range(len(names) + 1)]
  return [os.path.join("/sys/fs/cgroup", path, "memory.max") for path in above] + [
      "/sys/fs/cgroup/memory/memory.limit_in_bytes"]
