"""Multi-head latent attention (DeepSeek-V2): keys and values of all heads are projections of one latent."""

import jax
import jax.numpy as jnp
from flax import nnx

from sparse_experts.errors import UserError
from sparse_experts.models.attention import attend, project
from sparse_experts.models.functions import matmul, normal, rms_norm
from sparse_experts.models.rope import Rope
from sparse_experts.models.template import fold
from sparse_experts.partitioning import constrain

NORM_EPS = 1e-6  # of the two inner norms, not model.norm_eps: as in Hugging Face's and the official code


class LatentAttention(nnx.Module):
  """Attention whose keys and values are products of a normed latent c_BMC (DeepSeek-AI 2024, section 2.1).

  head_dim is the width of queries and keys. Its last `rope_dim` are rotated; of keys they are one vector
  for all heads, projected from x. Values are `value_dim` wide. Decoding caches the latents
  and the rotated keys; each step computes the heads' keys and values from them again (the absorbed form,
  which multiplies projections in advance, is not implemented). `rope` rotates halves; `convert` reorders
  files of pairs.

  q_rank: queries are projections of a normed vector of this width; None: of x.
  kv_rank: width C of the latent.
  """

  def __init__(self, d: int, num_heads: int, head_dim: int, *, rope: Rope | None, q_rank: int | None = None,
               kv_rank: int = 512, rope_dim: int = 64, value_dim: int = 128, norm_eps: float = 1e-6,
               dropout: float = 0.0, key: jax.Array):
    if rope is None:
      raise UserError("model.attention.name='latent' needs rotary positions, which model.name='seq2seq' does "
                      "not have; choose model.attention.name=multi_head, or model.name=decoder")
    if not 0 < rope_dim < head_dim or rope_dim % 2:
      raise UserError(f"model.attention.rope_dim={rope_dim} is no even part of model.head_dim={head_dim}; "
                      "choose an even number below it")
    self.rope, self.num_heads, self.head_dim, self.dropout = rope, num_heads, head_dim, dropout
    self.kv_rank, self.rope_dim, self.value_dim = kv_rank, rope_dim, value_dim
    plain = head_dim - rope_dim

    def draw(name, shape, axes, fan_in):
      return nnx.Param(normal(fold(key, name), shape, 1 / fan_in), axes=axes)

    gain = lambda rank: nnx.Param(jnp.ones(rank), axes=(None,))
    heads = (None, "heads", "head")
    if q_rank is None:
      self.query_in = self.query_norm = None
      self.query = draw("query", (d, num_heads, head_dim), ("embed", "heads", "head"), d)
    else:
      self.query_in, self.query_norm = draw("query_in", (d, q_rank), ("embed", None), d), gain(q_rank)
      self.query = draw("query", (q_rank, num_heads, head_dim), heads, q_rank)
    self.latent_in, self.latent_norm = draw("latent_in", (d, kv_rank), ("embed", None), d), gain(kv_rank)
    self.key_rope = draw("key_rope", (d, rope_dim), ("embed", None), d)
    self.key = draw("key", (kv_rank, num_heads, plain), heads, kv_rank)
    self.value = draw("value", (kv_rank, num_heads, value_dim), heads, kv_rank)
    self.out = draw("out", (num_heads, value_dim, d), ("heads", "head", "embed"), num_heads * value_dim)

  @property
  def kept_shapes(self) -> tuple[tuple[int, ...], ...]:
    """Shapes of the arrays that `keys_values` makes of one position: the cache of decoding."""
    return (self.kv_rank,), (self.rope_dim,)

  @property
  def flops_per_key(self) -> int:
    """FLOPs of one query with one key and its value, 2 per multiply-add."""
    return 2 * self.num_heads * (self.head_dim + self.value_dim)

  @jax.named_scope("attention")
  def keys_values(self, x_BMD: jax.Array, position_BM: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(latents_BMC, rotated keys_BMR), shared by all heads."""
    c_BMC = rms_norm(matmul(x_BMD, self.latent_in[...]), self.latent_norm[...], NORM_EPS)
    k_BMR = matmul(x_BMD, self.key_rope[...])
    return c_BMC, self.rope.rotate(k_BMR[:, :, None], position_BM)[:, :, 0]

  @jax.named_scope("attention")
  def queries(self, x_BLD: jax.Array, position_BL: jax.Array) -> jax.Array:
    if self.query_in is not None and self.query_norm is not None:
      x_BLD = rms_norm(matmul(x_BLD, self.query_in[...]), self.query_norm[...], NORM_EPS)
    q_BLHP = project(x_BLD, self.query)
    plain_BLHP, turned_BLHP = jnp.split(q_BLHP, [self.head_dim - self.rope_dim], axis=-1)
    q_BLHP = jnp.concatenate([plain_BLHP, self.rope.rotate(turned_BLHP, position_BL)], axis=-1)
    return q_BLHP * (self.head_dim**-0.5 * self.rope.score_gain)

  @jax.named_scope("attention")
  def __call__(self, q_BLHP: jax.Array, keys_values: tuple[jax.Array, jax.Array], mask_BLM: jax.Array, *,
               bias_HLM: jax.Array | None = None, key: jax.Array | None = None) -> jax.Array:
    """Output of `queries` and `keys_values`; a query attends where `mask_BLM` is True."""
    c_BMC, k_BMR = keys_values
    plain_BMHP = project(c_BMC, self.key)
    turned_BMHP = jnp.broadcast_to(k_BMR[:, :, None], (*plain_BMHP.shape[:3], self.rope_dim))
    k_BMHP = jnp.concatenate([plain_BMHP, turned_BMHP], axis=-1)
    y_BLHP = attend(q_BLHP, k_BMHP, project(c_BMC, self.value), mask_BLM, bias_HLM, self.dropout,
                    fold(key, "probabilities"))
    y_BLD = matmul(y_BLHP.reshape(*y_BLHP.shape[:2], -1), self.out[...].reshape(-1, self.out.shape[-1]))
    return constrain(y_BLD, "batch", "length", "embed")
