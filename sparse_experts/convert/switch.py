"""Switch Transformers: T5's encoder-decoder whose experts are FFNs without gate (Fedus et al. 2021).

Hugging Face's model drops tokens beyond `expert_capacity` slots per sequence; the converted model is
dropless, as are evaluation and sampling.
"""

from typing import Any, ClassVar

from ml_collections import ConfigDict

from sparse_experts.convert.fields import Fields, expert_dim, sparse_layers
from sparse_experts.convert.pieces import Pieces, Shape
from sparse_experts.errors import UserError
from sparse_experts.models.attention import MAX_DISTANCE, NUM_BUCKETS

ACTIVATIONS = {"relu": "relu", "gelu_new": "gelu"}
STACKS = ("encoder", "decoder")


class Switch:
  name, architecture = "switch_transformers", "SwitchTransformersForConditionalGeneration"
  shared = ""
  needs: ClassVar = {"name": "seq2seq", "attention.name": "multi_head", "router.name": "top_k"}

  def read(self, hf: Fields) -> dict[str, Any]:
    hf.only(router_bias=False, relative_attention_num_buckets=NUM_BUCKETS,
            relative_attention_max_distance=MAX_DISTANCE)
    layers, activation = hf.count("num_layers"), hf("dense_act_fn", "relu")
    hf.only(num_decoder_layers=layers)
    if activation not in ACTIVATIONS:
      raise UserError(f"{hf.path}: dense_act_fn='{activation}' is not supported; "
                      f"{' and '.join(ACTIVATIONS)} are")
    sparse = {}
    for stack in STACKS:
      step = layers // (hf(f"num_sparse_{stack}_layers", 3) or 1)
      step = hf(f"{stack}_sparse_step", step)
      sparse[stack] = tuple(i for i in range(layers) if step == 1 or (step > 0 and i % step == 1))
      if not sparse[stack]:
        raise UserError(f"{hf.path}: {stack}_sparse_step={step} leaves no sparse layer, which is not "
                        "supported")
    return dict(
        name="seq2seq", num_layers=layers, embed_dim=hf.count("d_model"), num_heads=hf.count("num_heads"),
        head_dim=hf.count("d_kv"), mlp_dim=hf.count("d_ff"), activation=ACTIVATIONS[activation],
        tied_head=bool(hf("tie_word_embeddings", True)), norm_eps=float(hf("layer_norm_epsilon", 1e-6)),
        num_experts=hf.count("num_experts"), moe_layers=sparse["encoder"],
        decoder=dict(moe_layers=sparse["decoder"]), dropout=float(hf("dropout_rate", 0.1)),
        router=dict(name="top_k", k=1, gate="raw", jitter=float(hf("router_jitter_noise", 0.01)),
                    load_balance_weight=float(hf("router_aux_loss_coef", 0.001)),
                    z_weight=float(hf("router_z_loss_coef", 0.001))))

  def write(self, config: ConfigDict) -> dict[str, Any]:
    m = config.model
    fields = dict(
        d_model=m.embed_dim, d_kv=m.head_dim, d_ff=expert_dim(m), num_heads=m.num_heads,
        num_layers=m.num_layers, num_decoder_layers=m.num_layers, num_experts=m.num_experts,
        layer_norm_epsilon=m.norm_eps,
        dense_act_fn={ours: theirs for theirs, ours in ACTIVATIONS.items()}.get(m.activation, m.activation),
        tie_word_embeddings=m.tied_head, dropout_rate=m.dropout, router_bias=False, is_encoder_decoder=True,
        relative_attention_num_buckets=NUM_BUCKETS, relative_attention_max_distance=MAX_DISTANCE,
        router_jitter_noise=m.router.jitter or 0.0, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
    for stack in STACKS:
      sparse = sparse_layers(m, stack)
      count = max(len(sparse), 1)
      fields |= {f"num_sparse_{stack}_layers": count, f"{stack}_sparse_step": m.num_layers // count}
    return fields

  def pieces(self, config: ConfigDict, shapes: dict[str, Shape], there: Any = ()) -> Pieces:
    del there
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
    del name, config
    return False
