"""A Vision Transformer: patches with learned positions, LayerNorm blocks with biases, any MLP sparse."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sparse_experts.models.attention import Attention, dropout, matmul, normal
from sparse_experts.models.blocks import Context
from sparse_experts.models.model import Batch, Model, Routings
from sparse_experts.models.template import Tree, fold
from sparse_experts.moe import Tokens
from sparse_experts.moe.experts import get_activation
from sparse_experts.partitioning import constrain

_uniform = jax.nn.initializers.xavier_uniform


class LayerNorm(nnx.Module):
  """(x - mean) / deviation * scale + bias, in float32."""

  def __init__(self, d: int):
    self.scale = nnx.Param(jnp.ones(d, jnp.float32), axes=("embed",))
    self.bias = nnx.Param(jnp.zeros(d, jnp.float32), axes=("embed",))

  def __call__(self, x_BLD: jax.Array) -> jax.Array:
    x = x_BLD.astype(jnp.float32)
    x -= x.mean(-1, keepdims=True)
    x *= jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    return (x * self.scale[...][None, None] + self.bias[...][None, None]).astype(x_BLD.dtype)


class PatchEmbedding(nnx.Module):
  """Images -> tokens: a linear map of each patch, the class token in front, a learned position added.

  Tokens go along rows of patches; a patch's pixels are flattened row by row, colours last, so the weight is
  the kernel of a convolution of stride `patch_size`.
  """

  def __init__(self, d: int, patch_size: int, tokens: int, class_token: bool, *, key: jax.Array):
    self.patch_size, fan_in = patch_size, patch_size * patch_size * 3
    self.w = nnx.Param(normal(fold(key, "w"), (fan_in, d), 1 / fan_in), axes=(None, "embed"))
    self.b = nnx.Param(jnp.zeros(d), axes=("embed",))
    self.cls = nnx.Param(jnp.zeros(d), axes=("embed",)) if class_token else None
    self.position = nnx.Param(normal(fold(key, "position"), (tokens, d), 0.02**2), axes=("length", "embed"))

  def __call__(self, image_BHWC: jax.Array, dtype: Any) -> jax.Array:
    B, H, W, C = image_BHWC.shape
    p = self.patch_size
    patch_BLI = image_BHWC.astype(dtype).reshape(B, H // p, p, W // p, p, C).swapaxes(2, 3).reshape(
        B, (H // p) * (W // p), p * p * C)
    x_BLD = matmul(patch_BLI, self.w[...]) + self.b[...].astype(dtype)[None, None]
    if self.cls is not None:
      cls_B1D = jnp.broadcast_to(self.cls[...].astype(dtype), (B, 1, x_BLD.shape[-1]))
      x_BLD = jnp.concatenate([cls_B1D, x_BLD], axis=1)
    return constrain(x_BLD + self.position[...].astype(dtype)[None], "batch", "length", "embed")


class ViTAttention(Attention):
  """Self-attention, softmax(q.k / sqrt(P)) v, with biases on queries, keys, values and output."""

  def __init__(self, d: int, num_heads: int, head_dim: int, *, dropout: float = 0.0, key: jax.Array):
    self.num_heads, self.head_dim, self.dropout = num_heads, head_dim, dropout
    inner, split = num_heads * head_dim, (d, num_heads, head_dim)
    weight = lambda name: nnx.Param(
        _uniform()(fold(key, name), (d, inner)).reshape(split), axes=("embed", "heads", "head"))
    bias = lambda: nnx.Param(jnp.zeros(inner), axes=("heads",))
    self.query, self.key, self.value = weight("query"), weight("key"), weight("value")
    self.query_bias, self.key_bias, self.value_bias = bias(), bias(), bias()
    self.out = nnx.Param(_uniform()(fold(key, "out"), (inner, d)).reshape(num_heads, head_dim, d),
                         axes=("heads", "head", "embed"))
    self.out_bias = nnx.Param(jnp.zeros(d), axes=("embed",))

  @jax.named_scope("attention")
  def __call__(self, x_BLD: jax.Array, mask_BLM: jax.Array | None = None,
               key: jax.Array | None = None) -> jax.Array:
    """`mask_BLM` True: the query may look there; None: everywhere."""
    B, L, D = x_BLD.shape
    H, P = self.num_heads, self.head_dim

    def project(weight, bias):
      y_BLF = matmul(x_BLD, weight[...].reshape(D, H * P)) + bias[...].astype(x_BLD.dtype)[None, None]
      return constrain(y_BLF.reshape(B, L, H, P), "batch", "length", "heads", "head")

    q_BLHP, k_BMHP, v_BMHP = (project(*pair) for pair in (
        (self.query, self.query_bias), (self.key, self.key_bias), (self.value, self.value_bias)))
    score_BHLM = jnp.einsum("blhp,bmhp->bhlm", q_BLHP, k_BMHP, preferred_element_type=jnp.float32)
    if mask_BLM is not None:
      score_BHLM = jnp.where(mask_BLM[:, None], score_BHLM, jnp.finfo(jnp.float32).min)
    prob_BHLM = dropout(jax.nn.softmax(score_BHLM * P**-0.5, axis=-1), self.dropout, key)
    y_BLHP = jnp.einsum("bhlm,bmhp->blhp", prob_BHLM.astype(x_BLD.dtype), v_BMHP)
    y_BLD = matmul(y_BLHP.reshape(B, L, H * P), self.out[...].reshape(H * P, D))
    return constrain(y_BLD + self.out_bias[...].astype(x_BLD.dtype)[None, None], "batch", "length", "embed")


class ViTFeedForward(nnx.Module):
  """act(x w_in + b_in) w_out + b_out."""

  def __init__(self, d: int, hidden: int, activation: str, *, dropout: float = 0.0, key: jax.Array):
    self.activation, self.dropout = activation, dropout
    self.w_in = nnx.Param(_uniform()(fold(key, "w_in"), (d, hidden)), axes=("embed", "mlp"))
    self.b_in = nnx.Param(jnp.zeros(hidden), axes=("mlp",))
    self.w_out = nnx.Param(_uniform()(fold(key, "w_out"), (hidden, d)), axes=("mlp", "embed"))
    self.b_out = nnx.Param(jnp.zeros(d), axes=("embed",))

  @jax.named_scope("dense_ffn")
  def __call__(self, x_BLD: jax.Array, key: jax.Array | None = None) -> jax.Array:
    bias = lambda b: b[...].astype(x_BLD.dtype)[None, None]
    h_BLF = get_activation(self.activation)[0](matmul(x_BLD, self.w_in[...]) + bias(self.b_in))
    h_BLF = dropout(constrain(h_BLF, "batch", "length", "mlp"), self.dropout, key)
    return matmul(h_BLF, self.w_out[...]) + bias(self.b_out)


class ViTBlock(nnx.Module):
  """x + attention(norm(x)), then x + MLP(norm(x)), the MLP dense or a sparse layer."""

  def __init__(self, m: Any, hidden: int, sparse: nnx.Module | None, *, key: jax.Array):
    self.dropout, self.is_sparse = m.dropout, sparse is not None
    self.attention_norm, self.ffn_norm = LayerNorm(m.embed_dim), LayerNorm(m.embed_dim)
    self.attention = ViTAttention(
        m.embed_dim, m.num_heads, m.head_dim, dropout=m.dropout, key=fold(key, "attention"))
    self.ffn = sparse if self.is_sparse else ViTFeedForward(
        m.embed_dim, hidden, m.activation, dropout=m.dropout, key=fold(key, "ffn"))

  @property
  def sparse_parts(self) -> dict[str, nnx.Module]:
    """As of a `Block`."""
    return {"ffn": self.ffn} if self.is_sparse else {}

  def __call__(self, x_BLD: jax.Array, context: Context, cache: None = None, key: jax.Array | None = None):
    """(x_BLD, routings by the part that is sparse, None), as a `Block`; there is no cache."""
    def add(y_BLD, name):
      return constrain(x_BLD + dropout(y_BLD, self.dropout, fold(key, name)), "batch", "length", "embed")

    y_BLD = self.attention(self.attention_norm(x_BLD), context.mask_BLM, fold(key, "attention"))
    x_BLD = add(y_BLD, "attention_out")
    h_BLD = self.ffn_norm(x_BLD)
    if not self.is_sparse:
      return add(self.ffn(h_BLD, fold(key, "ffn")), "ffn_out"), {}, None
    y_BLD, routing = self.ffn(h_BLD, context.tokens, key=fold(key, "ffn"), edits=context.edits.get("ffn"))
    return add(y_BLD, "ffn_out"), {"ffn": routing}, None


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
    """What the head reads, also called pre-logits."""
    if self.hidden_w is None:
      return x_BD
    w_DR, b_R = (a[...].astype(x_BD.dtype) for a in (self.hidden_w, self.hidden_b))
    return jnp.tanh(x_BD @ w_DR + b_R[None])

  def logits(self, x_BD: jax.Array) -> jax.Array:
    w_DV = self.w[...].astype(x_BD.dtype)
    return jnp.einsum("bd,dv->bv", x_BD, w_DV, preferred_element_type=jnp.float32) + self.b[...][None]


@dataclasses.dataclass(frozen=True, eq=False)
class ViT(Model):
  """parts: embedding, encoder {blocks, norm}, head. Dosovitskiy et al. 2020; sparse: Riquelme et al. 2021.

  A batch has `images` [B, H, W, 3] in -1 to 1 and `weights` [B], 0 for a row that is padding.
  """

  tokens: int = dataclasses.field(kw_only=True)  # of an image

  def apply(self, params: Tree, buffers: Tree, batch: Batch, key: jax.Array | None = None,
            trace: bool = False, edits: dict[str, Any] | None = None) -> tuple[jax.Array, Routings]:
    """(logits_BV float32, routing per sparse layer); without a key no noise and no dropout."""
    x_BD, routings = self.features(params, buffers, batch, key, trace, edits)
    with jax.named_scope("head"):
      return constrain(self.parts["head"].bind(params["head"]).logits(x_BD), "batch", None), routings

  def features(self, params: Tree, buffers: Tree, batch: Batch, key: jax.Array | None = None,
               trace: bool = False, edits: dict[str, Any] | None = None) -> tuple[jax.Array, Routings]:
    """(what the head reads of each image: feature_BD, routing per sparse layer)."""
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

  def length(self, layer: str, batch: Batch) -> int:
    del layer, batch
    return self.tokens
