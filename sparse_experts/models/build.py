"""From a config to a model: widths, which layers are sparse, and each stack's routing."""

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sparse_experts.config import image_tokens, row_tokens
from sparse_experts.errors import UserError, nearest
from sparse_experts.models.attention import RelativeBias
from sparse_experts.models.blocks import ATTENTIONS, Block, FeedForward, RMSNorm, SharedExperts
from sparse_experts.models.decoder import Decoder
from sparse_experts.models.depth import DepthBlock
from sparse_experts.models.limoe import Comparison, LIMoE, TextEmbedding
from sparse_experts.models.model import Embedding, Head, Model
from sparse_experts.models.rope import Rope
from sparse_experts.models.seq2seq import Seq2Seq
from sparse_experts.models.stack import Stack
from sparse_experts.models.template import Template, fold
from sparse_experts.models.vit import Classifier, LayerNorm, PatchEmbedding, ViT, ViTBlock
from sparse_experts.moe import (
    LAYERS,
    ROUTERS,
    BiasedExperts,
    Experts,
    GatingDropout,
    LinearExperts,
    MoELayer,
    Router,
    Routing,
    make_layer,
    make_router,
)
from sparse_experts.moe.dispatch import dropless_dispatch
from sparse_experts.moe.experts import get_activation

PHASES = ("train", "eval_capacity", "dropless")
PLACES = ("ffn", "attention", "both")
MODELS = {"decoder": Decoder, "seq2seq": Seq2Seq, "vit": ViT, "limoe": LIMoE}
VISION = ("vit", "limoe")  # of the same blocks
POOLS = ("token", "mean")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Kind:
  """What tells layers of a stack apart."""

  sparse: bool  # the FFN
  hidden: int  # of the dense FFN, or of one expert
  activation: str  # the same
  extra: bool = False  # one more dense FFN
  attention: bool = False  # the self-attention's projections are sparse
  depth: bool = False  # some tokens pass by the whole block


def build(config: Any, vocab_size: int, phase: str = "train", *, router: nnx.Module | None = None,
          edit: Callable[..., Routing] | None = None) -> Model:
  """The model of `config.model`. All phases have the same params and differ in what gets dropped.

  vocab_size: of a `vit`, the number of classes; of a `limoe`, that of its texts' ids.
  phase: `train` and `eval_capacity` use that capacity factor, `dropless` none.
  router: an instance that every sparse layer starts from, instead of `config.model.router`.
  edit: changes every routing before the dispatch (see `moe/edits.py`), for experiments on a trained model.
  """
  m = config.model
  _check(m, vocab_size, phase)
  if m.name == "vit":
    return _build_vit(config, vocab_size, phase, router, edit)
  if m.name == "limoe":
    return _build_limoe(config, vocab_size, phase, router, edit)
  parts: dict[str, Any] = {"embedding": Template(lambda key: Embedding(vocab_size, m.embed_dim, key=key))}
  for name in ("encoder", "decoder") if m.name == "seq2seq" else ("decoder",):
    parts[name] = {"blocks": _make_stack(m, name, phase, router, edit),
                   "norm": Template(lambda key: RMSNorm(m.embed_dim, m.norm_eps))}
    if m.name == "seq2seq":
      parts[name]["position_bias"] = Template(
          lambda key, name=name: RelativeBias(m.num_heads, name == "encoder", m.embed_dim, key=key))
  if not m.tied_head:
    parts["head"] = Template(lambda key: Head(m.embed_dim, vocab_size, key=key))
  return MODELS[m.name](parts, DTYPES[m.dtype], m.dropout, phase)


def _build_vit(config: Any, num_classes: int, phase: str, router: nnx.Module | None,
               edit: Callable | None) -> ViT:
  m, tokens = config.model, image_tokens(config)
  parts = {
      "embedding": Template(lambda key: PatchEmbedding(
          m.embed_dim, m.patch_size, tokens, m.pool == "token", key=key)),
      "encoder": {"blocks": _make_stack(m, "encoder", phase, router, edit),
                  "norm": Template(lambda key: LayerNorm(m.embed_dim))},
      "head": Template(lambda key: Classifier(
          m.embed_dim, m.representation_dim, num_classes, m.head_bias, key=key))}
  return ViT(parts, DTYPES[m.dtype], m.dropout, phase, config.data.objective, tokens=tokens)


