"""The control for what routers have learnt: the trained model with the routers of its first step."""

import dataclasses

import jax

from sparse_experts import partitioning
from sparse_experts.config import seeds
from sparse_experts.models.names import by_path
from sparse_experts.training.run import Run


def untrained(run: Run, step: int) -> Run:
  """`run` with parameters and state of all routers as its seed draws them, under another step's number.

  All else is trained, so the first sparse layer routes the same vectors as the trained one, and later ones
  nearly: what differs is what the routers have learnt. At its initialisation the whole model would differ in
  the vectors too. In a run with `init_from` these are the seed's routers, not those it started from.
  """
  model = run.abstract_model("train")

  def draw(key):
    params, buffers = model.init(key)
    return {path: x for path, x in by_path(params).items() if "router" in path}, buffers

  axes = by_path(partitioning.shardings(model.axes, run.mesh, run.config.mesh.fsdp))
  drawn, buffers = jax.eval_shape(draw, jax.random.key(0))
  everywhere = partitioning.replicated(run.mesh)
  where = {path: axes[path] for path in drawn}, jax.tree.map(lambda _: everywhere, buffers)
  drawn, buffers = jax.jit(draw, out_shardings=where)(jax.random.key(seeds(run.config)["init"]))
  leaves = [drawn.get(path, x) for path, x in by_path(run.params).items()]
  params = jax.tree.unflatten(jax.tree.structure(run.params), leaves)
  return dataclasses.replace(run, step=step, params=params, buffers=buffers)
