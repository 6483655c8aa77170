"""Compiled programs, kept from run to run in a folder of the user's."""

import contextlib
import os

import jax

LIMIT = 2 * 2**30  # bytes; a run of a small model keeps some megabytes


def keep_compiled_programs() -> None:
  """A second run of a config starts without compiling.

  In $XDG_CACHE_HOME/sparse_experts/jax, or ~/.cache in its place; what was used longest ago goes first when
  there is more than LIMIT. JAX_COMPILATION_CACHE_DIR names another folder, in which nothing is removed, and
  JAX_ENABLE_COMPILATION_CACHE=false keeps nothing. A folder that cannot be written costs a start its time.
  """
  if jax.config.jax_compilation_cache_dir:
    return
  home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
  folder = os.path.join(home, "sparse_experts", "jax")
  try:
    os.makedirs(folder, exist_ok=True)
    prune(folder, LIMIT)
  except OSError:
    return
  if os.access(folder, os.W_OK):
    jax.config.update("jax_compilation_cache_dir", folder)


def prune(folder: str, limit: int) -> None:
  """Removes programs, last used first kept, until the others have at most `limit` bytes.

  jax's own limit needs another package, and fails on programs that were kept without it.
  """
  programs = []
  for entry in os.scandir(folder):
    if entry.name.endswith("-cache"):
      with contextlib.suppress(FileNotFoundError):  # another run removes them too
        facts = entry.stat()
        programs.append((max(facts.st_atime, facts.st_mtime), facts.st_size, entry.path))
  total = 0
  for _, size, path in sorted(programs, reverse=True):
    total += size
    if total > limit:
      with contextlib.suppress(FileNotFoundError):
        os.remove(path)
