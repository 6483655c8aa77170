"""Where a number that is not finite came from: looked for only when there is one."""

import copy
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from sparse_experts.models.stack import Stack
from sparse_experts.models.template import fold


class _Watched(Stack):
  """A stack that runs layer by layer, not by a scan, and notes the first output that is not finite."""

  def __init__(self, stack: Stack):
    vars(self).update(vars(stack))
    self.bad: str | None = None

  def __call__(self, params, buffers, x_BLD, context, *, key=None, **_):
    block = lambda t: jax.jit(lambda p, b, x_BLD, key: t.bind(p, b)(x_BLD, context, None, key)[0])
    run = {t: block(t) for templates in self.templates for t in templates}
    for layer in range(len(self.kinds)):
      s, _, i = self.where(layer)
      own = self.arrays(buffers, layer) if str(i) in buffers.get(str(s), {}) else {}
      x_BLD = run[self.templates[s][i]](self.arrays(params, layer), own, x_BLD, fold(key, layer))
      if self.bad is None and not bool(jnp.isfinite(x_BLD).all()):
        self.bad = self.layer_name(layer)
    return x_BLD, {}, None


def find(model: Any, params: Any, buffers: Any, batch: dict[str, jax.Array], key: jax.Array) -> str:
  """Where a forward pass with the step's `key` first leaves the finite numbers, in words."""
  parts = copy.copy(model.parts)
  watched = {name: _Watched(stack) for name, stack in model.stacks.items()}
  for name, stack in watched.items():
    parts[name] = {**parts[name], "blocks": stack}
  logits_BLV, _ = dataclasses.replace(model, parts=parts).apply(params, buffers, batch, key=key)
  for stack in watched.values():
    if stack.bad is not None:
      return f"first in the output of layer {stack.bad}"
  return "first in the logits" if not bool(jnp.isfinite(logits_BLV).all()) else "in the backward pass only"
