"""The interface of all models: parts, parameters as pure dicts, and what counting asks of a family."""

import dataclasses
import math
import os
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sparse_experts.config import ConfigDict
from sparse_experts.models.functions import dropout
from sparse_experts.models.sparse import SparseSpec
from sparse_experts.models.stack import Stack
from sparse_experts.models.template import Batch, Buffers, Params, Routings, Tree, fold
from sparse_experts.moe import MoELayer, Router

# For `jax.jit(model.init, ...)`, which runs once: XLA:CPU takes about 0.8 s to optimise each parameter's
# draw at its default level, 10 s for a small model, and 2 s so. The values are the same. A level that the
# user's XLA_FLAGS set stays, as the tests' 0, which halves it again but draws large arrays slowly.
_LEVEL = "xla_backend_optimization_level"
INIT_COMPILER_OPTIONS = {} if _LEVEL in os.environ.get("XLA_FLAGS", "") else {_LEVEL: 1}


@dataclasses.dataclass(frozen=True)
class SparseLayer:
  """Static facts of a sparse layer."""

  loss_weights: dict[str, float]
  causality: str  # what a token's output may depend on, drops included
  num_experts: int
  k: int
  group_size: int
  capacity: int | None  # slots per expert and group; None: dropless
  routing_causality: str  # the same, without drops
  router: Router | None  # without arrays; None for a layer that assigns no token
  num_heads: int = 1  # parts of each token, which it routes one by one; groups are of whole tokens
  layer_losses: str = "sum"  # how its losses meet those of other layers, if the config does not say

  def group_length(self, tokens: int) -> int:
    """Tokens of a group when the layer is called on `tokens` of them."""
    return min(self.group_size, tokens) if self.capacity is None else self.group_size


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
  """A model without its arrays: `init` makes them, `apply` runs on them.

  `parts` is a nested dict of Templates and Stacks, and params have its layout. `apply`'s `edits` hold, for
  every sparse layer by name, [B, L] arrays for the `edit` that the model was built with.
  """

  fields: ClassVar[tuple[str, ...]]  # of a batch that `apply` reads

  parts: Tree
  dtype: DTypeLike  # of activations
  dropout: float
  phase: str

  @classmethod
  def build(cls, config: ConfigDict, vocab_size: int, spec: SparseSpec) -> "Model":
    """The family's model of a config, its sparse layers of `spec`."""
    raise NotImplementedError

  @classmethod
  def make(cls, m: ConfigDict, spec: SparseSpec, parts: Tree, **fields: Any) -> Self:
    return cls(parts, jnp.dtype(m.dtype), m.dropout, spec.phase, **fields)

  def init(self, key: jax.Array) -> tuple[Params, Buffers]:
    """(params, buffers): float32 parameters, and what gradients do not touch; keys are folded by name."""

    def walk(parts, key):
      if not isinstance(parts, dict):
        return parts.init(key)
      made = {name: walk(part, fold(key, name)) for name, part in parts.items()}
      return {n: p for n, (p, _) in made.items()}, {n: b for n, (_, b) in made.items() if b}

    return walk(self.parts, key)

  def apply(self, params: Params, buffers: Buffers, batch: Batch, key: jax.Array | None = None,
            trace: bool = False, edits: Tree | None = None) -> tuple[jax.Array, Routings]:
    """(logits, routing per sparse layer); without a key no noise and no dropout."""
    raise NotImplementedError

  @property
  def axes(self) -> Tree:
    """Logical axes of params: stacked ones start with `layers`."""

    def walk(part: Any) -> Tree:
      return {n: walk(p) for n, p in part.items()} if isinstance(part, dict) else part.axes

    return walk(self.parts)

  @property
  def stacks(self) -> dict[str, Stack]:
    return {name: part["blocks"] for name, part in self.parts.items() if isinstance(part, dict)}

  @property
  def sparse_layers(self) -> dict[str, SparseLayer]:
    """By layer name: "decoder/01"."""

    def facts(layer: MoELayer) -> SparseLayer:
      assert layer.group_size is not None  # as layers of a model have it
      router = layer.router
      return SparseLayer(
          layer.loss_weights, layer.causality, layer.num_experts, layer.k,
          layer.group_size // layer.num_heads, layer.capacity(layer.group_size), layer.routing_causality,
          router, layer.num_heads,
          "sum" if router is None else router.convention(router.k).layer_losses)

    return {name: facts(layer) for stack in self.stacks.values()
            for name, layer in stack.sparse_layers.items()}

  def row_quantum(self, record: Batch, shards: int = 1) -> int:
    """Batches of a multiple of this many rows make whole routing groups on each of `shards` devices.

    record: any record, or a batch; its last axis is the length of a row.
    """
    quantum = shards
    for name, layer in self.sparse_layers.items():
      length, tokens = self.length(name, record), layer.group_size * shards
      quantum = math.lcm(quantum, tokens // math.gcd(tokens, length))
    return quantum

  def length(self, layer: str, batch: Batch) -> int:
    """Tokens that the layer of that name sees of a row."""
    raise NotImplementedError

  def lengths(self, length: int, target_length: int | None) -> dict[str, int]:
    """Stack -> tokens of a row, where rows have `length` tokens of text and, if they do, as many targets."""
    raise NotImplementedError

  def visible(self, stack: str, length: int) -> float:
    """Positions that a query of the stack sees in a row of `length`, on average."""
    return length

  def row_flops(self, params: Params, lengths: dict[str, int]) -> dict[str, float]:
    """FLOPs of one row outside the stacks: `head`, and `embedding` where that is a product."""
    raise NotImplementedError

  def next_buffers(self, params: Params, buffers: Buffers, sums: dict[str, Any]) -> Tree:
    """Buffers after an optimizer step that led to `params`.

    `sums[layer name]` has "metrics" and "stats" of the layer's routings, summed over the step.
    """
    new = dict(buffers)
    for name, stack in self.stacks.items():
      if name in buffers:
        blocks = stack.next_buffers(params[name]["blocks"], buffers[name]["blocks"], sums)
        new[name] = {**buffers[name], "blocks": blocks}
    return new

  def _run(self, name: str, params: Params, buffers: Buffers, x_BLD, context, *, caches=None, key=None,
           trace=False, edits=None):
    """A stack and its final norm."""
    key = fold(key, name)
    x_BLD, routings, caches = self.parts[name]["blocks"](
        params[name]["blocks"], buffers.get(name, {}).get("blocks", {}), x_BLD, context, caches=caches,
        key=fold(key, "blocks"), trace=trace, edits=edits)
    x_BLD = self.parts[name]["norm"].bind(params[name]["norm"])(x_BLD)
    return dropout(x_BLD, self.dropout, fold(key, "norm")), routings, caches
