"""An encoder-decoder as T5.1.1: relative position bias, RMSNorm before each sub-layer, any layers sparse."""

from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from sparse_experts.models.attention import RelativeBias
from sparse_experts.models.blocks import Context
from sparse_experts.models.layers import Design, attention_arguments, make_stack
from sparse_experts.models.model import Routings
from sparse_experts.models.sparse import SparseSpec, refuse_future
from sparse_experts.models.template import Batch, Buffers, Params, Template, Tree, fold
from sparse_experts.models.text import (
    TextModel,
    advance,
    causal,
    final_norm,
    make_tokens,
    same_segment,
    text_parts,
)


class Seq2Seq(TextModel):
  """parts: embedding, encoder and decoder {blocks, norm, position_bias}, and head unless tied."""

  @classmethod
  def build(cls, config: ConfigDict, vocab_size: int, spec: SparseSpec) -> "Seq2Seq":
    """`config.model.decoder` overrides the decoder's routing fields."""
    m = config.model
    attention, own = attention_arguments(m, rope=None), spec.override(m.decoder)
    encoder = Design(attention, depth_layers=tuple(m.depth_layers))
    stacks = {"encoder": make_stack(m, "encoder", spec, encoder),
              "decoder": make_stack(m, "decoder", own, Design(attention, cross=True))}
    refuse_future(own, stacks["decoder"])
    parts = text_parts(m, vocab_size)
    for name, stack in stacks.items():
      parts[name] = {"blocks": stack, "norm": final_norm(m), "position_bias": Template(
          lambda key, name=name: RelativeBias(m.num_heads, name == "encoder", m.embed_dim, key=key))}
    return cls.make(m, spec, parts)

  def lengths(self, length: int, target_length: int | None) -> dict[str, int]:
    return {"encoder": length, "decoder": target_length or length}

  def apply(self, params: Params, buffers: Buffers, batch: Batch, key: jax.Array | None = None,
            trace: bool = False, edits: dict[str, Any] | None = None) -> tuple[jax.Array, Routings]:
    """(logits_BLV float32, routing per sparse layer); without a key no noise and no dropout."""
    encoded_BSD, routings = self._encode(params, buffers, batch, key, trace, edits)
    id_BL, segment_BL = batch["decoder_inputs"], jnp.asarray(batch["segments"])
    place_L = jnp.arange(id_BL.shape[1])
    context = Context(
        mask_BLM=same_segment(segment_BL, segment_BL) & causal(place_L, place_L),
        tokens=make_tokens(id_BL, segment_BL, batch.get("domain")),
        bias_HLM=self._bias(params, "decoder", place_L, place_L), encoded_BSD=encoded_BSD,
        cross_mask_BLS=same_segment(segment_BL, jnp.asarray(batch["encoder_segments"])))
    x_BLD = self._embed(params, id_BL, segment_BL > 0, fold(key, "decoder_embedding"))
    x_BLD, decoder_routings, _ = self._run(
        "decoder", params, buffers, x_BLD, context, key=key, trace=trace, edits=edits)
    return self._logits(params, x_BLD), routings | decoder_routings

  def encode(self, params: Params, buffers: Buffers, batch: Batch) -> Tree:
    """What `decode` needs of the encoder: its output as keys and values of each decoder layer.

    One sequence a row, so only the padding of `encoder_segments` matters.
    """
    encoded_BSD, _ = self._encode(params, buffers, batch)
    layers = self.stacks["decoder"].each(
        params["decoder"]["blocks"], buffers.get("decoder", {}).get("blocks", {}),
        lambda block: {"cross": block.cross.keys_values(encoded_BSD)})
    return {"layers": layers, "mask": jnp.asarray(batch["encoder_segments"]) > 0}

  def decode(self, params: Params, buffers: Buffers, cache: Tree, id_BL: jax.Array,
             mask_BL: jax.Array | None = None, *, encoded: Tree) -> tuple[jax.Array, Tree]:
    """(logits_BLV, cache) after appending L tokens to each row; the first token of a row is BOS.

    `mask_BL` False: padding, on the left of shorter prompts.
    """
    mask_BL = jnp.ones(id_BL.shape, bool) if mask_BL is None else jnp.asarray(mask_BL)
    new, at = advance(cache, mask_BL)
    context = Context(
        mask_BLM=at["mask_BLM"], tokens=make_tokens(id_BL, mask_BL.astype(jnp.int32)),
        bias_HLM=self._bias(params, "decoder", at["query_L"], at["key_M"]),
        cross_mask_BLS=jnp.broadcast_to(encoded["mask"][:, None], (*id_BL.shape, encoded["mask"].shape[1])),
        index=cache["index"])
    caches = {s: {i: {**layer, **encoded["layers"][s][i]} for i, layer in positions.items()}
              for s, positions in cache["layers"].items()}
    x_BLD = self._embed(params, id_BL, mask_BL, None)
    x_BLD, _, layers = self._run("decoder", params, buffers, x_BLD, context, caches=caches)
    return self._logits(params, x_BLD), {**new, "layers": layers}

  def _encode(self, params, buffers, batch, key=None, trace=False, edits=None) -> tuple[jax.Array, Routings]:
    id_BS, segment_BS = batch["encoder_inputs"], jnp.asarray(batch["encoder_segments"])
    place_S = jnp.arange(id_BS.shape[1])
    context = Context(
        mask_BLM=same_segment(segment_BS, segment_BS),
        tokens=make_tokens(id_BS, segment_BS, batch.get("domain")),
        bias_HLM=self._bias(params, "encoder", place_S, place_S))
    x_BSD = self._embed(params, id_BS, segment_BS > 0, fold(key, "encoder_embedding"))
    x_BSD, routings, _ = self._run(
        "encoder", params, buffers, x_BSD, context, key=key, trace=trace, edits=edits)
    return x_BSD, routings

  def _bias(self, params: Params, name: str, query_L: jax.Array, key_M: jax.Array) -> jax.Array:
    """The stack's table, read by place in the row: within a segment that is the distance of positions."""
    return self.parts[name]["position_bias"].bind(params[name]["position_bias"])(query_L, key_M)
