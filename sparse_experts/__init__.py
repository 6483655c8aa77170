"""Sparse mixtures of experts in JAX: `load_config`, `train` and `load` are what a notebook needs."""

from typing import TYPE_CHECKING, Any

from sparse_experts.version import VERSION as __version__

if TYPE_CHECKING:
  from sparse_experts import config as config
  from sparse_experts.config import ConfigDict, load_config
  from sparse_experts.moe import Router
  from sparse_experts.training.run import Run

__all__ = ["__version__", "config", "load", "load_config", "train"]

# Imported when they are used: whoever imports the package may not want jax yet, and the command line handles
# Ctrl-C before it imports anything that takes long.


def __getattr__(name: str) -> Any:
  if name not in ("config", "load_config"):
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  import sparse_experts.config as config

  return config if name == "config" else config.load_config


def train(config: "ConfigDict", workdir: str, *, router: "Router | None" = None, data: Any = None,
          profile: int = 0, watch: bool = False) -> "Run":
  """Trains a config in a work directory, or resumes there: `training.loop.train`."""
  from sparse_experts.training import loop

  return loop.train(config, workdir, router=router, data=data, profile=profile, watch=watch)


def load(workdir: str, step: int | None = None, *, config: "ConfigDict | None" = None,
         router: "Router | None" = None) -> "Run":
  """A trained run, to evaluate, sample or call: `training.run.load`."""
  from sparse_experts.training import run

  return run.load(workdir, step, config=config, router=router)
