"""Estimates a train step's memory per device on a mesh from shapes alone, without compiling it."""

import collections
import math
from typing import Any, NamedTuple

import jax

from sparse_experts.aot import program as aot
from sparse_experts.config import ConfigDict, replaced
from sparse_experts.models import build
from sparse_experts.training.selection import select, trained
from sparse_experts.training.step import make_objective


class Kept(NamedTuple):
  """Bytes of a micro-batch on all devices together, which forward keeps for the backward pass.

  between: until the end of the backward pass. within: of a layer that is recomputed (`model.remat`), while
  its gradient is computed; the mean over layers.
  """

  between: float
  within: float


def kept(shapes: aot.Shapes, config: ConfigDict) -> Kept:
  """What jax's own derivative keeps, as if no operation were fused; the weights themselves excluded."""
  between = _residuals(shapes, config, shapes.model)
  if not config.model.remat:
    return Kept(between, 0.0)
  plain = replaced(config, {"model.remat": False})
  all_layers = _residuals(shapes, plain, build(plain, shapes.tokenizer.vocab_size, "train"))
  layers = sum(len(stack.kinds) for stack in shapes.model.stacks.values())
  return Kept(between, max(0.0, all_layers - between) / layers)


def peak(plan: aot.Plan, kept: Kept) -> float:
  """Bytes per device: the step's arguments, gradients, and what is kept of the rows of a device.

  Within a layer the width of activations is cut over `model`, between layers it is not. Left out: weights
  that fsdp gathers, buffers of exchanges, cotangents; so it is mostly below what the compiler needs.
  """
  parts, mesh = plan.arguments(), plan.config.mesh
  gradients = parts["parameters"] * (2 if plan.config.train.accumulate > 1 else 1)
  activations = (kept.between + kept.within / mesh.model) / (mesh.data * mesh.expert)
  return sum(parts.values()) + gradients + activations


def _residuals(shapes: aot.Shapes, config: ConfigDict, model: Any) -> float:
  objective, state = make_objective(model, config), shapes.state
  mask = trained(config, state.params)
  moving = select(mask, state.params)
  frozen = select(jax.tree.map(lambda of: not of, mask), state.params)
  rows = config.train.batch_size // config.train.accumulate
  batch = {name: jax.ShapeDtypeStruct((rows, *a.shape), a.dtype) for name, a in shapes.batch.items()}
  pull = lambda moving, frozen, *rest: jax.vjp(
      lambda moving: objective(moving, frozen, *rest), moving, has_aux=True)[1]
  key = jax.eval_shape(lambda: jax.random.key(0))
  arrays = jax.tree.leaves(jax.eval_shape(pull, moving, frozen, state.buffers, batch, key))
  sizes = lambda arrays: collections.Counter((a.shape, a.dtype) for a in arrays)
  held = sizes(arrays) - sizes(jax.tree.leaves(state.params))
  return sum(n * math.prod(shape) * dtype.itemsize for (shape, dtype), n in held.items())
