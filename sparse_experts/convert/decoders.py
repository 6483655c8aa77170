"""Decoder-only checkpoints: Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE and DeepSeek-V3.

All have RMSNorm before each sub-layer, rotary positions, gated experts without biases and, as a rule, an
untied head; a subclass holds what differs. A config.json that asks for more (a sliding window, clipped
values, biases) is refused, and the message names the field.
"""

from typing import Any, ClassVar

from ml_collections import ConfigDict

from sparse_experts.convert.fields import Fields, expert_dim, outputs_depend_on, rope_fields, sparse_layers
from sparse_experts.convert.pieces import Pieces, Shape
from sparse_experts.errors import UserError

PROJECTIONS = {"w_gate": "gate_proj", "w_in": "up_proj", "w_out": "down_proj"}


class Decoder:
  """What the families share. `name` is config.json's model_type."""

  name: str
  architecture: str
  # Keys of config.model, and the values that this layout needs.
  needs: ClassVar = {"name": "decoder", "attention.name": "multi_head", "router.name": "top_k"}
  sparse = "mlp"  # what a sparse layer's tensors are called
  expert = PROJECTIONS
  shared = ""  # and its shared experts' FFN
  eps = 1e-6
  theta = 10_000.0
  tied = False  # whether the checkpoint's head is tied; ours is never tied, as a tied head of ours is scaled

  # Config.

  def read(self, hf: Fields) -> dict[str, Any]:
    """`config.model`'s keys of the foreign fields."""
    hf.only(hidden_act="silu")
    self.tied = bool(hf("tie_word_embeddings", False))
    d, heads = hf.count("hidden_size"), hf.count("num_attention_heads")
    kv_heads = hf.count("num_key_value_heads", heads)
    return dict(
        name="decoder", num_layers=hf.count("num_hidden_layers"), embed_dim=d, num_heads=heads,
        head_dim=hf.count("head_dim", d // heads), mlp_dim=hf.count("intermediate_size"), activation="swiglu",
        tied_head=False, norm_eps=float(hf("rms_norm_eps", self.eps)), rope=hf.rope(self.theta),
        attention=dict(name="multi_head", num_kv_heads=None if kv_heads == heads else kv_heads),
        moe_every=1, router=dict(
            name="top_k", k=hf.count("num_experts_per_tok"), gate="renormalized", balance_count="multi_hot",
            load_balance_weight=float(hf("router_aux_loss_coef", 0.001))))

  def write(self, config: ConfigDict) -> dict[str, Any]:
    """The foreign fields of `config.model`, as `read` reads them."""
    m = config.model
    return dict(
        hidden_size=m.embed_dim, num_hidden_layers=m.num_layers, num_attention_heads=m.num_heads,
        num_key_value_heads=m.attention.num_kv_heads or m.num_heads, intermediate_size=m.mlp_dim,
        hidden_act="silu", rms_norm_eps=m.norm_eps, num_experts_per_tok=m.router.k or 1,
        tie_word_embeddings=False, **rope_fields(m.rope))

  # Tensors.

  def pieces(self, config: ConfigDict, shapes: dict[str, Shape], there: Any = ()) -> Pieces:
    """there: names in the checkpoint that is read; its experts may lie in fused tensors."""
    m, p = config.model, Pieces(shapes)
    tied = self.tied and "lm_head.weight" not in there
    p.same("model.embed_tokens.weight", "embedding/table")
    p.linear("model.embed_tokens.weight" if tied else "lm_head.weight", "head/w")
    p.same("model.norm.weight", "decoder/norm/scale")
    for layer in range(m.num_layers):
      foreign, own = f"model.layers.{layer}.", f"decoder/{layer:02d}/"
      p.same(f"{foreign}input_layernorm.weight", f"{own}attention_norm/scale")
      p.same(f"{foreign}post_attention_layernorm.weight", f"{own}ffn_norm/scale")
      self.attention(p, m, f"{foreign}self_attn.", f"{own}attention/")
      if layer in sparse_layers(m):
        self.experts(p, m, f"{foreign}{self.sparse}.", f"{own}ffn/", there, f"{foreign}mlp.")
      else:
        self.ffn(p, f"{foreign}mlp.", f"{own}ffn/")
    return p

  def attention(self, p: Pieces, m: ConfigDict, foreign: str, own: str) -> None:
    del m
    for name, letter in (("query", "q"), ("key", "k"), ("value", "v")):
      p.linear(f"{foreign}{letter}_proj.weight", own + name)
      if f"{own}{name}_bias" in p.shapes:
        p.same(f"{foreign}{letter}_proj.bias", f"{own}{name}_bias", flat=True)
      if f"{own}{name}_norm" in p.shapes:
        p.same(f"{foreign}{letter}_norm.weight", f"{own}{name}_norm", flat=True)
    p.linear(f"{foreign}o_proj.weight", f"{own}out", inputs=2)

  def ffn(self, p: Pieces, foreign: str, own: str) -> None:
    for name, theirs in PROJECTIONS.items():
      p.linear(f"{foreign}{theirs}.weight", own + name)

  def experts(self, p: Pieces, m: ConfigDict, foreign: str, own: str, there: Any, fused: str) -> None:
    """`fused`: in front of transformers 5's names in memory, which some files have."""
    E, D, F = p.shapes[f"{own}experts/w_in"]
    together = f"{fused}experts.gate_up_proj"
    p.linear((fused if together in there else foreign) + "gate.weight", f"{own}router/w")
    for e in range(E):
      if together in there:
        shape = E, 2 * F, D
        p.linear(together, f"{own}experts/w_gate", at=(e,), fused=(shape, (e, slice(0, F))))
        p.linear(together, f"{own}experts/w_in", at=(e,), fused=(shape, (e, slice(F, None))))
        p.linear(f"{fused}experts.down_proj", f"{own}experts/w_out", at=(e,), fused=((E, D, F), (e,)))
      else:
        for name, theirs in self.expert.items():
          p.linear(f"{foreign}experts.{e}.{theirs}.weight", f"{own}experts/{name}", at=(e,))
    if self.shared:
      self.ffn(p, f"{foreign}{self.shared}.", f"{own}shared/ffn/")

  def ignored(self, name: str, config: ConfigDict) -> bool:
    """Whether a language model does not need the tensor."""
    del config
    return name.endswith("rotary_emb.inv_freq")


class Mixtral(Decoder):
  name, architecture = "mixtral", "MixtralForCausalLM"
  sparse, expert = "block_sparse_moe", {"w_gate": "w1", "w_in": "w3", "w_out": "w2"}
  eps, theta = 1e-5, 1e6

  def read(self, hf):
    hf.only(sliding_window=None)
    return super().read(hf) | dict(num_experts=hf.count("num_local_experts"))

  def write(self, config):
    m = config.model
    return super().write(config) | dict(
        head_dim=m.head_dim, intermediate_size=expert_dim(m), num_local_experts=m.num_experts,
        sliding_window=None)


class OLMoE(Decoder):
  name, architecture, eps = "olmoe", "OlmoeForCausalLM", 1e-5

  def read(self, hf):
    hf.only(clip_qkv=None, attention_bias=False)
    return _gates(hf, super().read(hf), qk_norm="whole") | dict(num_experts=hf.count("num_experts"))

  def write(self, config):
    m = config.model
    return super().write(config) | dict(
        intermediate_size=expert_dim(m), num_experts=m.num_experts, norm_topk_prob=_renormalized(m),
        clip_qkv=None, attention_bias=False)


class Qwen3MoE(Decoder):
  name, architecture = "qwen3_moe", "Qwen3MoeForCausalLM"
  qk_norm = "head"

  def read(self, hf):
    hf.only(use_sliding_window=False, attention_bias=False)
    model, dense, step = super().read(hf), hf("mlp_only_layers", []), hf.count("decoder_sparse_step", 1)
    layers = tuple(i for i in range(model["num_layers"]) if i not in dense and (i + 1) % step == 0)
    if not layers:
      raise UserError(f"{hf.path}: decoder_sparse_step and mlp_only_layers leave no sparse layer; "
                      "name a sparse checkpoint")
    experts = hf.count("num_experts", hf("num_local_experts", None))
    return _gates(hf, model, qk_norm=self.qk_norm) | dict(
        num_experts=experts, moe_layers=layers, expert_dim=hf.count("moe_intermediate_size"))

  def write(self, config):
    m = config.model
    dense = [i for i in range(m.num_layers) if i not in sparse_layers(m)]
    return super().write(config) | dict(
        head_dim=m.head_dim, moe_intermediate_size=expert_dim(m), num_experts=m.num_experts,
        norm_topk_prob=_renormalized(m), decoder_sparse_step=1, mlp_only_layers=dense, attention_bias=False,
        use_sliding_window=False, sliding_window=None)


class Qwen2MoE(Qwen3MoE):
  name, architecture, shared = "qwen2_moe", "Qwen2MoeForCausalLM", "shared_expert"
  qk_norm = "none"

  def read(self, hf):
    model = super().read(hf)
    width, one = hf.count("shared_expert_intermediate_size"), model["expert_dim"]
    if width % one:
      raise UserError(f"{hf.path}: shared_expert_intermediate_size={width} is no multiple of "
                      f"moe_intermediate_size={one}, which is not supported")
    model["attention"] |= dict(bias=bool(hf("qkv_bias", True)))
    return model | dict(shared_experts=width // one, shared_gate=True)

  def write(self, config):
    m = config.model
    return super().write(config) | dict(
        qkv_bias=bool(m.attention.bias), shared_expert_intermediate_size=m.shared_experts * expert_dim(m))

  def experts(self, p, m, foreign, own, there, fused):
    super().experts(p, m, foreign, own, there, fused)
    p.linear(f"{foreign}shared_expert_gate.weight", f"{own}shared/gate")


class DeepSeekV3(Decoder):
  """DeepSeek-V3. With `rope_interleave`, rotated pairs are reordered to halves and back."""

  name, architecture, shared = "deepseek_v3", "DeepseekV3ForCausalLM", "shared_experts"
  needs: ClassVar = {"name": "decoder", "attention.name": "latent", "router.name": "deepseek_v3"}
  pairs = True

  def read(self, hf):
    hf.only(attention_bias=False, norm_topk_prob=True, topk_method="noaux_tc", scoring_func="sigmoid",
            moe_layer_freq=1)
    self.pairs = bool(hf("rope_interleave", True))
    model, turned = super().read(hf), hf.count("qk_rope_head_dim")
    layers = tuple(range(hf("first_k_dense_replace", 3), model["num_layers"]))
    if not layers:
      raise UserError(f"{hf.path}: first_k_dense_replace leaves no sparse layer; name a sparse checkpoint")
    return model | dict(
        head_dim=hf.count("qk_nope_head_dim") + turned, moe_layers=layers,
        num_experts=hf.count("n_routed_experts"), shared_experts=hf.count("n_shared_experts"),
        expert_dim=hf.count("moe_intermediate_size"),
        attention=dict(name="latent", q_rank=hf("q_lora_rank", None), kv_rank=hf.count("kv_lora_rank"),
                       rope_dim=turned, value_dim=hf.count("v_head_dim")),
        router=dict(name="deepseek_v3", k=hf.count("num_experts_per_tok"), nodes=hf.count("n_group", 1),
                    nodes_per_token=hf.count("topk_group", 1), scale=float(hf("routed_scaling_factor", 2.5))))

  def write(self, config):
    m, given = config.model, outputs_depend_on(config)
    a, r = (lambda name: given[f"attention.{name}"]), (lambda name: given[f"router.{name}"])
    return super().write(config) | dict(
        qk_nope_head_dim=m.head_dim - a("rope_dim"), qk_rope_head_dim=a("rope_dim"),
        v_head_dim=a("value_dim"), q_lora_rank=m.attention.q_rank, kv_lora_rank=a("kv_rank"),
        rope_interleave=True, attention_bias=False,
        first_k_dense_replace=min(sparse_layers(m)), n_routed_experts=m.num_experts,
        n_shared_experts=m.shared_experts, moe_intermediate_size=expert_dim(m), n_group=r("nodes"),
        topk_group=r("nodes_per_token"), routed_scaling_factor=r("scale"), norm_topk_prob=True,
        topk_method="noaux_tc", scoring_func="sigmoid", num_nextn_predict_layers=0)

  def attention(self, p, m, foreign, own):
    shapes = {name.removeprefix(own): shape for name, shape in p.shapes.items() if name.startswith(own)}
    (C, H, n), (_, r), v = shapes["key"], shapes["key_rope"], shapes["value"][-1]
    if "query_in" in shapes:
      p.linear(f"{foreign}q_a_proj.weight", f"{own}query_in")
      p.same(f"{foreign}q_a_layernorm.weight", f"{own}query_norm")
    query = f"{foreign}q_b_proj.weight" if "query_in" in shapes else f"{foreign}q_proj.weight"
    D, whole = shapes["query"][0], slice(None)
    for ours, theirs in [(slice(0, n), slice(0, n)), *self._turned(n, r)]:
      p.add(query, (H * (n + r), D), f"{own}query", (whole, whole, ours), (H, n + r, D), (whole, theirs),
            (2, 0, 1))
    latent, D = f"{foreign}kv_a_proj_with_mqa.weight", shapes["latent_in"][0]
    p.add(latent, (C + r, D), f"{own}latent_in", part=(slice(0, C),), axes=(1, 0))
    for ours, theirs in self._turned(0, r):
      theirs = slice(theirs.start + C, None if theirs.stop is None else theirs.stop + C, theirs.step)
      p.add(latent, (C + r, D), f"{own}key_rope", (whole, ours), part=(theirs,), axes=(1, 0))
    p.same(f"{foreign}kv_a_layernorm.weight", f"{own}latent_norm")
    for name, part in (("key", slice(0, n)), ("value", slice(n, None))):
      p.add(f"{foreign}kv_b_proj.weight", (H * (n + v), C), own + name, view=(H, n + v, C),
            part=(whole, part), axes=(2, 0, 1))
    p.linear(f"{foreign}o_proj.weight", f"{own}out", inputs=2)

  def _turned(self, n: int, r: int) -> list[tuple[slice, slice]]:
    """(ours, theirs) of the rotated part, r wide from n on: halves of ours are every other one of pairs."""
    if not self.pairs:
      return [(slice(n, n + r), slice(n, n + r))]
    return [(slice(n, n + r // 2), slice(n, None, 2)), (slice(n + r // 2, n + r), slice(n + 1, None, 2))]

  def experts(self, p, m, foreign, own, there, fused):
    super().experts(p, m, foreign, own, there, fused)
    p.same(f"{foreign}gate.e_score_correction_bias", f"{own}router/bias_E")

  def ignored(self, name, config):
    """Also the multi-token prediction module, which is stored as one more layer."""
    return super().ignored(name, config) or name.startswith(f"model.layers.{config.model.num_layers}.")


def _gates(hf: Fields, model: dict[str, Any], **attention: Any) -> dict[str, Any]:
  """`model` with the gates of norm_topk_prob."""
  model["router"]["gate"] = "renormalized" if hf("norm_topk_prob", False) else "raw"
  model["attention"] |= attention
  return model


def _renormalized(m: ConfigDict) -> bool:
  return (m.router.gate or "raw") != "raw"
