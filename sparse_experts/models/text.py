"""Embedding, head, segment masks and decoding caches of language models."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from sparse_experts.config import ConfigDict
from sparse_experts.errors import UserError
from sparse_experts.models.blocks import Context, RMSNorm
from sparse_experts.models.functions import dropout, normal
from sparse_experts.models.model import Model
from sparse_experts.models.template import Batch, Buffers, Params, Routings, Template, Tree, fold
from sparse_experts.moe import Tokens
from sparse_experts.partitioning import constrain


class Embedding(nnx.Module):
  """Token ids -> rows of a table; as a tied head, x . row * D^-0.5."""

  def __init__(self, vocab_size: int, d: int, *, key: jax.Array):
    self.table = nnx.Param(normal(fold(key, "table"), (vocab_size, d), 1.0), axes=("vocab", "embed"))

  def __call__(self, id_BL: jax.Array, mask_BL: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Padding enters as zero, whatever its row holds."""
    # With fsdp the table is gathered, as other weights are; otherwise ids and vectors would be.
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
  """Tokens for routers. Sequences are numbered over the whole batch; a task is the row's domain."""
  row_B1 = jnp.arange(id_BL.shape[0], dtype=jnp.int32)[:, None]
  task = None if domain_B is None else jnp.broadcast_to(jnp.asarray(domain_B)[:, None], id_BL.shape)
  return Tokens(mask=segment_BL > 0, id=jnp.asarray(id_BL), task=task,
                sequence=row_B1 * (id_BL.shape[1] + 1) + segment_BL)


def same_segment(query_BL: jax.Array, key_BM: jax.Array) -> jax.Array:
  """Padding (segment 0) attends to padding only, so every query has a key to attend to."""
  return query_BL[:, :, None] == key_BM[:, None, :]


def causal(query_L: jax.Array, key_M: jax.Array) -> jax.Array:
  return (key_M[None, :] <= query_L[:, None])[None]


def text_parts(m: ConfigDict, vocab_size: int) -> Tree:
  """The embedding, and the head unless it is tied."""
  parts: Tree = {"embedding": Template(lambda key: Embedding(vocab_size, m.embed_dim, key=key))}
  if not m.tied_head:
    parts["head"] = Template(lambda key: Head(m.embed_dim, vocab_size, key=key))
  return parts


def final_norm(m: ConfigDict) -> Template:
  return Template(lambda key: RMSNorm(m.embed_dim, m.norm_eps))


