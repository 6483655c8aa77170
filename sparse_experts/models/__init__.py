"""Transformers whose feed-forward layers may be sparse: `build(config, vocab_size)` makes one."""

from sparse_experts.models.build import build, user_routers
from sparse_experts.models.counts import describe
from sparse_experts.models.model import INIT_COMPILER_OPTIONS, Model, SparseLayer
from sparse_experts.models.sparse import PHASES

__all__ = ["INIT_COMPILER_OPTIONS", "PHASES", "Model", "SparseLayer", "build", "describe", "user_routers"]
