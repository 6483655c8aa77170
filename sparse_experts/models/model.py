"""What both models share: their parts, their parameters as pure dicts, embedding, head and caches."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sparse_experts.errors import UserError
from sparse_experts.models.attention import dropout, normal
from sparse_experts.models.stack import Stack
from sparse_experts.models.template import Tree, fold
from sparse_experts.moe import Routing, Tokens
from sparse_experts.partitioning import constrain

# For `jax.jit(model.init, ...)`, which runs once: XLA:CPU takes about 0.8 s to optimise each parameter's
# draw at its default level, 10 s for a small model, and 2 s so. The values are the same.
INIT_COMPILER_OPTIONS = {"xla_backend_optimization_level": 1}

Batch = dict[str, Any]
Routings = dict[str, Routing]


class Embedding(nnx.Module):
  """Token ids -> rows of a table; as a tied head, x . row * D^-0.5."""

  def __init__(self, vocab_size: int, d: int, *, key: jax.Array):
    self.table = nnx.Param(normal(fold(key, "table"), (vocab_size, d), 1.0), axes=("vocab", "embed"))

  def __call__(self, id_BL: jax.Array, mask_BL: jax.Array, dtype: Any) -> jax.Array:
    """Padding enters as zero, whatever its row holds."""
    # With fsdp the table is gathered, as other weights are, rather than the ids and then the vectors.
    table_VD = constrain(self.table[...], "vocab", "embed")
    x_BLD = table_VD[jnp.asarray(id_BL)].astype(dtype)
    return constrain(jnp.where(mask_BL[..., None], x_BLD, jnp.zeros_like(x_BLD)), "batch", "length", "embed")

  def logits(self, x_BLD: jax.Array) -> jax.Array:
    table_VD = self.table[...].astype(x_BLD.dtype) * self.table.shape[1]**-0.5
    return jnp.einsum("bld,vd->blv", x_BLD, table_VD, preferred_element_type=jnp.float32)


class Head(nnx.Module):
  """An untied output layer."""

  def __init__(self, d: int, vocab_size: int, *, key: jax.Array):
    self.w = nnx.Param(normal(fold(key, "w"), (d, vocab_size), 1 / d), axes=("embed", "vocab"))

  def logits(self, x_BLD: jax.Array) -> jax.Array:
    w_DV = self.w[...].astype(x_BLD.dtype)
    return jnp.einsum("bld,dv->blv", x_BLD, w_DV, preferred_element_type=jnp.float32)


def make_tokens(id_BL: jax.Array, segment_BL: jax.Array, domain_B: jax.Array | None = None) -> Tokens:
  """What routers may know. Sequences are numbered over the whole batch; a task is the row's domain."""
  row_B1 = jnp.arange(id_BL.shape[0], dtype=jnp.int32)[:, None]
  task = None if domain_B is None else jnp.broadcast_to(jnp.asarray(domain_B)[:, None], id_BL.shape)
  return Tokens(mask=segment_BL > 0, id=jnp.asarray(id_BL), task=task,
                sequence=row_B1 * (id_BL.shape[1] + 1) + segment_BL)


def same_segment(query_BL: jax.Array, key_BM: jax.Array) -> jax.Array:
  """Padding (segment 0) looks at padding only, so every row of the mask has a place to look at."""
  return query_BL[:, :, None] == key_BM[:, None, :]


def causal(query_L: jax.Array, key_M: jax.Array) -> jax.Array:
  return (key_M[None, :] <= query_L[:, None])[None]


