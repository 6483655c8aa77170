"""Transformers whose feed-forward layers may be sparse: `build(config, vocab_size)` makes one."""

from sparse_experts.models.build import PHASES, build
from sparse_experts.models.model import Model, SparseLayer

__all__ = ["PHASES", "Model", "SparseLayer", "build"]
