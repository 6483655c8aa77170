"""Sparse expert models in JAX. `load(workdir)` and `train(config, workdir)` for notebooks; see README.md."""

import importlib


def __getattr__(name: str):
  if name == "train":  # a package that can be called; nothing heavy is imported before it is
    return importlib.import_module("sparse_experts.train")
  if name == "load":
    return importlib.import_module("sparse_experts.train.run").load
  raise AttributeError(f"module 'sparse_experts' has no attribute '{name}'")
