"""Sparse expert models in JAX. For notebooks `config.default_config()`, `train` and `load`; see README.md."""

from typing import Any

__all__ = ["load", "train"]


def train(*args: Any, **keys: Any) -> Any:
  """`training.loop.train`: trains a config in a work directory, or goes on there."""
  from sparse_experts.training.loop import train  # here, for whoever imports the package wants no jax yet

  return train(*args, **keys)


def load(*args: Any, **keys: Any) -> Any:
  """`training.run.load`: a trained run, to look at or to call."""
  from sparse_experts.training.run import load

  return load(*args, **keys)
