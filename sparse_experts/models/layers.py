"""A family's stack: which of its layers are sparse, how wide each FFN is, what a block is made of."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sparse_experts.config import ConfigDict
from sparse_experts.errors import UserError, nearest
from sparse_experts.models.attention import RelativeBias
from sparse_experts.models.blocks import ATTENTIONS, Block, FeedForward, SharedExperts
from sparse_experts.models.depth import DepthBlock
from sparse_experts.models.rope import Rope
from sparse_experts.models.sparse import SparseSpec, make_sparse
from sparse_experts.models.stack import Stack
from sparse_experts.models.template import fold
from sparse_experts.moe import Experts, Heads, LinearExperts, MoELayer, TernaryExperts, get_activation


@dataclasses.dataclass(frozen=True)
class LayerKind:
  """What may differ between layers of a stack; layers of one kind share a compiled block."""

  hidden: int  # of the dense FFN, or of one expert
  activation: str  # the same
  sparse: bool = False  # the FFN
  extra: bool = False  # one more dense FFN
  attention: bool = False  # the self-attention's projections are sparse
  depth: bool = False  # some tokens skip the whole block


@dataclasses.dataclass(frozen=True)
class Design:
  """A family's choices for the blocks of a stack.

  attention: arguments of every attention, and `name`, which one.
  ffn: arguments of every dense FFN besides its widths and activation.
  experts: makes a sparse layer's experts, as the class does.
  norm: a key of NORMS.
  cross: blocks attend to an encoder.
  layer_bias: every block has a table of T5's relative bias.
  depth_layers: dense layers that are Mixture-of-Depths blocks.
  """

  attention: dict[str, Any]
  ffn: dict[str, Any] = dataclasses.field(default_factory=dict)
  experts: Callable[..., Experts] = Experts
  norm: str = "rms"
  cross: bool = False
  layer_bias: bool = False
  depth_layers: tuple[int, ...] = ()


def make_stack(m: ConfigDict, name: str, spec: SparseSpec, design: Design) -> Stack:
  """The stack `name` of a model."""

  def dense(kind: LayerKind, key: jax.Array) -> FeedForward:
    return FeedForward(m.embed_dim, kind.hidden, kind.activation, **design.ffn, dropout=m.dropout, key=key)

  def make_block(kind: LayerKind, key: jax.Array) -> Block | DepthBlock:
    projection = bias = extra = None
    ffn = (_sparse_ffn(m, spec, design, kind, fold(key, "ffn")) if kind.sparse
           else dense(kind, fold(key, "ffn")))
    if kind.attention:
      projection = _sparse_projection(m, spec, design, fold(key, "projection"))
    if design.layer_bias:
      bias = RelativeBias(m.num_heads, False, m.embed_dim, **m.relative_bias, key=fold(key, "position_bias"))
    if kind.extra:
      extra = dense(_dense_kind(m), fold(key, "extra"))
    block = Block(m.embed_dim, design.attention, ffn, projection=projection, position_bias=bias, extra=extra,
                  cross=design.cross, norm=design.norm, norm_eps=m.norm_eps, dropout=m.dropout, key=key)
    return DepthBlock(block, m.depth_capacity, m.embed_dim, key=fold(key, "depth")) if kind.depth else block

  return Stack(name, _kinds(m, spec, design), make_block, m.remat)


def text_design(m: ConfigDict, attention: dict[str, Any], **more: Any) -> Design:
  """The design of a language model."""
  return Design(attention, {"bias": m.ffn_bias}, functools.partial(Experts, bias=m.ffn_bias), **more)


def shared_width(m: ConfigDict, expert_dim: int) -> int:
  """Hidden width of all shared experts of a layer together."""
  if not m.shared_experts or m.shared_dim is None:
    return m.shared_experts * expert_dim
  return m.shared_dim


def _projections_width(m: ConfigDict, kind: LayerKind) -> int:
  """Hidden units of a dense FFN that cost what the projections of MH-MoE do, to a multiple of 8."""
  number = {"both": 2, "none": 0}.get(m.moe_projections, 1) if m.moe_heads > 1 else 0
  matrices = 3 if get_activation(kind.activation)[1] else 2
  return round(number * m.embed_dim / matrices / 8) * 8


def _dense_kind(m: ConfigDict) -> LayerKind:
  return LayerKind(m.mlp_dim, m.activation)


def _kinds(m: ConfigDict, spec: SparseSpec, design: Design) -> list[LayerKind]:
  dense = special = _dense_kind(m)
  if m.moe_place != "attention":
    special = LayerKind(
        m.mlp_dim if m.expert_dim is None else m.expert_dim,
        m.activation if m.expert_activation is None else m.expert_activation, extra=m.extra_ffn)
  if spec.num_experts:
    special = dataclasses.replace(special, sparse=m.moe_place != "attention", attention=m.moe_place != "ffn")
  elif m.moe_place != "attention":  # the dense twin's, as wide as all experts that work on a token
    hidden = spec.k * special.hidden + shared_width(m, special.hidden) + _projections_width(m, special)
    special = dataclasses.replace(special, hidden=hidden)
  layers = spec.layers(m.num_layers)
  return [dataclasses.replace(special if i in layers else dense, depth=i in design.depth_layers)
          for i in range(m.num_layers)]


def _sparse_ffn(m: ConfigDict, spec: SparseSpec, design: Design, kind: LayerKind, key: jax.Array) -> MoELayer:
  shared = None
  if m.shared_experts:
    shared = SharedExperts(
        m.embed_dim, shared_width(m, kind.hidden), kind.activation, gated=m.shared_gate,
        bias=design.ffn.get("bias", False), dropout=m.dropout, key=fold(key, "shared"))
  heads, width = None, m.embed_dim
  if m.moe_heads > 1:
    heads = Heads(width, m.moe_heads, m.moe_projections, rngs=nnx.Rngs(params=fold(key, "heads")))
    width = heads.width
  more = {"multiplicative_bias": True} if m.multiplicative_bias else {}  # of experts without biases only
  make = design.experts
  if m.expert_weights == "ternary":
    make = functools.partial(TernaryExperts, **{n: v for n, v in m.ternary.items() if v is not None})
  experts = make(
      spec.num_experts, width, kind.hidden, kind.activation, dropout=m.expert_dropout,
      init_scale=m.expert_init_scale, backend=m.backend, **more, rngs=nnx.Rngs(params=fold(key, "experts")))
  return make_sparse(m, spec, experts, shared, heads, key=key)


def _sparse_projection(m: ConfigDict, spec: SparseSpec, design: Design, key: jax.Array) -> MoELayer:
  """Queries, keys and values of all heads, with the variances that `Attention` gives them."""
  inner, d = m.num_heads * m.head_dim, m.embed_dim
  query = 1 / (d * m.head_dim) if design.attention["rope"] is None else 1 / d
  variance_F = jnp.repeat(jnp.array([query, 1 / d, 1 / d], jnp.float32), inner)
  experts = LinearExperts(spec.num_experts, d, 3 * inner, variance=variance_F, backend=m.backend,
                          rngs=nnx.Rngs(params=fold(key, "experts")))
  return make_sparse(m, spec, experts, key=key)


def attention_arguments(m: ConfigDict, rope: Rope | None) -> dict[str, Any]:
  """`Design.attention` of a language model; refuses what the attention of that name does not take."""
  given = {name: value for name, value in m.attention.items() if value is not None}
  known = set(inspect.signature(ATTENTIONS[given["name"]].__init__).parameters) & set(m.attention)
  for name in given:
    if name not in known | {"name"}:
      raise UserError(f"model.attention.{name} is set, but model.attention.name='{given['name']}' takes no"
                      f" such argument{nearest(name, known)}")
  return dict(given, num_heads=m.num_heads, head_dim=m.head_dim, rope=rope)