def _build_limoe(config: Any, vocab_size: int, phase: str, router: nnx.Module | None,
                 edit: Callable | None) -> LIMoE:
  m, length = config.model, config.data.length
  patches = row_tokens(config) - length
  parts = {
      "image": Template(lambda key: PatchEmbedding(m.embed_dim, m.patch_size, patches, False, key=key)),
      "text": Template(lambda key: TextEmbedding(vocab_size, m.embed_dim, length, key=key)),
      "encoder": {"blocks": _make_stack(m, "encoder", phase, router, edit),
                  "norm": Template(lambda key: LayerNorm(m.embed_dim))},
      "head": Template(lambda key: Comparison(m.embed_dim, m.representation_dim, key=key))}
  return LIMoE(parts, DTYPES[m.dtype], m.dropout, phase, config.data.objective, image_tokens=patches,
               text_tokens=length)


def _check(m: Any, vocab_size: int, phase: str) -> None:
  names = (("model.name", m.name, MODELS), ("model.dtype", m.dtype, DTYPES), ("phase", phase, PHASES),
           ("model.moe_place", m.moe_place, PLACES), ("model.pool", m.pool, POOLS))
  for name, value, known in names:
    if value not in known:
      raise UserError(f"{name}='{value}' is unknown{nearest(value, known)}")
  for name in (m.activation, _expert_activation(m)):
    get_activation(name)
  if m.extra_ffn and m.moe_place == "attention":
    raise UserError("model.extra_ffn=True follows sparse FFNs, of which model.moe_place='attention' has none;"
                    " choose moe_place='ffn' or 'both', or leave it")
  if m.shared_gate and not m.shared_experts:
    raise UserError("model.shared_gate=True is set, but model.shared_experts=0; set that, or leave it")
  widths = {f"model.{n}": m[n] for n in ("num_layers", "embed_dim", "mlp_dim", "num_heads", "head_dim")}
  widths |= {"vocab_size": vocab_size, "model.expert_dim": _expert_dim(m)}
  for name, value in widths.items():
    if value < 1:
      raise UserError(f"{name}={value} must be at least 1")
  if m.name == "decoder" and m.attention.name == "multi_head" and m.head_dim % 2:
    raise UserError(f"model.head_dim={m.head_dim} is odd, but RoPE turns pairs; choose {m.head_dim + 1}")
  if m.layer_bias and m.name != "decoder":
    raise UserError(f"model.layer_bias=True is for model.name='decoder'; in a {m.name} all layers of a stack"
                    " share one bias: leave it")
  for name in ("dropout", "expert_dropout"):
    if not 0.0 <= m[name] < 1.0:
      raise UserError(f"model.{name}={m[name]} is not in [0, 1)")
  if m.name in VISION:
    _check_vision(m)
  if m.name != "seq2seq":
    unused = [f"model.decoder.{n}" for n in m.decoder if n != "router" and m.decoder[n] is not None]
    unused += [f"model.decoder.router.{n}" for n, v in m.decoder.router.items() if v is not None]
    if unused:
      raise UserError(f"{unused[0]} is for model.name='seq2seq'; a model with one stack takes"
                      f" {unused[0].replace('.decoder', '')}")


def _check_vision(m: Any) -> None:
  if get_activation(m.activation)[1] or m.moe_place != "ffn":
    raise UserError(f"model.activation='{m.activation}', model.moe_place='{m.moe_place}': a {m.name} has MLPs"
                    " with biases, not gated, and experts in their place; choose gelu or relu, and ffn")
  others = {"model.extra_ffn": m.extra_ffn, "model.multiplicative_bias": m.multiplicative_bias,
            "model.expert_activation": m.expert_activation, "model.shared_experts": m.shared_experts}
  for name, value in others.items():
    if value:
      raise UserError(f"{name}={value} is set, but the MLPs of a {m.name} and its experts are alike; leave it"
                      " out")
  if m.router.name == "smear" and m.num_experts:
    raise UserError(f"model.router.name='smear' merges experts without biases, and a {m.name}'s have some;"
                    " choose another")
  if m.name == "limoe" and m.router.name == "soft_moe" and m.num_experts:
    raise UserError("model.router.name='soft_moe' mixes the tokens of an image with those of its text, which"
                    " are to be compared; choose a router")


