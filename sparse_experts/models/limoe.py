"""LIMoE: one tower of sparse layers for images and texts, trained contrastively (Mustafa et al. 2022)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from sparse_experts.config import ConfigDict, image_tokens
from sparse_experts.models.blocks import Context
from sparse_experts.models.functions import dropout, normal
from sparse_experts.models.sparse import SparseSpec
from sparse_experts.models.template import Batch, Buffers, Params, Routings, Template, Tree, fold
from sparse_experts.models.text import Embedding, same_segment
from sparse_experts.models.vit import PatchEmbedding, Tower, make_tower
from sparse_experts.moe import Tokens
from sparse_experts.partitioning import constrain

IMAGE, TEXT = 0, 1  # modalities as routers see them: `tokens.task`
_SCALE = 1 / 0.07  # of similarities before the first step (Radford et al. 2021, CLIP)


class TextEmbedding(Embedding):
  """Token ids -> rows of a table, a learned position added."""

  def __init__(self, vocab_size: int, d: int, length: int, *, key: jax.Array):
    super().__init__(vocab_size, d, key=key)
    self.position = nnx.Param(normal(fold(key, "position"), (length, d), 0.02**2), axes=("length", "embed"))

  def __call__(self, id_BL: jax.Array, mask_BL: jax.Array, dtype: DTypeLike) -> jax.Array:
    return super().__call__(id_BL, mask_BL, dtype) + self.position[...].astype(dtype)[None]


class Comparison(nnx.Module):
  """Projects mean tokens of images and texts to unit vectors, a matrix each; a learned temperature."""

  def __init__(self, d: int, representation_dim: int, *, key: jax.Array):
    r = representation_dim or d
    self.image = nnx.Param(normal(fold(key, "image"), (d, r), 1 / d), axes=("embed", None))
    self.text = nnx.Param(normal(fold(key, "text"), (d, r), 1 / d), axes=("embed", None))
    self.log_scale = nnx.Param(jnp.full(1, math.log(_SCALE), jnp.float32), axes=(None,))

  def vectors(self, x_BLD: jax.Array, mask_BL: jax.Array, w: nnx.Param) -> jax.Array:
    """In float32; zero for a row without a real token."""
    total_BD = jnp.where(mask_BL[..., None], x_BLD, jnp.zeros_like(x_BLD)).sum(1, dtype=jnp.float32)
    v_BR = total_BD / jnp.maximum(mask_BL.sum(-1, dtype=jnp.float32), 1.0)[:, None] @ w[...]
    return v_BR * jax.lax.rsqrt((v_BR * v_BR).sum(-1, keepdims=True) + 1e-12)

  def logits(self, image_BR: jax.Array, text_CR: jax.Array) -> jax.Array:
    """Similarity of each image with each text, times the learned scale."""
    return jnp.exp(self.log_scale[...])[:, None] * (image_BR @ text_CR.T)


@dataclasses.dataclass(frozen=True, eq=False)
class LIMoE(Tower):
  """parts: image, text (embeddings), encoder {blocks, norm}, head.

  A batch has `images` [B, H, W, 3] in -1 to 1, `texts` [B, L] ids, `text_mask` [B, L] and `weights` [B], 0
  for a row that is padding. A row is one sequence, image tokens first, and each modality attends to itself
  only; so a routing group of whole rows holds tokens of both, which claim the same slots.
  """

  fields = ("images", "texts", "text_mask", "weights")
  embedding = "image"
  image_tokens: int = dataclasses.field(kw_only=True)

  @classmethod
  def build(cls, config: ConfigDict, vocab_size: int, spec: SparseSpec) -> "LIMoE":
    """vocab_size: of the texts' ids."""
    m, length = config.model, config.data.length
    patches = image_tokens(config)
    parts = {
        "image": Template(lambda key: PatchEmbedding(m.embed_dim, m.patch_size, patches, False, key=key)),
        "text": Template(lambda key: TextEmbedding(vocab_size, m.embed_dim, length, key=key)),
        "encoder": make_tower(m, spec),
        "head": Template(lambda key: Comparison(m.embed_dim, m.representation_dim, key=key))}
    return cls.make(m, spec, parts, tokens=patches + length, image_tokens=patches)

  def apply(self, params: Params, buffers: Buffers, batch: Batch, key: jax.Array | None = None,
            trace: bool = False, edits: Tree | None = None) -> tuple[jax.Array, Routings]:
    """(logits_BC float32 of image B with text C, routing per sparse layer), over the whole batch."""
    (image_BR, text_BR), routings = self.vectors(params, buffers, batch, key, trace, edits)
    with jax.named_scope("head"):
      logits_BC = self.parts["head"].bind(params["head"]).logits(image_BR, text_BR)
      return constrain(logits_BC, "batch", None), routings

  def vectors(self, params: Params, buffers: Buffers, batch: Batch, key: jax.Array | None = None,
              trace: bool = False, edits: Tree | None = None) -> tuple[tuple[jax.Array, jax.Array], Routings]:
    """((image_BR, text_BR), routing per sparse layer): unit vectors to be compared, in float32."""
    image, text, head = (self.parts[name].bind(params[name]) for name in ("image", "text", "head"))
    mask_BL, P = self.mask(batch), self.image_tokens
    image_BLD = image(jnp.asarray(batch["images"]), self.dtype)
    text_BLD = text(batch["texts"], mask_BL[:, P:], self.dtype)
    x_BLD = constrain(jnp.concatenate([image_BLD, text_BLD], axis=1), "batch", "length", "embed")
    x_BLD = dropout(x_BLD, self.dropout, fold(key, "embedding"))
    task_BL = jnp.broadcast_to(jnp.asarray(self.modality_L)[None], mask_BL.shape)
    segment_BL = jnp.where(mask_BL, 1 + task_BL, 0)
    row_B1 = jnp.arange(len(mask_BL), dtype=jnp.int32)[:, None]
    context = Context(
        mask_BLM=same_segment(segment_BL, segment_BL),
        tokens=Tokens(mask=mask_BL, sequence=2 * row_B1 + task_BL, task=task_BL))
    x_BLD, routings, _ = self._run(
        "encoder", params, buffers, x_BLD, context, key=key, trace=trace, edits=edits)
    with jax.named_scope("head"):
      return (head.vectors(x_BLD[:, :P], mask_BL[:, :P], head.image),
              head.vectors(x_BLD[:, P:], mask_BL[:, P:], head.text)), routings

  def mask(self, batch: Batch) -> jax.Array:
    """mask_BL: True for real tokens of real pairs."""
    real_B1 = (jnp.asarray(batch["weights"]) > 0)[:, None]
    image_BL = jnp.broadcast_to(real_B1, (len(real_B1), self.image_tokens))
    return jnp.concatenate([image_BL, real_B1 & jnp.asarray(batch["text_mask"])], axis=1)

  def visible(self, stack: str, length: int) -> float:
    """Each modality attends to itself."""
    return (self.image_tokens**2 + (self.tokens - self.image_tokens)**2) / length

  @property
  def modality_L(self) -> np.ndarray:
    """IMAGE or TEXT for each token of a row."""
    return np.where(np.arange(self.tokens) < self.image_tokens, np.int32(IMAGE), np.int32(TEXT))