class TextModel(Model):
  """A model whose stack `decoder` writes text."""

  def visible(self, stack: str, length: int) -> float:
    return (length + 1) / 2 if stack == "decoder" else length

  def row_flops(self, params: Params, lengths: dict[str, int]) -> dict[str, float]:
    table = params["head"]["w"] if "head" in params else params["embedding"]["table"]
    return {"head": 2 * math.prod(table.shape) * lengths["decoder"]}

  def length(self, layer: str, batch: Batch) -> int:
    """Tokens that the layer of that name sees of a row."""
    return batch["encoder_inputs" if layer.startswith("encoder") else "decoder_inputs"].shape[-1]

  def _embed(self, params: Params, id_BL, mask_BL, key) -> jax.Array:
    x_BLD = self.parts["embedding"].bind(params["embedding"])(id_BL, mask_BL, self.dtype)
    return dropout(x_BLD, self.dropout, key)

  @jax.named_scope("head")
  def _logits(self, params: Params, x_BLD: jax.Array) -> jax.Array:
    name = "head" if "head" in self.parts else "embedding"
    return constrain(self.parts[name].bind(params[name]).logits(x_BLD), "batch", "length", "vocab")

  def _context(self, params: Params, name: str, *, query_L: jax.Array, key_M: jax.Array,
               **fields: Any) -> Context:
    """The context of queries and keys at these places, with the stack's relative bias if it has a table.

    The table is read by place in the row: within a segment that is the distance of positions.
    """
    part, bias_HLM = self.parts[name].get("position_bias"), None
    if part is not None:
      bias_HLM = part.bind(params[name]["position_bias"])(query_L, key_M)
    return Context(query_L=query_L, key_M=key_M, bias_HLM=bias_HLM, **fields)

  def _rows(self, name: str, params: Params, buffers: Buffers, batch: Batch, key: jax.Array | None = None,
            trace: bool = False, edits: Tree | None = None, **fields: Any) -> tuple[jax.Array, Routings]:
    """The output of the stack `name` for whole rows; `fields` are of its context."""
    id_BL = batch[f"{name}_inputs"]
    segment_BL = jnp.asarray(batch["encoder_segments" if name == "encoder" else "segments"])
    place_L, mask_BLM = jnp.arange(id_BL.shape[1]), same_segment(segment_BL, segment_BL)
    context = self._context(
        params, name, mask_BLM=mask_BLM & causal(place_L, place_L) if name == "decoder" else mask_BLM,
        tokens=make_tokens(id_BL, segment_BL, batch.get("domain")), query_L=place_L, key_M=place_L, **fields)
    embedding = f"{name}_embedding" if len(self.stacks) > 1 else "embedding"
    x_BLD = self._embed(params, id_BL, segment_BL > 0, fold(key, embedding))
    x_BLD, routings, _ = self._run(name, params, buffers, x_BLD, context, key=key, trace=trace, edits=edits)
    return x_BLD, routings

  def decode(self, params: Params, buffers: Buffers, cache: Tree, id_BL: jax.Array,
             mask_BL: jax.Array | None = None, *, encoded: Tree | None = None) -> tuple[jax.Array, Tree]:
    """(logits_BLV, cache) after appending L tokens to each row: a whole prompt, or the token last drawn.

    `mask_BL` False: padding, on the left of shorter prompts. encoded: of an encoder-decoder, what `encode`
    gave; the first token of a row is then BOS.
    """
    mask_BL = jnp.ones(id_BL.shape, bool) if mask_BL is None else jnp.asarray(mask_BL)
    (new, at), caches = advance(cache, mask_BL), cache["layers"]
    context = self._context(params, "decoder", tokens=make_tokens(id_BL, mask_BL.astype(jnp.int32)),
                            index=cache["index"], **at)
    if encoded is not None:
      mask_B1S = encoded["mask"][:, None]
      context = context.replace(cross_mask_BLS=jnp.broadcast_to(mask_B1S, (*id_BL.shape, mask_B1S.shape[2])))
      caches = {s: {i: {**layer, **encoded["layers"][s][i]} for i, layer in positions.items()}
                for s, positions in caches.items()}
    x_BLD = self._embed(params, id_BL, mask_BL, None)
    x_BLD, _, layers = self._run("decoder", params, buffers, x_BLD, context, caches=caches)
    return self._logits(params, x_BLD), {**new, "layers": layers}

  def init_cache(self, batch_size: int, length: int) -> Tree:
    """An empty cache for `length` tokens a row."""
    if self.phase != "dropless" and self.sparse_layers:
      raise ValueError(f"cached decoding needs build(config, vocab_size, 'dropless'), not '{self.phase}'")
    stack = self.stacks["decoder"]
    for name, layer in self.sparse_layers.items():
      if name.startswith("decoder") and layer.routing_causality != "self":
        raise UserError(
            f"layer {name}: router {type(layer.router).__name__} depends on other tokens (causality"
            f" '{layer.routing_causality}'), which cached decoding lacks; to sample, choose a router of"
            " causality 'self'")

    def zeros(template, repeats):
      kept = template.module.attention.kept_shapes
      return {"self": tuple(jnp.zeros((repeats, batch_size, length, *shape), self.dtype) for shape in kept)}

    layers = {str(s): {str(i): zeros(t, stack.segments[s][1]) for i, t in enumerate(templates)}
              for s, templates in enumerate(stack.templates)}
    return {"layers": layers, "mask": jnp.zeros((batch_size, length), bool),
            "position": jnp.zeros(batch_size, jnp.int32), "index": jnp.zeros((), jnp.int32)}


def advance(cache: Tree, mask_BL: jax.Array) -> tuple[Tree, dict[str, jax.Array]]:
  """(the cache after these tokens without its layers, their positions and mask in it).

  Rows advance together; a shorter prompt is padded on the left by masked tokens.
  """
  index, length = cache["index"], cache["mask"].shape[1]
  seen_BM = jax.lax.dynamic_update_slice_in_dim(cache["mask"], mask_BL, index, axis=1)
  query_L = index + jnp.arange(mask_BL.shape[1], dtype=jnp.int32)
  count_BL = jnp.cumsum(mask_BL, axis=1, dtype=jnp.int32)
  new = {"mask": seen_BM, "index": index + mask_BL.shape[1], "position": cache["position"] + count_BL[:, -1]}
  key_M = jnp.arange(length, dtype=jnp.int32)
  return new, {"position_BL": jnp.maximum(cache["position"][:, None] + count_BL - 1, 0), "query_L": query_L,
               "key_M": key_M, "mask_BLM": seen_BM[:, None, :] & causal(query_L, key_M)}