def _expert_dim(m: Any) -> int:
  return m.mlp_dim if m.expert_dim is None else m.expert_dim


def _has_rope(m: Any) -> bool:
  return m.name == "decoder" and not m.layer_bias


def _expert_activation(m: Any) -> str:
  return m.activation if m.expert_activation is None else m.expert_activation


def sparse_indices(num_layers: int, moe_every: int, moe_layers: tuple[int, ...]) -> tuple[int, ...]:
  """The layers of a stack that are sparse: `moe_layers`, or n-1, 2n-1, ... for n = `moe_every`."""
  if moe_layers:
    outside = [layer for layer in moe_layers if not 0 <= layer < num_layers]
    if outside:
      raise UserError(f"model.moe_layers={moe_layers} names layer {outside[0]}, but layers go from 0 to"
                      f" {num_layers - 1}")
    return tuple(sorted(set(moe_layers)))
  if not 1 <= moe_every <= num_layers:
    raise UserError(f"model.moe_every={moe_every} leaves no sparse layer among num_layers={num_layers};"
                    f" choose 1 to {num_layers}, or num_experts=0 for a dense model")
  return tuple(range(moe_every - 1, num_layers, moe_every))


def _routing(m: Any, name: str) -> dict[str, Any]:
  """Routing fields of a stack: an encoder-decoder's decoder may override the encoder's."""
  names = [n for n in m.decoder if n != "router"]
  fields = {n: m[n] for n in names}
  router, section = {n: v for n, v in m.router.items() if v is not None}, "model.router"
  if m.name == "seq2seq" and name == "decoder":
    fields |= {n: m.decoder[n] for n in names if m.decoder[n] is not None}
    if m.decoder.router.name not in (None, router["name"]):
      router = {}  # another router has other arguments
    router |= {n: v for n, v in m.decoder.router.items() if v is not None}
    section = "model.decoder.router"
  return fields | {"router": router | {"section": section}, "moe_layers": tuple(fields["moe_layers"])}


