"""Sparse expert models in JAX. For notebooks `config.default_config()`, `train` and `load`; see README.md."""

import importlib


def __getattr__(name: str):
  if name == "train":  # a package that can be called; nothing heavy is imported before it is
    return importlib.import_module("sparse_experts.train")
  if name == "load":
    return importlib.import_module("sparse_experts.train.run").load
  if name == "config":
    return importlib.import_module("sparse_experts.config")
  raise AttributeError(f"module 'sparse_experts' has no attribute '{name}'")
