"""Vision Transformer: patches with learned positions, LayerNorm blocks with biases, any MLP sparse."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from sparse_experts.config import ConfigDict, image_tokens
from sparse_experts.models.blocks import Context, LayerNorm
from sparse_experts.models.functions import dropout, matmul, normal
from sparse_experts.models.layers import Design, make_stack
from sparse_experts.models.model import Model
from sparse_experts.models.sparse import SparseSpec
from sparse_experts.models.template import Batch, Buffers, Params, Routings, Template, Tree, fold
from sparse_experts.moe import BiasedExperts, Tokens
from sparse_experts.partitioning import constrain


class PatchEmbedding(nnx.Module):
  """Images -> tokens: a linear map of each patch, the class token first, a learned position added.

  Tokens go along rows of patches; a patch's pixels are flattened row by row, colours last, so the weight is
  the kernel of a convolution of stride `patch_size`.
  """

  def __init__(self, d: int, patch_size: int, tokens: int, class_token: bool, *, key: jax.Array):
    self.patch_size, fan_in = patch_size, patch_size * patch_size * 3
    self.w = nnx.Param(normal(fold(key, "w"), (fan_in, d), 1 / fan_in), axes=(None, "embed"))
    self.b = nnx.Param(jnp.zeros(d), axes=("embed",))
    self.cls = nnx.Param(jnp.zeros(d), axes=("embed",)) if class_token else None
    self.position = nnx.Param(normal(fold(key, "position"), (tokens, d), 0.02**2), axes=("length", "embed"))

  def __call__(self, image_BHWC: jax.Array, dtype: DTypeLike) -> jax.Array:
    B, H, W, C = image_BHWC.shape
    p = self.patch_size
    patch_BLI = image_BHWC.astype(dtype).reshape(B, H // p, p, W // p, p, C).swapaxes(2, 3).reshape(
        B, (H // p) * (W // p), p * p * C)
    x_BLD = matmul(patch_BLI, self.w[...]) + self.b[...].astype(dtype)[None, None]
    if self.cls is not None:
      cls_B1D = jnp.broadcast_to(self.cls[...].astype(dtype), (B, 1, x_BLD.shape[-1]))
      x_BLD = jnp.concatenate([cls_B1D, x_BLD], axis=1)
    return constrain(x_BLD + self.position[...].astype(dtype)[None], "batch", "length", "embed")


class Classifier(nnx.Module):
  """tanh(x w + b) if there is a representation layer, then logits; the head's kernel starts at zero."""

  def __init__(self, d: int, representation_dim: int, num_classes: int, head_bias: float, *, key: jax.Array):
    r = representation_dim
    w_DR = normal(fold(key, "hidden_w"), (d, r), 1 / d) if r else None
    self.hidden_w = nnx.Param(w_DR, axes=("embed", None)) if r else None
    self.hidden_b = nnx.Param(jnp.zeros(r), axes=(None,)) if r else None
    self.w = nnx.Param(jnp.zeros((representation_dim or d, num_classes)), axes=("embed", "classes"))
    self.b = nnx.Param(jnp.full(num_classes, head_bias, jnp.float32), axes=("classes",))

  def features(self, x_BD: jax.Array) -> jax.Array:
    """Input of the head, also called pre-logits."""
    if self.hidden_w is None or self.hidden_b is None:
      return x_BD
    w_DR, b_R = self.hidden_w[...].astype(x_BD.dtype), self.hidden_b[...].astype(x_BD.dtype)
    return jnp.tanh(x_BD @ w_DR + b_R[None])

  def logits(self, x_BD: jax.Array) -> jax.Array:
    w_DV = self.w[...].astype(x_BD.dtype)
    return jnp.einsum("bd,dv->bv", x_BD, w_DV, preferred_element_type=jnp.float32) + self.b[...][None]


