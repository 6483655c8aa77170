"""Keeps the memory that XLA frees after a step in the process, so that the next step need not fault it in."""

import ctypes
import os

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
