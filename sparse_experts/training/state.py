"""The state of training, which is what a checkpoint holds."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from sparse_experts import partitioning
from sparse_experts.models import INIT_COMPILER_OPTIONS, Buffers, Model, Params
from sparse_experts.training.optimizer import state_axes


class TrainState(struct.PyTreeNode):
  """Everything that an update changes.

  `step` counts finished updates; with the config it determines the data and the noise of the next one.
  `buffers`: state of routers that gradients do not touch, {layer: ...} as the model holds it.
  """

  step: jax.Array | np.ndarray
  params: Params
  buffers: Buffers
  opt_state: optax.OptState


def init_state(model: Model, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
  """The state before the first step; `make_state` jits it so that every device makes its own part."""
  params, buffers = model.init(key)
  return TrainState(jnp.zeros((), jnp.int32), params, buffers, optimizer.init(params))


def abstract_state(model: Model, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh,
                   fsdp: bool) -> TrainState:
  """Shapes, types and shardings on `mesh`, nothing computed: the target of a restore onto any mesh."""
  return place(*describe_state(model, optimizer), mesh, fsdp)


def describe_state(model: Model, optimizer: optax.GradientTransformation) -> tuple[TrainState, list]:
  """(shapes and types of the state, logical axes of its leaves in order)."""
  shapes = jax.eval_shape(lambda: init_state(model, optimizer, jax.random.key(0)))
  partitioning.check_ranks(model.axes, shapes.params)
  buffers = jax.tree.map(lambda x: (None,) * len(x.shape), shapes.buffers)
  axes = shapes.replace(step=(), params=model.axes, buffers=buffers,
                        opt_state=state_axes(shapes.opt_state, shapes.params, model.axes))
  # One flat list: an empty state of optax is an empty tuple, which looks like the axes of a scalar.
  return shapes, [a for a in jax.tree.leaves(axes, is_leaf=partitioning.is_axes) if partitioning.is_axes(a)]


def place(shapes: TrainState, flat_axes: list, mesh: jax.sharding.Mesh, fsdp: bool) -> TrainState:
  """The shapes of `describe_state` with shardings on `mesh`."""
  leaves, tree = jax.tree.flatten(shapes)
  placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s) for x, s in zip(
      leaves, partitioning.shardings(flat_axes, mesh, fsdp), strict=True)]
  return jax.tree.unflatten(tree, placed)


def shardings(abstract: TrainState) -> TrainState:
  return jax.tree.map(lambda x: x.sharding, abstract)


def make_state(model: Model, optimizer: optax.GradientTransformation, seed: int, abstract: TrainState,
               given: Any = None) -> TrainState:
  """The state before the first step, the same values on every mesh.

  given: an `init_from.Given`, whose values replace initial ones; those are then not drawn.
  """

  def init(key, moved, arrays):
    own = init_state(model, optimizer, key)
    return given.put_into(own, arrays | moved) if given else own

  moved = given.moved if given else {}
  arrays = {path: x for path, x in given.arrays.items() if path not in moved} if given else {}
  init = jax.jit(init, out_shardings=shardings(abstract), donate_argnums=1,
                 compiler_options=INIT_COMPILER_OPTIONS if jax.default_backend() == "cpu" else None)
  return init(jax.random.key(seed), moved, arrays)
