"""The version of the package, and of what a result depends on besides its config."""

import hashlib
import os
import pathlib
import platform
from importlib import metadata

VERSION = "0.1.0"
OWN = ("JAX_PROCESS_ID", "JAX_NUM_CPU_DEVICES", "JAX_LOCAL_DEVICE_IDS", "JAX_COORDINATOR_BIND_ADDRESS",
       "JAX_COORDINATOR_ADDRESS")  # of one process; others may have other values


def versions() -> dict[str, str]:
  """Versions of the package, jax and Python, without importing jax."""
  try:
    jax = metadata.version("jax")
  except metadata.PackageNotFoundError:
    jax = "not installed"
  return {"sparse_experts": VERSION, "jax": jax, "python": platform.python_version()}


def sources(*rooms: str) -> str:
  """A hash of the names and contents of the package's files; rooms: its folders and files that count."""
  root, total = pathlib.Path(__file__).parent, hashlib.sha256()
  for room in rooms:
    path = root / room
    for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
      total.update(f"{file.relative_to(root)} ".encode() + file.read_bytes())
  return total.hexdigest()


def builds() -> dict[str, str]:
  """What has to be the same in all processes of a run: versions, the package's files, what jax is told.

  Of the environment that is XLA_FLAGS and what begins with JAX_, except what names places and processes.
  """
  libraries = {name: metadata.version(name) for name in ("jaxlib", "flax", "optax", "numpy")}
  told = {name: value for name, value in sorted(os.environ.items()) if name.startswith(("JAX_", "XLA_FLAGS"))
          and name not in OWN and not name.endswith("_DIR")}
  return versions() | libraries | {"the files of sparse_experts": sources(".")[:12]} | told
