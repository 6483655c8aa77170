"""The transformer block and its parts: norms, dense and shared feed-forward networks."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct

from sparse_experts.models.attention import Attention, KeysValues, RelativeBias, SparseAttention
from sparse_experts.models.functions import dropout, initial, matmul, normal, rms_norm
from sparse_experts.models.latent_attention import LatentAttention
from sparse_experts.models.template import fold
from sparse_experts.moe import MoELayer, Tokens, get_activation
from sparse_experts.partitioning import constrain

# model.attention.name -> its class
ATTENTIONS: dict[str, Any] = {"multi_head": Attention, "latent": LatentAttention}


class RMSNorm(nnx.Module):
  """x / rms(x) * scale, in float32."""

  def __init__(self, d: int, eps: float = 1e-6):
    self.scale, self.eps = nnx.Param(jnp.ones(d, jnp.float32), axes=("embed",)), eps

  def __call__(self, x_BLD: jax.Array) -> jax.Array:
    return rms_norm(x_BLD, self.scale[...], self.eps)


class LayerNorm(nnx.Module):
  """(x - mean) / deviation * scale + bias, in float32."""

  def __init__(self, d: int, eps: float = 1e-6):
    self.scale = nnx.Param(jnp.ones(d, jnp.float32), axes=("embed",))
    self.bias, self.eps = nnx.Param(jnp.zeros(d, jnp.float32), axes=("embed",)), eps

  def __call__(self, x_BLD: jax.Array) -> jax.Array:
    x = x_BLD.astype(jnp.float32)
    x -= x.mean(-1, keepdims=True)
    x *= jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
    return (x * self.scale[...][None, None] + self.bias[...][None, None]).astype(x_BLD.dtype)


NORMS: dict[str, Any] = {"rms": RMSNorm, "layer": LayerNorm}


class FeedForward(nnx.Module):
  """act(x w_in) w_out, or (act(x w_gate) * (x w_in)) w_out if the activation is gated.

  bias: added to x w_in, to x w_gate and to the output. init: of the weights, `normal` or `xavier`.
  """

  def __init__(self, d: int, hidden: int, activation: str, *, bias: bool = False, init: str = "normal",
               dropout: float = 0.0, key: jax.Array):
    self.activation, self.dropout = activation, dropout
    axes, gated = ("embed", "mlp"), get_activation(activation)[1]
    draw = lambda name, shape, axes: nnx.Param(initial(init, fold(key, name), shape, 1 / shape[0]), axes=axes)
    self.w_in = draw("w_in", (d, hidden), axes)
    self.w_gate = draw("w_gate", (d, hidden), axes) if gated else None
    self.w_out = draw("w_out", (hidden, d), axes[::-1])
    self.b_in = nnx.Param(jnp.zeros(hidden), axes=("mlp",)) if bias else None
    self.b_gate = nnx.Param(jnp.zeros(hidden), axes=("mlp",)) if bias and gated else None
    self.b_out = nnx.Param(jnp.zeros(d), axes=("embed",)) if bias else None

  @jax.named_scope("dense_ffn")
  def __call__(self, x_BLD: jax.Array, key: jax.Array | None = None) -> jax.Array:
    function, _ = get_activation(self.activation)
    add = lambda y_BLF, b_F: y_BLF if b_F is None else y_BLF + b_F[...].astype(y_BLF.dtype)[None, None]
    h_BLF = add(matmul(x_BLD, self.w_in[...]), self.b_in)
    h_BLF = (function(h_BLF) if self.w_gate is None
             else function(add(matmul(x_BLD, self.w_gate[...]), self.b_gate)) * h_BLF)
    h_BLF = dropout(constrain(h_BLF, "batch", "length", "mlp"), self.dropout, key)
    return add(matmul(h_BLF, self.w_out[...]), self.b_out)


class SharedExperts(nnx.Module):
  """The FFN of a sparse layer that every token passes; `gated`: times sigmoid(x w), in float32."""

  def __init__(self, d: int, hidden: int, activation: str, *, gated: bool, bias: bool = False,
               dropout: float = 0.0, key: jax.Array):
    self.ffn = FeedForward(d, hidden, activation, bias=bias, dropout=dropout, key=fold(key, "ffn"))
    w_D1 = normal(fold(key, "gate"), (d, 1), 1 / d) if gated else None
    self.gate = nnx.Param(w_D1, axes=("embed", "router")) if gated else None

  def __call__(self, x_BLD: jax.Array, key: jax.Array | None = None) -> jax.Array:
    y_BLD = self.ffn(x_BLD, key)
    if self.gate is None:
      return y_BLD
    gate_BL1 = jax.nn.sigmoid(matmul(x_BLD.astype(jnp.float32), self.gate[...]))
    return y_BLD * gate_BL1.astype(y_BLD.dtype)


class Context(struct.PyTreeNode):
  """Inputs that all layers of a stack share: masks, positions, tokens for routers, the encoder's output.

  M counts key positions: those of the row, or the length of the cache. New keys are written to a cache at
  `index`.
  """

  mask_BLM: Any  # which positions a query attends to; None: all
  tokens: Tokens  # for routers
  position_BL: Any = None  # for RoPE
  bias_HLM: jax.Array | None = None  # T5's relative bias; bias_BHLM if rows differ
  encoded_BSD: jax.Array | None = None  # the encoder's output, for cross-attention
  cross_mask_BLS: jax.Array | None = None
  # Arrays that are there where they are read: with a cache, and with a block's own bias.
  index: Any = None
  query_L: Any = None  # positions of queries and of keys in their row
  key_M: Any = None
  # Arrays for the edit of this block's routings, by part ("ffn", "attention"); a stack sets them.
  edits: dict[str, Any] = struct.field(default_factory=dict)


class Block(nnx.Module):
  """x + attention(norm(x)), with a decoder's cross-attention, then x + FFN(norm(x)), each dense or sparse.

  attention: arguments of a class in ATTENTIONS, and its `name` there (default `multi_head`).
  projection: the sparse layer that makes queries, keys and values in place of dense ones.
  position_bias: this block's own, in place of the context's.
  extra: one more FFN at the end, x + extra(norm(x)), with its own norm.
  norm: a key of NORMS.
  """

  def __init__(self, d: int, attention: dict[str, Any], ffn: FeedForward | MoELayer, *,
               projection: MoELayer | None = None, position_bias: RelativeBias | None = None,
               extra: FeedForward | None = None, cross: bool = False, norm: str = "rms",
               norm_eps: float = 1e-6, dropout: float = 0.0, key: jax.Array):
    kind = ATTENTIONS[attention.get("name", "multi_head")]
    attention = {name: value for name, value in attention.items() if name != "name"}
    make_norm = lambda: NORMS[norm](d, norm_eps)
    make = lambda name: kind(d, **attention, norm_eps=norm_eps, dropout=dropout, key=fold(key, name))
    self.dropout = dropout
    self.attention_norm, self.attention_is_sparse = make_norm(), projection is not None
    if projection is not None:
      self.attention = SparseAttention(
          d, projection=projection, **attention, dropout=dropout, key=fold(key, "attention"))
    else:
      self.attention = make("attention")
    nothing: tuple[Any, Any] = None, None
    self.cross_norm, self.cross = (make_norm(), make("cross")) if cross else nothing
    self.position_bias, self.ffn_norm, self.ffn = position_bias, make_norm(), ffn
    self.extra: Any = extra
    self.extra_norm: Any = make_norm() if extra is not None else None

  @property
  def sparse_parts(self) -> dict[str, MoELayer]:
    """The sparse layers by the part of the block they are in."""
    parts = {"attention": self.attention.projection} if self.attention_is_sparse else {}
    return parts if isinstance(self.ffn, FeedForward) else parts | {"ffn": self.ffn}

  def __call__(self, x_BLD: jax.Array, context: Context, cache: dict[str, KeysValues] | None = None,
               key: jax.Array | None = None):
    """(x_BLD, routings by the part that is sparse, new cache or None).

    `cache` holds `self`, keys and values of M positions, and in an encoder-decoder `cross`, the
    encoder's. The new cache is `self` alone: `cross` does not change.
    """
    c, routings = context, {}

    def add(y_BLD, name):
      return constrain(x_BLD + dropout(y_BLD, self.dropout, fold(key, name)), "batch", "length", "embed")

    h_BLD = self.attention_norm(x_BLD)
    if self.attention_is_sparse:
      q_BLHP, self_keys_values, routings["attention"] = self.attention.project(
          h_BLD, c.position_BL, c.tokens, fold(key, "projection"), c.edits.get("attention"))
    else:
      self_keys_values = self.attention.keys_values(h_BLD, c.position_BL)
      q_BLHP = self.attention.queries(h_BLD, c.position_BL)
    if cache is not None:
      self_keys_values = jax.tree.map(
          lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), c.index, axis=1),
          cache["self"], self_keys_values)
    bias_HLM = c.bias_HLM if self.position_bias is None else self.position_bias(c.query_L, c.key_M)
    y_BLD = self.attention(q_BLHP, self_keys_values, c.mask_BLM, bias_HLM=bias_HLM,
                           key=fold(key, "attention"))
    x_BLD = add(y_BLD, "attention_out")

    if self.cross is not None:
      keys_values = cache["cross"] if cache is not None else self.cross.keys_values(c.encoded_BSD)
      q_BLHP = self.cross.queries(self.cross_norm(x_BLD))
      y_BLD = self.cross(q_BLHP, keys_values, c.cross_mask_BLS, key=fold(key, "cross"))
      x_BLD = add(y_BLD, "cross_out")

    h_BLD = self.ffn_norm(x_BLD)
    if isinstance(self.ffn, FeedForward):
      y_BLD = self.ffn(h_BLD, key=fold(key, "ffn"))
    else:
      stream = {"stream_GTD": x_BLD} if self.ffn.router is not None and self.ffn.router.reads_stream else {}
      y_BLD, routings["ffn"] = self.ffn(
          h_BLD, c.tokens, key=fold(key, "ffn"), edits=c.edits.get("ffn"), **stream)
    x_BLD = add(y_BLD, "ffn_out")

    if self.extra is not None:
      x_BLD = add(self.extra(self.extra_norm(x_BLD), key=fold(key, "extra")), "extra_out")
    return x_BLD, routings, None if cache is None else {"self": self_keys_values}
