"""Keeps compiled programs from run to run in the user's cache folder."""

import os
import shutil

import jax

from sparse_experts import storage

LIMIT = 2 * 2**30  # bytes; a run of a small model keeps some megabytes
ROOM = 2**28  # bytes that have to be free, or nothing is kept: jax leaves a part of a program on a full disk


def keep_compiled_programs() -> None:
  """A second run of a config starts without compiling.

  The programs are in $XDG_CACHE_HOME/sparse_experts/jax, by default ~/.cache/sparse_experts/jax. Beyond LIMIT
  the least recently used are removed. JAX_COMPILATION_CACHE_DIR names another folder, in which nothing is
  removed, and JAX_ENABLE_COMPILATION_CACHE=false keeps nothing. If the folder cannot be
  written, or its disk is nearly full, every start compiles.
  """
  if jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]  # jax adds it at run time
    return
  folder = storage.user_cache("jax", os.environ)
  try:
    os.makedirs(folder, exist_ok=True)
    # jax's own limit needs another package, and fails on programs kept without it.
    storage.prune(folder, LIMIT, end="-cache")
    if shutil.disk_usage(folder).free < ROOM:
      return
  except OSError:
    return
  if os.access(folder, os.W_OK):
    jax.config.update("jax_compilation_cache_dir", folder)
