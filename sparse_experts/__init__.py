"""Sparse mixtures of experts in JAX: `load_config`, `train` and `load` are what a notebook needs."""

from typing import TYPE_CHECKING, Any

from sparse_experts import config as config
from sparse_experts.config import load_config
from sparse_experts.version import VERSION as __version__

if TYPE_CHECKING:
  from sparse_experts.config import ConfigDict
  from sparse_experts.moe import Router
  from sparse_experts.training.run import Run

__all__ = ["__version__", "config", "load", "load_config", "train"]

# The functions import when they are called: whoever imports the package may not want jax yet.


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
