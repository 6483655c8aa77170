"""A decoder-only language model: RoPE or a bias per layer, RMSNorm before sub-layers, any layers sparse."""


import jax
import jax.numpy as jnp

from sparse_experts.config import ConfigDict
from sparse_experts.models.layers import attention_arguments, make_stack, text_design
from sparse_experts.models.rope import Rope
from sparse_experts.models.sparse import SparseSpec, refuse_future
from sparse_experts.models.template import Batch, Buffers, Params, Routings, Tree
from sparse_experts.models.text import TextModel, final_norm, text_parts


class Decoder(TextModel):
  """parts: embedding, decoder {blocks, norm}, and head unless tied."""

  fields = ("decoder_inputs", "segments", "positions")

  @classmethod
  def build(cls, config: ConfigDict, vocab_size: int, spec: SparseSpec) -> "Decoder":
    m = config.model
    attention = attention_arguments(m, None if m.layer_bias else Rope(**m.rope))
    stack = make_stack(m, "decoder", spec, text_design(m, attention, layer_bias=m.layer_bias))
    refuse_future(spec, stack)
    parts = text_parts(m, vocab_size) | {"decoder": {"blocks": stack, "norm": final_norm(m)}}
    return cls.make(m, spec, parts)

  def lengths(self, length: int, target_length: int | None) -> dict[str, int]:
    return {"decoder": length}

  def apply(self, params: Params, buffers: Buffers, batch: Batch, key: jax.Array | None = None,
            trace: bool = False, edits: Tree | None = None) -> tuple[jax.Array, Routings]:
    """(logits_BLV float32, routing per sparse layer); without a key no noise and no dropout."""
    x_BLD, routings = self._rows("decoder", params, buffers, batch, key, trace, edits,
                                 position_BL=jnp.asarray(batch["positions"]))
    return self._logits(params, x_BLD), routings
