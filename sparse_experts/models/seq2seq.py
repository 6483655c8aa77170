"""An encoder-decoder as T5.1.1: relative position bias, RMSNorm before each sub-layer, any layers sparse."""


import jax
import jax.numpy as jnp

from sparse_experts.config import ConfigDict
from sparse_experts.models.attention import RelativeBias
from sparse_experts.models.layers import attention_arguments, make_stack, text_design
from sparse_experts.models.sparse import SparseSpec, refuse_future
from sparse_experts.models.stack import Stack
from sparse_experts.models.template import Batch, Buffers, Params, Routings, Template, Tree
from sparse_experts.models.text import TextModel, final_norm, same_segment, text_parts


class Seq2Seq(TextModel):
  """parts: embedding, encoder and decoder {blocks, norm, position_bias}, and head unless tied."""

  fields = ("encoder_inputs", "encoder_segments", "decoder_inputs", "segments")

  @classmethod
  def build(cls, config: ConfigDict, vocab_size: int, spec: SparseSpec) -> "Seq2Seq":
    """`config.model.decoder` overrides the decoder's routing fields."""
    m = config.model
    attention, own = attention_arguments(m, rope=None), spec.override(m.decoder)
    encoder = make_stack(m, "encoder", spec, text_design(m, attention, depth_layers=tuple(m.depth_layers)))
    decoder = make_stack(m, "decoder", own, text_design(m, attention, cross=True))
    refuse_future(own, decoder)

    def parts(stack: Stack, bidirectional: bool) -> Tree:
      bias = Template(lambda key: RelativeBias(
          m.num_heads, bidirectional, m.embed_dim, **m.relative_bias, key=key))
      return {"blocks": stack, "norm": final_norm(m), "position_bias": bias}

    return cls.make(m, spec, text_parts(m, vocab_size) | {
        "encoder": parts(encoder, True), "decoder": parts(decoder, False)})

  def lengths(self, length: int, target_length: int | None) -> dict[str, int]:
    return {"encoder": length, "decoder": target_length or length}

  def apply(self, params: Params, buffers: Buffers, batch: Batch, key: jax.Array | None = None,
            trace: bool = False, edits: Tree | None = None) -> tuple[jax.Array, Routings]:
    """(logits_BLV float32, routing per sparse layer); without a key no noise and no dropout."""
    encoded_BSD, routings = self._rows("encoder", params, buffers, batch, key, trace, edits)
    cross_mask_BLS = same_segment(jnp.asarray(batch["segments"]), jnp.asarray(batch["encoder_segments"]))
    x_BLD, decoder_routings = self._rows("decoder", params, buffers, batch, key, trace, edits,
                                         encoded_BSD=encoded_BSD, cross_mask_BLS=cross_mask_BLS)
    return self._logits(params, x_BLD), routings | decoder_routings

  def encode(self, params: Params, buffers: Buffers, batch: Batch) -> Tree:
    """What `decode` needs of the encoder: its output as keys and values of each decoder layer.

    One sequence a row, so only the padding of `encoder_segments` matters.
    """
    encoded_BSD, _ = self._rows("encoder", params, buffers, batch)
    layers = self.stacks["decoder"].each(
        params["decoder"]["blocks"], buffers.get("decoder", {}).get("blocks", {}),
        lambda block: {"cross": block.cross.keys_values(encoded_BSD)})
    return {"layers": layers, "mask": jnp.asarray(batch["encoder_segments"]) > 0}
