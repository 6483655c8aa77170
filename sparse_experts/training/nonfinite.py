"""Finds the layer in which a non-finite number first appears; runs only after one appeared."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from sparse_experts.models import Batch, Buffers, Model, Params
from sparse_experts.models.stack import Stack
from sparse_experts.models.template import fold


class _Watched(Stack):
  """A stack that runs layer by layer, not by a scan, and notes what is first not finite.

  That is a router's gates or losses, or else a layer's output.
  """

  def __init__(self, stack: Stack):
    vars(self).update(vars(stack))
    self.bad: str | None = None

  def __call__(self, params, buffers, x_BLD, context, *, key=None, **unused):
    def call(t, silent):
      def block(p, b, x_BLD, key):
        module = t.bind(p, b)
        if silent:  # the sparse FFN adds zero: a non-finite output then comes from before it
          module.ffn.edit = lambda routing: routing.replace(valid=jnp.zeros_like(routing.valid))
        return module(x_BLD, context, None, key)[:2]
      return jax.jit(block)

    run = {t: (call(t, False), call(t, True)) for templates in self.templates for t in templates}
    for layer in range(len(self.kinds)):
      s, _, i = self.where(layer)
      own = self.arrays(buffers, layer) if str(i) in buffers.get(str(s), {}) else {}
      arguments = self.arrays(params, layer), own, x_BLD, fold(key, layer)
      x_BLD, routings = run[self.templates[s][i]][0](*arguments)
      if self.bad is not None:
        continue
      for part, routing in routings.items():
        if _finite((routing.gate, routing.prob, routing.losses)):
          continue
        if part != "ffn" or _finite(run[self.templates[s][i]][1](*arguments)[0]):
          sparse = self.block(layer).sparse_parts[part]
          router = type(getattr(sparse, "router", None) or sparse).__name__
          self.bad = self.bad or f"in what router {router} of layer {self.part_name(layer, part)} says"
      if not _finite(x_BLD):
        self.bad = self.bad or f"in the output of layer {self.layer_name(layer)}"
    return x_BLD, {}, None


def _finite(tree: Any) -> bool:
  return all(bool(jnp.isfinite(a).all()) for a in jax.tree.leaves(tree))


def find(model: Model, params: Params, buffers: Buffers, batch: Batch, key: jax.Array) -> str:
  """A phrase for where a forward pass with the step's `key` first has a non-finite number."""
  watched = {name: _Watched(stack) for name, stack in model.stacks.items()}
  parts = model.parts | {name: model.parts[name] | {"blocks": stack} for name, stack in watched.items()}
  logits_BLV, _ = dataclasses.replace(model, parts=parts).apply(params, buffers, batch, key=key)
  for stack in watched.values():
    if stack.bad is not None:
      return f"first {stack.bad}"
  return "first in the logits" if not _finite(logits_BLV) else "in the backward pass only"
