"""A sparse layer of 512 experts takes a step of SGD: `python tests/moe/golden_scale.py OUT.npz DATA EXPERT`.

Each process of a run does so on its part of a mesh of DATA x EXPERT devices; the first writes what came out.
"""

import sys

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from sparse_experts import partitioning, processes
from sparse_experts.moe import Experts, MoELayer, TopKRouter

ROWS, TOKENS, DIM, WIDTH, EXPERTS = 64, 16, 16, 16, 512
DISPATCHES = {"scatter": 1.25, "ragged": None}  # capacity factor; None: dropless


def layer_of(dispatch):
  router = TopKRouter(DIM, EXPERTS, 2, rngs=nnx.Rngs(0))
  router.w[...] *= 20  # uneven loads: at capacity 1.25 some tokens are dropped
  experts = Experts(EXPERTS, DIM, WIDTH, "swiglu", init_scale=4.0, rngs=nnx.Rngs(1))
  return MoELayer(router, experts, dispatch, TOKENS, DISPATCHES[dispatch], min_capacity=1)


def step(graphdef, state, x, dy):
  """The parameters after a step on a linear loss plus the router's; its output, loss and what was kept."""

  def loss(state):
    y, routing = nnx.merge(graphdef, state)(x)
    return (y * dy).sum(), (y, routing.kept)

  (value, (y, kept)), grads = jax.value_and_grad(loss, has_aux=True)(state)
  return jax.tree.map(lambda w, g: w - 0.1 * g, state, grads), grads, value, y, kept


def main(out, *axes):
  processes.join()
  mesh = partitioning.make_mesh(*map(int, axes), 1)
  found = {}
  for dispatch in DISPATCHES:
    graphdef, state = nnx.split(layer_of(dispatch))
    arrays = [np.asarray(jax.random.normal(jax.random.key(i), (ROWS, TOKENS, DIM))) for i in (5, 6)]
    with partitioning.use(mesh):
      put = lambda v: v.replace(jax.device_put(np.asarray(v[...]), partitioning.shardings(v.axes, mesh)))
      state = jax.tree.map(put, state, is_leaf=lambda v: isinstance(v, nnx.Variable))
      arrays = jax.device_put(arrays, partitioning.batch_sharding(mesh))
      assert all(len(shard.data) == ROWS // mesh.size for shard in arrays[0].addressable_shards)
      made = jax.jit(step, static_argnums=0)(graphdef, state, *arrays)
    whole = multihost_utils.process_allgather(made, tiled=True)
    leaves = jax.tree.leaves_with_path(whole)
    found |= {dispatch + jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
  if jax.process_index() == 0:
    np.savez(out, processes=jax.process_count(), devices=jax.device_count(), **found)


if __name__ == "__main__":
  main(*sys.argv[1:])
