"""Transformers whose feed-forward layers may be sparse: `build(config, vocab_size)` makes one."""

from sparse_experts.models.build import build, user_routers
from sparse_experts.models.counts import describe
from sparse_experts.models.model import INIT_COMPILER_OPTIONS, Model, SparseLayer
from sparse_experts.models.sparse import PHASES
from sparse_experts.models.template import Batch, Buffers, Params, Routings
