"""Expert parallelism: any dispatch on a mesh, with the only collectives of the package."""

from sparse_experts.moe.parallel.run import by_group, run, spread

__all__ = ["by_group", "run", "spread"]
