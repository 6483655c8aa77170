"""Decoder-only checkpoints: Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE and DeepSeek-V3.

All have RMSNorm before each sub-layer, rotary positions, gated experts without biases and, as a rule, an
untied head; a subclass holds what differs. A config.json that asks for more (a sliding window, clipped
values, biases) is refused, and the message names the field.
"""

from typing import Any, ClassVar

from sparse_experts.config import ConfigDict
from sparse_experts.convert.fields import GATED, Fields, balance_coefficient, rope_fields, sparse_layers
from sparse_experts.convert.pieces import Pieces, Shape
from sparse_experts.errors import UserError

PROJECTIONS = {"w_gate": "gate_proj", "w_in": "up_proj", "w_out": "down_proj"}


class Decoder:
  """What the families share. `name` is config.json's model_type."""

  name: str
  architecture: str
  # Keys of config.model, and the values that this layout needs.
  needs: ClassVar = {"name": "decoder", "attention.name": "multi_head", "router.name": "top_k"}
  # Fields that are one of our keys as they stand, and fields of which one value is supported.
  fields: ClassVar[dict[str, str]] = {
      "hidden_size": "embed_dim", "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads",
      "intermediate_size": "mlp_dim", "num_experts_per_tok": "router.k", "rms_norm_eps": "norm_eps"}
  fixed: ClassVar[dict[str, Any]] = {}
  sparse = "mlp"  # what a sparse layer's tensors are called
  expert = PROJECTIONS
  shared = ""  # and its shared experts' FFN
  qk_norm: str | None = None
  chooses_gate = False  # whether norm_topk_prob says if gates are renormalized; otherwise they are
  tied = False  # whether the checkpoint's head is tied; ours is never tied, as a tied head of ours is scaled

  # Config.

  def read(self, hf: Fields) -> dict[str, Any]:
    """{key of `config.model`: value} of the foreign fields."""
    hf.only(**self.fixed)
    self.tied = hf("tie_word_embeddings")
    model = self.needs | hf.read(self.fields) | hf.rope() | dict(
        activation=hf.activation("hidden_act", GATED), tied_head=False, moe_every=1)
    model["head_dim"] = hf("head_dim") or model["embed_dim"] // model["num_heads"]
    return model | self.read_layers(hf, model)

  def read_layers(self, hf: Fields, model: dict[str, Any]) -> dict[str, Any]:
    """The keys of attention and router."""
    heads = hf("num_key_value_heads") or model["num_heads"]
    renormalized = not self.chooses_gate or hf("norm_topk_prob")
    return {"attention.num_kv_heads": None if heads == model["num_heads"] else heads,
            "attention.qk_norm": self.qk_norm, "router.gate": "renormalized" if renormalized else "raw",
            "router.balance_count": "multi_hot",
            "router.load_balance_weight": hf("router_aux_loss_coef")}

  def write(self, given: dict[str, Any]) -> dict[str, Any]:
    """The foreign fields of {key of `config.model`: value}, defaults written out, as `read` reads them."""
    fields = self.fixed | {theirs: given[ours] for theirs, ours in self.fields.items()}
    if self.chooses_gate:
      fields["norm_topk_prob"] = given["router.gate"] != "raw"
    fields["hidden_act"] = GATED.get(given["activation"], ("silu",))[0]
    if given["router.name"] == "top_k":
      fields["router_aux_loss_coef"] = balance_coefficient(given)
    return fields | rope_fields(given) | dict(
        num_key_value_heads=given["attention.num_kv_heads"] or given["num_heads"], tie_word_embeddings=False)

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
      self.attention(p, f"{foreign}self_attn.", f"{own}attention/")
      if layer in sparse_layers(m):
        self.experts(p, f"{foreign}{self.sparse}.", f"{own}ffn/", there, f"{foreign}mlp.")
      else:
        self.ffn(p, f"{foreign}mlp.", f"{own}ffn/")
    return p

  def attention(self, p: Pieces, foreign: str, own: str) -> None:
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

  def experts(self, p: Pieces, foreign: str, own: str, there: Any, fused: str) -> None:
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
    return name.endswith("rotary_emb.inv_freq")


class Mixtral(Decoder):
  name, architecture = "mixtral", "MixtralForCausalLM"
  # In transformers, the noise that multiplies the router's input in training is in the experts' too.
  fields: ClassVar[dict[str, str]] = Decoder.fields | {
      "num_local_experts": "num_experts", "router_jitter_noise": "router.jitter"}
  fixed: ClassVar[dict[str, Any]] = {"sliding_window": None}
  sparse, expert = "block_sparse_moe", {"w_gate": "w1", "w_in": "w3", "w_out": "w2"}

  def write(self, given):
    return super().write(given) | dict(
        head_dim=given["head_dim"], intermediate_size=given["expert_dim"],
        router_jitter_noise=given["router.jitter"] or 0.0)