def make_tower(m: ConfigDict, spec: SparseSpec) -> Tree:
  """The part `encoder`: blocks with LayerNorm, and biases everywhere, and the final norm."""
  attention = dict(name="multi_head", num_heads=m.num_heads, head_dim=m.head_dim, rope=None, bias=True,
                   out_bias=True, scale_scores=True, init="xavier")
  design = Design(attention, dict(bias=True, init="xavier"), BiasedExperts, norm="layer")
  return {"blocks": make_stack(m, "encoder", spec, design),
          "norm": Template(lambda key: LayerNorm(m.embed_dim))}


@dataclasses.dataclass(frozen=True, eq=False)
class Tower(Model):
  """A model with one stack, `encoder`, that sees `tokens` of each row, some of them patches."""

  tokens: int = dataclasses.field(kw_only=True)
  embedding = "embedding"  # the part that embeds patches

  def length(self, layer: str, batch: Batch) -> int:
    return self.tokens

  def lengths(self, length: int, target_length: int | None) -> dict[str, int]:
    return {"encoder": self.tokens}

  def row_flops(self, params: Params, lengths: dict[str, int]) -> dict[str, float]:
    """The head reads a row once, and each patch is embedded."""
    size, embedding = lambda a: 2 * math.prod(a.shape), params[self.embedding]
    patches = embedding["position"].shape[0] - ("cls" in embedding)
    return {"head": sum(size(a) for a in params["head"].values() if a.ndim == 2),
            "embedding": size(embedding["w"]) * patches}


class ViT(Tower):
  """parts: embedding, encoder {blocks, norm}, head. Dosovitskiy et al. 2020; sparse: Riquelme et al. 2021.

  A batch has `images` [B, H, W, 3] in -1 to 1 and `weights` [B], 0 for a row that is padding.
  """

  fields = ("images", "weights")

  @classmethod
  def build(cls, config: ConfigDict, vocab_size: int, spec: SparseSpec) -> "ViT":
    """vocab_size: the number of classes."""
    m, tokens = config.model, image_tokens(config)
    parts = {
        "embedding": Template(lambda key: PatchEmbedding(
            m.embed_dim, m.patch_size, tokens, m.pool == "token", key=key)),
        "encoder": make_tower(m, spec),
        "head": Template(lambda key: Classifier(
            m.embed_dim, m.representation_dim, vocab_size, m.head_bias, key=key))}
    return cls.make(m, spec, parts, tokens=tokens)

  def apply(self, params: Params, buffers: Buffers, batch: Batch, key: jax.Array | None = None,
            trace: bool = False, edits: Tree | None = None) -> tuple[jax.Array, Routings]:
    """(logits_BV float32, routing per sparse layer); without a key no noise and no dropout."""
    x_BD, routings = self.features(params, buffers, batch, key, trace, edits)
    with jax.named_scope("head"):
      return constrain(self.parts["head"].bind(params["head"]).logits(x_BD), "batch", None), routings

  def features(self, params: Params, buffers: Buffers, batch: Batch, key: jax.Array | None = None,
               trace: bool = False, edits: Tree | None = None) -> tuple[jax.Array, Routings]:
    """(feature_BD, the head's input for each image; routing per sparse layer)."""
    image_BHWC = jnp.asarray(batch["images"])
    mask_BL = jnp.broadcast_to((jnp.asarray(batch["weights"]) > 0)[:, None], (len(image_BHWC), self.tokens))
    embedding, head = (self.parts[name].bind(params[name]) for name in ("embedding", "head"))
    x_BLD = dropout(embedding(image_BHWC, self.dtype), self.dropout, fold(key, "embedding"))
    row_BL = jnp.broadcast_to(jnp.arange(len(image_BHWC), dtype=jnp.int32)[:, None], mask_BL.shape)
    context = Context(mask_BLM=None, tokens=Tokens(mask=mask_BL, sequence=row_BL))
    x_BLD, routings, _ = self._run(
        "encoder", params, buffers, x_BLD, context, key=key, trace=trace, edits=edits)
    with jax.named_scope("head"):
      x_BD = x_BLD.mean(1) if embedding.cls is None else x_BLD[:, 0]
      return head.features(x_BD), routings