@dataclasses.dataclass(frozen=True)
class SparseLayer:
  """What there is to know of a sparse layer without running it."""

  loss_weights: dict[str, float]
  causality: str  # what a token's output may depend on, drops included
  num_experts: int
  k: int
  group_size: int
  capacity: int | None  # slots per expert and group; None: dropless
  routing_causality: str  # the same, drops aside
  router: nnx.Module | None  # without arrays; None for a layer that assigns no token

  def group_length(self, tokens: int) -> int:
    """Tokens of a group when the layer is called on `tokens` of them."""
    return min(self.group_size, tokens) if self.capacity is None else self.group_size


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
  """A model without its arrays: `init` makes them, `apply` runs on them.

  `parts` is a nested dict of Templates and Stacks, and params have its layout. `apply`'s `edits` hold, for
  every sparse layer by name, [B, L] arrays for the `edit` that the model was built with.
  """

  parts: Tree
  dtype: Any  # of activations
  dropout: float
  phase: str
  objective: str = "tokens"  # what the logits are of: tokens, or an image's classes (softmax, sigmoid)

  def init(self, key: jax.Array) -> tuple[Tree, Tree]:
    """(params, buffers): float32 parameters, and what gradients do not touch; keys are folded by name."""

    def walk(parts, key):
      if not isinstance(parts, dict):
        return parts.init(key)
      made = {name: walk(part, fold(key, name)) for name, part in parts.items()}
      return {n: p for n, (p, _) in made.items()}, {n: b for n, (_, b) in made.items() if b}

    return walk(self.parts, key)

  @property
  def axes(self) -> Tree:
    """Logical axes of params: stacked ones start with `layers`."""
    walk = lambda part: {n: walk(p) for n, p in part.items()} if isinstance(part, dict) else part.axes
    return walk(self.parts)

  @property
  def stacks(self) -> dict[str, Stack]:
    return {name: part["blocks"] for name, part in self.parts.items() if isinstance(part, dict)}

  @property
  def sparse_layers(self) -> dict[str, SparseLayer]:
    """By layer name: "decoder/01"."""
    layers = [item for stack in self.stacks.values() for item in stack.sparse_layers.items()]
    return {name: SparseLayer(
        layer.loss_weights, layer.causality, layer.num_experts, layer.k, layer.group_size,
        layer.capacity(layer.group_size), layer.routing_causality, layer.router) for name, layer in layers}

  def row_quantum(self, record: Batch, shards: int = 1) -> int:
    """Batches of a multiple of this many rows make whole routing groups on each of `shards` devices.

    record: any one, or a batch; its last axis tells the length of a row.
    """
    quantum = shards
    for name, layer in self.sparse_layers.items():
      length, tokens = self.length(name, record), layer.group_size * shards
      quantum = math.lcm(quantum, tokens // math.gcd(tokens, length))
    return quantum

  def length(self, layer: str, batch: Batch) -> int:
    """Tokens that the layer of that name sees of a row."""
    return batch["encoder_inputs" if layer.startswith("encoder") else "decoder_inputs"].shape[-1]

  def next_buffers(self, params: Tree, buffers: Tree, sums: dict[str, Any]) -> Tree:
    """Buffers after an optimizer step that led to `params`.

    `sums[layer name]` has "metrics" and "stats" of the layer's routings, summed over the step.
    """
    new = dict(buffers)
    for name, stack in self.stacks.items():
      if name in buffers:
        blocks = stack.next_buffers(params[name]["blocks"], buffers[name]["blocks"], sums)
        new[name] = {**buffers[name], "blocks": blocks}
    return new

  def _embed(self, params: Tree, id_BL, mask_BL, key) -> jax.Array:
    x_BLD = self.parts["embedding"].bind(params["embedding"])(id_BL, mask_BL, self.dtype)
    return dropout(x_BLD, self.dropout, key)

  def _run(self, name: str, params: Tree, buffers: Tree, x_BLD, context, *, caches=None, key=None,
           trace=False, edits=None):
    """A stack and its final norm."""
    key = fold(key, name)
    x_BLD, routings, caches = self.parts[name]["blocks"](
        params[name]["blocks"], buffers.get(name, {}).get("blocks", {}), x_BLD, context, caches=caches,
        key=fold(key, "blocks"), trace=trace, edits=edits)
    x_BLD = self.parts[name]["norm"].bind(params[name]["norm"])(x_BLD)
    return dropout(x_BLD, self.dropout, fold(key, "norm")), routings, caches

  @jax.named_scope("head")
  def _logits(self, params: Tree, x_BLD: jax.Array) -> jax.Array:
    name = "head" if "head" in self.parts else "embedding"
    return constrain(self.parts[name].bind(params[name]).logits(x_BLD), "batch", "length", "vocab")

  def init_cache(self, batch_size: int, length: int) -> Tree:
    """An empty cache for `length` tokens a row."""
    if self.phase != "dropless" and self.sparse_layers:
      raise ValueError(f"cached decoding needs build(config, vocab_size, 'dropless'), not '{self.phase}'")
    stack = self.stacks["decoder"]
    for name, layer in self.sparse_layers.items():
      if name.startswith("decoder") and layer.routing_causality != "self":
        raise UserError(
            f"layer {name}: router {type(layer.router).__name__} depends on other tokens (causality"
            f" '{layer.routing_causality}'), which cached decoding does not show it; choose one of causality"
            " 'self' to sample")

    def zeros(template, repeats):
      kept = template.module.attention.kept_shapes
      return {"self": tuple(jnp.zeros((repeats, batch_size, length, *shape), self.dtype) for shape in kept)}

    layers = {str(s): {str(i): zeros(t, stack.segments[s][1]) for i, t in enumerate(templates)}
              for s, templates in enumerate(stack.templates)}
    return {"layers": layers, "mask": jnp.zeros((batch_size, length), bool),
            "position": jnp.zeros(batch_size, jnp.int32), "index": jnp.zeros((), jnp.int32)}


def advance(cache: Tree, mask_BL: jax.Array) -> tuple[Tree, dict[str, jax.Array]]:
  """The cache after these tokens (layers aside), and where they stand in it.

  Rows advance together; a row whose prompt is shorter is padded on the left by masked tokens.
  """
  index, length = cache["index"], cache["mask"].shape[1]
  seen_BM = jax.lax.dynamic_update_slice_in_dim(cache["mask"], mask_BL, index, axis=1)
  query_L = index + jnp.arange(mask_BL.shape[1], dtype=jnp.int32)
  count_BL = jnp.cumsum(mask_BL, axis=1, dtype=jnp.int32)
  new = {"mask": seen_BM, "index": index + mask_BL.shape[1], "position": cache["position"] + count_BL[:, -1]}
  key_M = jnp.arange(length, dtype=jnp.int32)
  return new, {"position_BL": jnp.maximum(cache["position"][:, None] + count_BL - 1, 0), "query_L": query_L,
               "key_M": key_M, "mask_BLM": seen_BM[:, None, :] & causal(query_L, key_M)}