def _make_stack(m: Any, name: str, phase: str, router: nnx.Module | None, edit: Callable | None) -> Stack:
  r = _routing(m, name)
  if r["num_experts"] < 0:
    raise UserError(f"model.num_experts={r['num_experts']} must be 0 (dense) or more")
  dense_ffn = {"hidden": m.mlp_dim, "activation": m.activation}
  sparse_ffn = {"hidden": _expert_dim(m), "activation": _expert_activation(m), "extra": m.extra_ffn}
  if m.moe_place == "attention":
    sparse_ffn = dense_ffn
  of_layer = [dense_ffn] * m.num_layers
  if r["num_experts"]:
    sparse = sparse_indices(m.num_layers, r["moe_every"], r["moe_layers"])
  else:  # the dense twin: as wide, in the layers that would be sparse, as the experts a token meets
    sparse = ()
    if r["moe_layers"] or 1 <= r["moe_every"] <= m.num_layers:
      for layer in sparse_indices(m.num_layers, r["moe_every"], r["moe_layers"]):
        if m.moe_place != "attention":
          hidden = (r["router"].get("k", 1) + m.shared_experts) * _expert_dim(m)
          of_layer[layer] = sparse_ffn | {"hidden": hidden}
  depth = _depth_layers(m, name, sparse)
  kinds = [Kind(m.moe_place != "attention", attention=m.moe_place != "ffn", **sparse_ffn) if i in sparse
           else Kind(False, depth=i in depth, **of_layer[i]) for i in range(m.num_layers)]

  def dense(hidden: int, activation: str, key: jax.Array) -> FeedForward:
    return FeedForward(m.embed_dim, hidden, activation, dropout=m.dropout, key=key)

  def make_block(kind: Kind, key: jax.Array) -> Block:
    if m.name in VISION:
      sparse = _make_sparse(m, r, phase, router, edit, fold(key, "ffn")) if kind.sparse else None
      return ViTBlock(m, kind.hidden, sparse, key=key)
    if kind.sparse:
      ffn = _make_sparse(m, r, phase, router, edit, fold(key, "ffn"))
    else:
      ffn = dense(kind.hidden, kind.activation, fold(key, "ffn"))
    projection = None
    if kind.attention:
      experts = _projections(m, r["num_experts"], fold(key, "projection"))
      projection = _make_sparse(m, r, phase, router, edit, fold(key, "projection"), experts)
    cross = m.name == "seq2seq" and name == "decoder"
    bias = None
    if m.layer_bias:
      bias = RelativeBias(m.num_heads, False, m.embed_dim, key=fold(key, "position_bias"))
    extra = dense(m.mlp_dim, m.activation, fold(key, "extra")) if kind.extra else None
    block = Block(m.embed_dim, _attention(m), ffn, projection=projection, position_bias=bias, extra=extra,
                  cross=cross, norm_eps=m.norm_eps, dropout=m.dropout, key=key)
    return DepthBlock(block, m.depth_capacity, m.embed_dim, key=fold(key, "depth")) if kind.depth else block

  stack = Stack(name, kinds, make_block, m.remat)
  if name == "decoder":
    _refuse_future(m, r, stack)
  return stack


def _attention(m: Any) -> dict[str, Any]:
  """Arguments of every attention of the model; refuses what the one of that name does not take."""
  given = {name: value for name, value in m.attention.items() if value is not None}
  if given["name"] not in ATTENTIONS:
    raise UserError(f"model.attention.name='{given['name']}' is unknown{nearest(given['name'], ATTENTIONS)}")
  known = set(inspect.signature(ATTENTIONS[given["name"]].__init__).parameters) & set(m.attention)
  for name in given:
    if name not in known | {"name"}:
      raise UserError(f"model.attention.{name} is set, but model.attention.name='{given['name']}' takes no"
                      f" such argument{nearest(name, known)}")
    if m.moe_place != "ffn" and m.num_experts and given[name] != "multi_head":
      raise UserError(f"model.attention.{name} is set, but model.moe_place='{m.moe_place}' has experts make"
                      " queries, keys and values; leave it out, or choose model.moe_place=ffn")
  rope = Rope(**m.rope) if _has_rope(m) else None
  return dict(given, num_heads=m.num_heads, head_dim=m.head_dim, rope=rope)


def _depth_layers(m: Any, name: str, sparse: tuple[int, ...]) -> tuple[int, ...]:
  """The layers of a stack that are Mixture-of-Depths blocks: an encoder's, and dense ones."""
  layers = tuple(m.depth_layers)
  if layers and m.name != "seq2seq":
    raise UserError(f"model.depth_layers={layers}: Mixture-of-Depths sees later tokens, which a causal"
                    " decoder refuses, and a vit has none; leave it (), or choose model.name='seq2seq', whose"
                    " encoder takes it")
  if name != "encoder":
    return ()
  if not 0 < m.depth_capacity <= 1:
    raise UserError(f"model.depth_capacity={m.depth_capacity} is no share of the tokens; choose above 0 to 1")
  for layer in layers:
    if not 0 <= layer < m.num_layers or layer in sparse:
      why = "is sparse" if layer in sparse else f"is not among 0 to {m.num_layers - 1}"
      raise UserError(f"model.depth_layers={layers} names layer {layer}, which {why}; name dense layers")
  return layers


def user_routers(config: Any) -> Iterator[Router]:
  """One of each kind that `config` names by `package.module:Class`, for `moe.check_router`."""
  m = config.model
  for name in {"seq2seq": ("encoder", "decoder"), "decoder": ("decoder",)}.get(m.name, ("encoder",)):
    r = _routing(m, name)
    arguments = dict(r["router"])
    if r["num_experts"] and (router := arguments.pop("name")) not in (*ROUTERS, *LAYERS):
      yield make_router(router, m.embed_dim, r["num_experts"], rngs=nnx.Rngs(params=0), **arguments)


