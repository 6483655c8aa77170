"""The version of the package, and of what a result depends on besides its config."""

import platform
from importlib import metadata

VERSION = "0.1.0"


def versions() -> dict[str, str]:
  """Versions of the package, jax and Python, without importing jax."""
  try:
    jax = metadata.version("jax")
  except metadata.PackageNotFoundError:
    jax = "not installed"
  return {"sparse_experts": VERSION, "jax": jax, "python": platform.python_version()}
