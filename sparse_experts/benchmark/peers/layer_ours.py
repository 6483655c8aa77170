"""Our layer; read by `serve.py` and `compile_layer.py`.

Variants on a CPU are `ragged`, dropless, and `einsum` with a capacity factor, "einsum 1.25": the one-hot
products of Flaxformer (Switch, ST-MoE) and of V-MoE, with empty slots and dropped rows.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparse_experts import partitioning
from sparse_experts.benchmark.layer import (
    Workload,
    floor_programs,
    layer_programs,
    make_experts,
    routing_facts,
)
from sparse_experts.moe import Experts, MoELayer, TopKRouter

PACKAGES = ("jax", "flax", "numpy")


def make_router(shapes: dict[str, Any]) -> TopKRouter:
  """Mixtral's: a softmax over all experts, gates of the two largest that add up to 1; no losses."""
  return TopKRouter(shapes["embed_dim"], shapes["num_experts"], shapes["k"], gate="renormalized",
                    load_balance_weight=0.0, z_weight=0.0, rngs=nnx.Rngs(0))


def make_layer(workload: Workload, dispatch: str, arrays: dict[str, np.ndarray]) -> MoELayer:
  w, experts = workload, make_experts(workload)
  for name, array in (("w_gate", "gate_EDF"), ("w_in", "in_EDF"), ("w_out", "out_EFD")):
    getattr(experts, name).set_value(jnp.asarray(arrays[array]))
  router = make_router(dataclasses.asdict(w))
  router.w.set_value(jnp.asarray(arrays["router_DE"]))
  return MoELayer(router, experts, dispatch, w.group_size, w.capacity_factor, capacity_rule="megablocks")


def make(shapes: dict[str, Any], arrays: dict[str, np.ndarray], variant: str) -> tuple:
  """For `serve.py`."""
  dispatch, _, factor = variant.partition(" ")
  workload = Workload(shapes["tokens"], shapes["embed_dim"], shapes["expert_dim"], shapes["num_experts"],
                      shapes["k"], "swiglu", float(factor) if factor else None, shapes["length"])
  layer = make_layer(workload, dispatch, arrays)
  x_GTD = jnp.asarray(arrays["x_TD"]).reshape(-1, shapes["length"], shapes["embed_dim"])
  step = layer_programs(layer, x_GTD)["forward_backward"]
  (dy_GTD, dlosses), *rest = step.arguments
  step = dataclasses.replace(step, arguments=(
      (jnp.asarray(arrays["dy_TD"]).reshape(dy_GTD.shape), dlosses), *rest))
  floor = floor_programs(workload, layer.experts)["forward_backward"]

  def results():
    (y_GTD, _), _, (dx_GTD, _) = step()
    return (np.asarray(a).reshape(shapes["tokens"], -1) for a in (y_GTD, dx_GTD))

  return step, floor, results, routing_facts(layer, x_GTD)["dropped"]


def lower(shapes: dict[str, Any], devices: list[Any]) -> jax.stages.Lowered:
  """Forward and backward on a mesh of data and expert, for `compile_layer.py`."""
  mesh = partitioning.make_mesh(len(devices) // shapes["expert"], shapes["expert"], 1, devices)
  experts = lambda: Experts(shapes["num_experts"], shapes["embed_dim"], shapes["expert_dim"], "swiglu",
                            rngs=nnx.Rngs(0))
  layer = lambda: MoELayer(make_router(shapes), experts(), "ragged", shapes["length"])
  graphdef, state = nnx.eval_shape(lambda: nnx.split(layer()))
  put = lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
  state = jax.tree.map(lambda v: v.replace(put(v, partitioning.shardings(v.axes, mesh))), state,
                       is_leaf=lambda v: isinstance(v, nnx.Variable))
  rows = shapes["tokens"] // shapes["length"]
  x_BLD = jax.ShapeDtypeStruct((rows, shapes["length"], shapes["embed_dim"]), shapes["dtype"],
                               sharding=partitioning.batch_sharding(mesh))

  def gradients(state, x_BLD, dy_BLD):
    y_BLD, pull = jax.vjp(lambda state, x: nnx.merge(graphdef, state)(x)[0], state, x_BLD)
    return y_BLD, pull(dy_BLD)

  with partitioning.use(mesh):
    return jax.jit(gradients).lower(state, x_BLD, x_BLD)