class OLMoE(Decoder):
  name, architecture = "olmoe", "OlmoeForCausalLM"
  fields: ClassVar[dict[str, str]] = Decoder.fields | {"num_experts": "num_experts"}
  fixed: ClassVar[dict[str, Any]] = {"clip_qkv": None, "attention_bias": False}
  qk_norm, chooses_gate = "whole", True

  def write(self, given):
    return super().write(given) | dict(intermediate_size=given["expert_dim"])


class Qwen3MoE(Decoder):
  name, architecture = "qwen3_moe", "Qwen3MoeForCausalLM"
  fields: ClassVar[dict[str, str]] = Decoder.fields | {
      "num_experts": "num_experts", "moe_intermediate_size": "expert_dim"}
  fixed: ClassVar[dict[str, Any]] = {"use_sliding_window": False, "attention_bias": False}
  qk_norm, chooses_gate = "head", True

  def read(self, hf):
    model, dense, step = super().read(hf), hf("mlp_only_layers") or [], hf("decoder_sparse_step")
    layers = tuple(i for i in range(model["num_layers"]) if i not in dense and (i + 1) % step == 0)
    if not layers:
      raise UserError(f"{hf.path}: decoder_sparse_step and mlp_only_layers leave no sparse layer; "
                      "name a sparse checkpoint")
    return model | dict(moe_layers=layers)

  def write(self, given):
    dense = [i for i in range(given["num_layers"]) if i not in given["moe_layers"]["decoder"]]
    return super().write(given) | dict(
        head_dim=given["head_dim"], decoder_sparse_step=1, mlp_only_layers=dense, sliding_window=None)


class Qwen2MoE(Qwen3MoE):
  name, architecture, shared = "qwen2_moe", "Qwen2MoeForCausalLM", "shared_expert"
  fields: ClassVar[dict[str, str]] = Qwen3MoE.fields | {
      "qkv_bias": "attention.bias", "shared_expert_intermediate_size": "shared_dim"}
  fixed: ClassVar[dict[str, Any]] = {"use_sliding_window": False}
  qk_norm = "none"

  def read(self, hf):
    return super().read(hf) | dict(shared_experts=1, shared_gate=True)

  def experts(self, p, foreign, own, there, fused):
    super().experts(p, foreign, own, there, fused)
    p.linear(f"{foreign}shared_expert_gate.weight", f"{own}shared/gate")


class DeepSeekV3(Decoder):
  """DeepSeek-V3. With `rope_interleave`, rotated pairs are reordered to halves and back."""

  name, architecture, shared = "deepseek_v3", "DeepseekV3ForCausalLM", "shared_experts"
  needs: ClassVar = {"name": "decoder", "attention.name": "latent", "router.name": "deepseek_v3"}
  fields: ClassVar[dict[str, str]] = Decoder.fields | {
      "n_routed_experts": "num_experts", "n_shared_experts": "shared_experts",
      "moe_intermediate_size": "expert_dim", "kv_lora_rank": "attention.kv_rank",
      "q_lora_rank": "attention.q_rank", "qk_rope_head_dim": "attention.rope_dim",
      "v_head_dim": "attention.value_dim", "n_group": "router.nodes", "topk_group": "router.nodes_per_token",
      "routed_scaling_factor": "router.scale"}
  fixed: ClassVar[dict[str, Any]] = {
      "attention_bias": False, "norm_topk_prob": True, "topk_method": "noaux_tc", "scoring_func": "sigmoid"}
  pairs = True

  def read_layers(self, hf, model):
    hf.only(moe_layer_freq=1)
    self.pairs = hf("rope_interleave")
    layers = tuple(range(hf("first_k_dense_replace"), model["num_layers"]))
    if not layers:
      raise UserError(f"{hf.path}: first_k_dense_replace leaves no sparse layer; name a sparse checkpoint")
    return {"moe_layers": layers, "head_dim": hf("qk_nope_head_dim") + model["attention.rope_dim"]}

  def write(self, given):
    return super().write(given) | dict(
        qk_nope_head_dim=given["head_dim"] - given["attention.rope_dim"], rope_interleave=True,
        num_nextn_predict_layers=0, n_shared_experts=max(given["shared_dim"] // given["expert_dim"], 1),
        first_k_dense_replace=min(given["moe_layers"]["decoder"]))

  def attention(self, p, foreign, own):
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

  def experts(self, p, foreign, own, there, fused):
    super().experts(p, foreign, own, there, fused)
    p.same(f"{foreign}gate.e_score_correction_bias", f"{own}router/bias_E")

  def ignored(self, name, config):
    """Also the multi-token prediction module, which is stored as one more layer."""
    return super().ignored(name, config) or name.startswith(f"model.layers.{config.model.num_layers}.")
