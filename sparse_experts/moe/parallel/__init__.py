"""Expert parallelism: any dispatch on a mesh, with the only collectives of the package."""

from sparse_experts.moe.parallel.experts import ExchangedExperts
from sparse_experts.moe.parallel.gating_dropout import GatingDropout
from sparse_experts.moe.parallel.run import run
from sparse_experts.moe.parallel.shard import by_group, shard_experts
