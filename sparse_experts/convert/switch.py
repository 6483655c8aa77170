"""Switch Transformers: T5's encoder-decoder whose experts are FFNs without gate (Fedus et al. 2021).

Hugging Face's model drops tokens beyond `expert_capacity` slots per sequence: `model.capacity_slots`, which
training and evaluation at capacity have. The primary evaluation and sampling are dropless.
"""

from typing import Any, ClassVar

from sparse_experts.config import ConfigDict
from sparse_experts.convert.fields import PLAIN, Fields, balance_coefficient, sparse_layers
from sparse_experts.convert.pieces import Pieces, Shape
from sparse_experts.errors import UserError

STACKS = {"encoder": "moe_layers", "decoder": "decoder.moe_layers"}  # -> the key of its sparse layers


class Switch:
  name, architecture = "switch_transformers", "SwitchTransformersForConditionalGeneration"
  shared = ""
  needs: ClassVar = {"name": "seq2seq", "attention.name": "multi_head", "router.name": "top_k"}

  # As of a Decoder.
  fields: ClassVar[dict[str, str]] = {
      "num_layers": "num_layers", "d_model": "embed_dim", "num_heads": "num_heads", "d_kv": "head_dim",
      "d_ff": "mlp_dim", "num_experts": "num_experts", "layer_norm_epsilon": "norm_eps",
      "tie_word_embeddings": "tied_head", "dropout_rate": "dropout", "router_jitter_noise": "router.jitter",
      "relative_attention_num_buckets": "relative_bias.num_buckets",
      "relative_attention_max_distance": "relative_bias.max_distance"}
  fixed: ClassVar[dict[str, Any]] = {"router_bias": False}

  def read(self, hf: Fields) -> dict[str, Any]:
    hf.only(**self.fixed)
    model = hf.read(self.fields)
    if hf("num_decoder_layers") not in (model["num_layers"], None):
      hf.only(num_decoder_layers=model["num_layers"])
    for stack, key in STACKS.items():
      step = hf(f"{stack}_sparse_step")
      if step is None:
        step = model["num_layers"] // (hf(f"num_sparse_{stack}_layers") or 1)
      model[key] = tuple(i for i in range(model["num_layers"]) if step == 1 or (step > 0 and i % step == 1))
      if not model[key]:
        raise UserError(f"{hf.path}: {stack}_sparse_step={step} leaves no sparse layer, which is not "
                        "supported")
    return self.needs | model | {
        "capacity_slots": hf("expert_capacity"),
        "activation": hf.activation("dense_act_fn", PLAIN), "router.k": 1, "router.gate": "raw",
        "router.load_balance_weight": hf("router_aux_loss_coef"), "router.z_weight": hf("router_z_loss_coef")}

  def write(self, given: dict[str, Any]) -> dict[str, Any]:
    fields = self.fixed | {theirs: given[ours] for theirs, ours in self.fields.items()} | dict(
        d_ff=given["expert_dim"], expert_capacity=given["capacity_slots"] or given["group_size"],
        num_decoder_layers=given["num_layers"], is_encoder_decoder=True,
        dense_act_fn=PLAIN.get(given["activation"], (given["activation"],))[0],
        router_jitter_noise=given["router.jitter"] or 0.0, router_aux_loss_coef=balance_coefficient(given),
        router_z_loss_coef=given["router.z_weight"] or 0.0, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0)
    for stack in STACKS:
      count = max(len(given["moe_layers"][stack]), 1)
      fields |= {f"num_sparse_{stack}_layers": count, f"{stack}_sparse_step": given["num_layers"] // count}
    return fields

  def pieces(self, config: ConfigDict, shapes: dict[str, Shape], there: Any = ()) -> Pieces:
    m, p = config.model, Pieces(shapes)
    p.same("shared.weight", "embedding/table")
    for stack in STACKS:
      # Older files hold the tied table several times; untied, newer transformers ask for it.
      p.same(f"{stack}.embed_tokens.weight", "embedding/table", copy=True, spare=m.tied_head)
    if m.tied_head:
      p.same("lm_head.weight", "embedding/table", copy=True, spare=True)
    else:
      p.linear("lm_head.weight", "head/w")
    for stack in STACKS:
      p.same(f"{stack}.final_layer_norm.weight", f"{stack}/norm/scale")
      p.same(f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
             f"{stack}/position_bias/table")
      for layer in range(m.num_layers):
        self._block(p, stack, f"{stack}.block.{layer}.layer.", f"{stack}/{layer:02d}/",
                    layer in sparse_layers(m, stack))
    return p

  def _block(self, p: Pieces, stack: str, foreign: str, own: str, is_sparse: bool) -> None:
    parts = [("SelfAttention", "attention")] + [("EncDecAttention", "cross")] * (stack == "decoder")
    for i, (theirs, ours) in enumerate(parts):
      p.same(f"{foreign}{i}.layer_norm.weight", f"{own}{ours}_norm/scale")
      for name, letter in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o")):
        p.linear(f"{foreign}{i}.{theirs}.{letter}.weight", f"{own}{ours}/{name}", inputs=1 + (name == "out"))
    foreign = f"{foreign}{len(parts)}."
    p.same(f"{foreign}layer_norm.weight", f"{own}ffn_norm/scale")
    if not is_sparse:
      for name, theirs in (("w_in", "wi"), ("w_out", "wo")):
        p.linear(f"{foreign}mlp.{theirs}.weight", f"{own}ffn/{name}")
      return
    p.linear(f"{foreign}mlp.router.classifier.weight", f"{own}ffn/router/w")
    for e in range(p.shapes[f"{own}ffn/experts/w_in"][0]):
      for name, theirs in (("w_in", "wi"), ("w_out", "wo")):
        p.linear(f"{foreign}mlp.experts.expert_{e}.{theirs}.weight", f"{own}ffn/experts/{name}", at=(e,))

  def ignored(self, name: str, config: ConfigDict) -> bool:
    return False