def _projections(m: Any, num_experts: int, key: jax.Array) -> LinearExperts:
  """Queries, keys and values of all heads, with the variances that `Attention` gives them."""
  inner, d = m.num_heads * m.head_dim, m.embed_dim
  query = 1 / d if _has_rope(m) else 1 / (d * m.head_dim)
  variance_F = jnp.repeat(jnp.array([query, 1 / d, 1 / d], jnp.float32), inner)
  return LinearExperts(
      num_experts, d, 3 * inner, variance=variance_F, backend=m.backend,
      rngs=nnx.Rngs(params=fold(key, "experts")))


def _make_sparse(m: Any, r: dict[str, Any], phase: str, router: nnx.Module | None, edit: Callable | None,
                 key: jax.Array, experts: nnx.Module | None = None) -> nnx.Module:
  """The sparse FFN, or, given its experts, the attention's sparse projections, without shared experts."""
  factor = {"train": r["capacity_factor"], "eval_capacity": r["eval_capacity_factor"], "dropless": 0.0}[phase]
  shared = None
  if experts is None and m.shared_experts:
    shared = SharedExperts(m.embed_dim, m.shared_experts * _expert_dim(m), _expert_activation(m),
                           gated=m.shared_gate, dropout=m.dropout, key=fold(key, "shared"))
  arguments, place = dict(r["router"]), "ffn" if experts is None else "attention"
  name = arguments.pop("name")
  if m.name in VISION:
    experts = BiasedExperts(
        r["num_experts"], m.embed_dim, _expert_dim(m), m.activation, dropout=m.expert_dropout,
        init_scale=m.expert_init_scale, backend=m.backend, rngs=nnx.Rngs(params=fold(key, "experts")))
  experts = experts or Experts(
      r["num_experts"], m.embed_dim, _expert_dim(m), _expert_activation(m), dropout=m.expert_dropout,
      init_scale=m.expert_init_scale, multiplicative_bias=m.multiplicative_bias, backend=m.backend,
      rngs=nnx.Rngs(params=fold(key, "experts")))
  rngs = nnx.Rngs(params=fold(key, "router"))
  if router is None and name in LAYERS:
    if place == "attention" or shared is not None or edit is not None or m.gating_dropout.rate:
      raise UserError(
          f"model.router.name='{name}' is a layer of its own, without model.shared_experts,"
          " gating_dropout, moe_place='attention' or edits of routings; choose a router for those")
    return make_layer(name, m.embed_dim, experts, rngs=rngs, **arguments)
  if router is None:
    router = make_router(name, m.embed_dim, r["num_experts"], rngs=rngs, **arguments)
  dispatch = dropless_dispatch(r["dispatch"]) if phase == "dropless" else r["dispatch"]
  return MoELayer(
      router, experts, dispatch=dispatch, group_size=r["group_size"], capacity_factor=factor or None,
      capacity_rule=r["capacity_rule"], min_capacity=r["min_capacity"],
      exchange_rows_factor=m.exchange_rows_factor, edit=edit, shared=shared,
      exchange=GatingDropout(**m.gating_dropout) if m.gating_dropout.rate else None)


def _refuse_future(m: Any, r: dict[str, Any], stack: Stack) -> None:
  for layer, sparse in stack.sparse_layers.items():
    if sparse.routing_causality in ("sequence", "batch"):
      where = "model.decoder.router" if m.name == "seq2seq" else "model.router"
      order = r["router"].get("order", "choice")
      order = "" if order == "choice" else f" with order='{order}'"
      raise UserError(
          f"{where}.name='{r['router']['name']}'{order} sees other tokens, later ones too (causality"
          f" '{sparse.routing_causality}'), so the causal layer {layer} cannot use it; choose"
          f" {where}.name='top_k' and order='choice' or 'token'")
