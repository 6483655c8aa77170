"""Multi-head and grouped-query attention, with rotary positions or T5's relative bias."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparse_experts.models.functions import dropout, initial, matmul, normal, rms_norm
from sparse_experts.models.rope import Rope
from sparse_experts.models.template import fold
from sparse_experts.moe import MoELayer, Routing, Tokens
from sparse_experts.partitioning import constrain

QK_NORMS = ("none", "whole", "head")

KeysValues = tuple[jax.Array, jax.Array]


def project(x_BLD: jax.Array, weight: nnx.Param, bias: nnx.Param | None = None, norm: nnx.Param | None = None,
            eps: float = 1e-6) -> jax.Array:
  """All heads of x, x_BLHP: x w + bias, normed with the gain `norm`, if there are any."""
  D, H, P = weight.shape
  x_BLHP = matmul(x_BLD, weight[...].reshape(D, H * P)).reshape(*x_BLD.shape[:2], H, P)
  if bias is not None:
    x_BLHP += bias[...].astype(x_BLHP.dtype).reshape(1, 1, H, P)
  if norm is not None:
    x_BLHP = rms_norm(x_BLHP, norm[...], eps)
  return constrain(x_BLHP, "batch", "length", "heads", "head")


def relative_bucket(offset: jax.Array, bidirectional: bool, num_buckets: int = 32,
                    max_distance: int = 128) -> jax.Array:
  """T5's bucket of `offset` = key position - query position: exact for short distances, then logarithmic.

  Raffel et al. 2019, section 2.1. Without `bidirectional`, later keys share bucket 0. From `max_distance` on
  all keys share a bucket.
  """
  num_buckets = num_buckets // 2 if bidirectional else num_buckets
  ahead, distance = ((jnp.where(offset > 0, num_buckets, 0), jnp.abs(offset)) if bidirectional
                     else (jnp.zeros_like(offset), jnp.maximum(-offset, 0)))
  exact = num_buckets // 2
  n = np.arange(max_distance + 1)
  # At a whole number the floor must not depend on rounding.
  far = np.log2(np.maximum(n, 1) / exact) / np.log2(max_distance / exact) * (num_buckets - exact)
  far = np.minimum(exact + np.floor(far + 1e-9), num_buckets - 1)
  bucket_of = np.where(n < exact, n, far).astype(np.int32)
  return ahead + jnp.asarray(bucket_of)[jnp.minimum(distance, max_distance)]


class RelativeBias(nnx.Module):
  """One table per stack, used by the self-attention of all its layers."""

  def __init__(self, num_heads: int, bidirectional: bool, d: int, *, num_buckets: int = 32,
               max_distance: int = 128, key: jax.Array):
    self.bidirectional, self.num_buckets, self.max_distance = bidirectional, num_buckets, max_distance
    table_NH = normal(fold(key, "table"), (num_buckets, num_heads), 1 / d)
    self.table = nnx.Param(table_NH, axes=("buckets", "heads"))

  def __call__(self, query_L: jax.Array, key_M: jax.Array) -> jax.Array:
    """Position indices of queries and keys -> bias_HLM, float32."""
    bucket_LM = relative_bucket(
        key_M[None, :] - query_L[:, None], self.bidirectional, self.num_buckets, self.max_distance)
    return jnp.moveaxis(self.table[...][bucket_LM], -1, 0)


class Attention(nnx.Module):
  """Attention of x_BLD over keys and values of M positions.

  rope: queries and keys are rotated by their positions, and scores scaled by P^-0.5. None, as in T5: no scale
    (the query's initialisation holds it), and positions come as a bias added to the scores.
  num_kv_heads: heads of keys and values, each read by num_heads / num_kv_heads heads of queries (Ainslie
    et al. 2023, grouped-query attention). None: as many as of queries.
  qk_norm: RMSNorm with gain of queries and keys before the rotation: `whole`, over all heads together
    (OLMoE); `head`, each by itself, one gain for all (Qwen3); or `none`.
  bias: queries, keys and values have one (Qwen2).
  out_bias: the output has one too (ViT), and those of `bias` are stored flat, [H P].
  scale_scores: softmax(P^-0.5 q.k), the product scaled in float32, as in ViT.
  init: of the weights, `normal` or `xavier`.
  """

  def __init__(self, d: int, num_heads: int, head_dim: int, *, rope: Rope | None,
               num_kv_heads: int | None = None, qk_norm: str = "none", bias: bool = False,
               out_bias: bool = False, scale_scores: bool = False, init: str = "normal",
               norm_eps: float = 1e-6, dropout: float = 0.0, key: jax.Array):
    self.rope, self.num_heads, self.head_dim, self.dropout = rope, num_heads, head_dim, dropout
    self.num_kv_heads, self.norm_eps = num_kv_heads or num_heads, norm_eps
    self.scale_scores = scale_scores
    axes, heads = ("embed", "heads", "head"), {"query": num_heads} | dict.fromkeys(
        ("key", "value"), self.num_kv_heads)
    draw = lambda name, variance: nnx.Param(
        initial(init, fold(key, name), (d, heads[name], head_dim), variance), axes=axes)
    self.query = draw("query", 1 / d if rope else 1 / (d * head_dim))
    self.key, self.value = draw("key", 1 / d), draw("value", 1 / d)
    self.out = nnx.Param(
        initial(init, fold(key, "out"), (num_heads, head_dim, d), 1 / (num_heads * head_dim), inputs=2),
        axes=("heads", "head", "embed"))

    def zeros(name):
      flat = heads[name] * head_dim, axes[1:2]
      shape, names = flat if out_bias else ((heads[name], head_dim), axes[1:])
      return nnx.Param(jnp.zeros(shape), axes=names) if bias else None

    self.query_bias, self.key_bias, self.value_bias = zeros("query"), zeros("key"), zeros("value")
    self.out_bias = nnx.Param(jnp.zeros(d), axes=axes[:1]) if out_bias else None
    gain = {
        "none": lambda name: None,
        "whole": lambda name: nnx.Param(jnp.ones((heads[name], head_dim)), axes=axes[1:]),
        "head": lambda name: nnx.Param(jnp.ones(head_dim), axes=axes[2:]),
    }[qk_norm]
    self.query_norm, self.key_norm = gain("query"), gain("key")

  @property
  def kept_shapes(self) -> tuple[tuple[int, ...], ...]:
    """Shapes of the arrays that `keys_values` makes of one position: the cache of decoding."""
    return ((self.num_kv_heads, self.head_dim),) * 2

  @property
  def flops_per_key(self) -> int:
    """FLOPs of one query with one key and its value, 2 per multiply-add."""
    return 4 * self.num_heads * self.head_dim

  @jax.named_scope("attention")
  def keys_values(self, x_BMD: jax.Array, position_BM: Any = None) -> KeysValues:
    k_BMHP = project(x_BMD, self.key, self.key_bias, self.key_norm, self.norm_eps)
    v_BMHP = project(x_BMD, self.value, self.value_bias)
    return self.rope.rotate(k_BMHP, position_BM) if self.rope else k_BMHP, v_BMHP

  @jax.named_scope("attention")
  def queries(self, x_BLD: jax.Array, position_BL: Any = None) -> jax.Array:
    q_BLHP = project(x_BLD, self.query, self.query_bias, self.query_norm, self.norm_eps)
    return self._turn(q_BLHP, position_BL)

  def _turn(self, q_BLHP: jax.Array, position_BL: Any) -> jax.Array:
    return self.rope.rotate(q_BLHP, position_BL) * self.head_dim**-0.5 if self.rope else q_BLHP

  @jax.named_scope("attention")
  def __call__(self, q_BLHP: jax.Array, keys_values: KeysValues, mask_BLM: jax.Array | None, *,
               bias_HLM: jax.Array | None = None, key: jax.Array | None = None) -> jax.Array:
    """Output of `queries` and `keys_values`; a query attends where `mask_BLM` is True. Softmax in float32."""
    k_BMHP, v_BMHP = keys_values
    if self.num_kv_heads != self.num_heads:
      k_BMHP, v_BMHP = (jnp.repeat(a, self.num_heads // self.num_kv_heads, axis=2) for a in keys_values)
    scale = self.head_dim**-0.5 if self.scale_scores else 1.0
    if not self.scale_scores:  # a ViT draws its dropout masks from the key itself
      key = fold(key, "probabilities")
    y_BLHP = attend(q_BLHP, k_BMHP, v_BMHP, mask_BLM, bias_HLM, self.dropout, key, scale)
    y_BLD = matmul(y_BLHP.reshape(*y_BLHP.shape[:2], -1), self.out[...].reshape(-1, self.out.shape[-1]))
    if self.out_bias is not None:
      y_BLD += self.out_bias[...].astype(y_BLD.dtype)[None, None]
    return constrain(y_BLD, "batch", "length", "embed")


def attend(q_BLHP: jax.Array, k_BMHP: jax.Array, v_BMHP: jax.Array, mask_BLM: jax.Array | None,
           bias_HLM: jax.Array | None, rate: float, key: jax.Array | None, scale: float = 1.0) -> jax.Array:
  """softmax(scale (q k + bias)) v, each head by itself; probabilities dropped with `rate` by `key`."""
  score_BHLM = jnp.einsum("blhp,bmhp->bhlm", q_BLHP, k_BMHP, preferred_element_type=jnp.float32)
  if bias_HLM is not None:
    score_BHLM += bias_HLM if bias_HLM.ndim == 4 else bias_HLM[None]  # of each row, or of all
  if mask_BLM is not None:
    # A finite minimum: a query that may attend nowhere (padding) gets an average, not NaN.
    score_BHLM = jnp.where(mask_BLM[:, None], score_BHLM, jnp.finfo(jnp.float32).min)
  if scale != 1.0:
    score_BHLM *= scale
  prob_BHLM = dropout(jax.nn.softmax(score_BHLM, axis=-1), rate, key)
  return jnp.einsum("bhlm,bmhp->blhp", prob_BHLM.astype(v_BMHP.dtype), v_BMHP)


class SparseAttention(Attention):
  """Self-attention whose queries, keys and values come from a sparse layer of width D -> 3 H P.

  Fedus et al. 2021 (Switch), appendix A, has Switch layers in place of these three projections; that they
  share one routing is ours. A token without an expert has zero query, key and value.
  """

  def __init__(self, d: int, num_heads: int, head_dim: int, projection: MoELayer, *,
               rope: Rope | None, dropout: float = 0.0, key: jax.Array):
    super().__init__(d, num_heads, head_dim, rope=rope, dropout=dropout, key=key)
    del self.query, self.key, self.value  # the projection makes them
    self.projection = projection

  def project(self, x_BLD: jax.Array, position_BL: Any, tokens: Tokens, key: jax.Array | None,
              edits: Any = None) -> tuple[jax.Array, KeysValues, Routing]:
    """(queries, keys and values, routing)."""
    y_BLF, routing = self.projection(x_BLD, tokens, key=key, edits=edits)
    split = y_BLF.reshape(*x_BLD.shape[:2], 3, self.num_heads, self.head_dim)
    q_BLHP, k_BLHP, v_BLHP = (constrain(split[:, :, i], "batch", "length", "heads", "head") for i in range(3))
    if self.rope:
      k_BLHP = self.rope.rotate(k_BLHP, position_BL)
    return self._turn(q_BLHP, position_BL), (k_BLHP, v_BLHP), routing
