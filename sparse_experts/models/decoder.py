"""A decoder-only language model: RoPE or a bias per layer, RMSNorm before sub-layers, any layers sparse."""

from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from sparse_experts.models.blocks import Context
from sparse_experts.models.layers import Design, attention_arguments, make_stack
from sparse_experts.models.model import Routings
from sparse_experts.models.rope import Rope
from sparse_experts.models.sparse import SparseSpec, refuse_future
from sparse_experts.models.template import Batch, Buffers, Params, Tree, fold
from sparse_experts.models.text import (
    TextModel,
    advance,
    causal,
    final_norm,
    make_tokens,
    same_segment,
    text_parts,
)


class Decoder(TextModel):
  """parts: embedding, decoder {blocks, norm}, and head unless tied."""

  @classmethod
  def build(cls, config: ConfigDict, vocab_size: int, spec: SparseSpec) -> "Decoder":
    m = config.model
    attention = attention_arguments(m, None if m.layer_bias else Rope(**m.rope))
    stack = make_stack(m, "decoder", spec, Design(attention, layer_bias=m.layer_bias))
    refuse_future(spec, stack)
    parts = text_parts(m, vocab_size) | {"decoder": {"blocks": stack, "norm": final_norm(m)}}
    return cls.make(m, spec, parts)

  def lengths(self, length: int, target_length: int | None) -> dict[str, int]:
    del target_length
    return {"decoder": length}

  def apply(self, params: Params, buffers: Buffers, batch: Batch, key: jax.Array | None = None,
            trace: bool = False, edits: dict[str, Any] | None = None) -> tuple[jax.Array, Routings]:
    """(logits_BLV float32, routing per sparse layer); without a key no noise and no dropout."""
    id_BL, segment_BL = batch["decoder_inputs"], jnp.asarray(batch["segments"])
    place_L = jnp.arange(id_BL.shape[1])
    context = Context(
        mask_BLM=same_segment(segment_BL, segment_BL) & causal(place_L, place_L),
        tokens=make_tokens(id_BL, segment_BL, batch.get("domain")),
        position_BL=jnp.asarray(batch["positions"]), query_L=place_L, key_M=place_L)
    x_BLD = self._embed(params, id_BL, segment_BL > 0, fold(key, "embedding"))
    x_BLD, routings, _ = self._run(
        "decoder", params, buffers, x_BLD, context, key=key, trace=trace, edits=edits)
    return self._logits(params, x_BLD), routings

  def decode(self, params: Params, buffers: Buffers, cache: Tree, id_BL: jax.Array,
             mask_BL: jax.Array | None = None) -> tuple[jax.Array, Tree]:
    """(logits_BLV, cache) after appending L tokens to each row: a whole prompt, or the token last drawn.

    `mask_BL` False: padding, on the left of shorter prompts.
    """
    mask_BL = jnp.ones(id_BL.shape, bool) if mask_BL is None else jnp.asarray(mask_BL)
    new, at = advance(cache, mask_BL)
    context = Context(mask_BLM=at["mask_BLM"], tokens=make_tokens(id_BL, mask_BL.astype(jnp.int32)),
                      position_BL=at["position_BL"], index=cache["index"], query_L=at["query_L"],
                      key_M=at["key_M"])
    x_BLD = self._embed(params, id_BL, mask_BL, None)
    x_BLD, _, layers = self._run("decoder", params, buffers, x_BLD, context, caches=cache["layers"])
    return self._logits(params, x_BLD), {**new, "layers": layers}
