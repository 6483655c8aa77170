"""Tiny random checkpoints of Hugging Face transformers with the logits it computes: `tests/convert/data/`.

Not a test; it needs what the package does not: `pip install transformers==5.24.0 torch==2.14.1 safetensors`.
The committed files were made by

    python tests/convert/make_reference.py tests/convert/data

with Python 3.11, transformers 5.24.0, torch 2.14.1 (CPU) and safetensors 0.8.0. Each folder holds
config.json and model.safetensors as `save_pretrained` wrote them, and reference.safetensors with the ids
that went in and the float32 logits that came out.
"""

import pathlib
import sys

import torch
import transformers
from safetensors.torch import save_file

VOCAB, LENGTH = 96, 24
COMMON = dict(
    vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, num_experts_per_tok=2, max_position_embeddings=64)
DEEPSEEK = COMMON | dict(
    num_hidden_layers=3, num_key_value_heads=4, moe_intermediate_size=12, n_routed_experts=4,
    n_shared_experts=2, n_group=2, topk_group=1, first_k_dense_replace=1, q_lora_rank=10, kv_lora_rank=8,
    qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=5, num_mtp_layers=0)
YARN = dict(
    rope_type="yarn", rope_theta=10_000.0, factor=8.0, original_max_position_embeddings=8, beta_fast=4.0,
    beta_slow=1.0, mscale=1.0, mscale_all_dim=0.7)
MODELS = {
    "mixtral": ("Mixtral", COMMON | dict(num_local_experts=4)),
    "olmoe": ("Olmoe", COMMON | dict(num_experts=4)),
    "qwen2_moe": ("Qwen2Moe", COMMON | dict(
        num_experts=4, moe_intermediate_size=8, shared_expert_intermediate_size=16, num_hidden_layers=3,
        mlp_only_layers=[1])),
    "qwen3_moe": ("Qwen3Moe", COMMON | dict(
        num_experts=4, moe_intermediate_size=12, head_dim=6, norm_topk_prob=True, rope_theta=50_000.0,
        num_hidden_layers=3, decoder_sparse_step=2)),
    "deepseek_v3": ("DeepseekV3", DEEPSEEK),
    # No low-rank query, positions stretched by YaRN, halves rather than pairs turned.
    "deepseek_v3_yarn": ("DeepseekV3", DEEPSEEK | dict(
        q_lora_rank=None, rope_parameters=YARN, rope_interleave=False, num_hidden_layers=2)),
    "switch": ("SwitchTransformers", dict(
        vocab_size=VOCAB, d_model=16, d_kv=4, d_ff=24, num_heads=4, num_layers=2, num_decoder_layers=2,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=4,
        expert_capacity=LENGTH)),  # as many as a sequence has tokens: nothing is dropped
    "switch_untied": ("SwitchTransformers", dict(
        vocab_size=VOCAB, d_model=16, d_kv=6, d_ff=12, num_heads=2, num_layers=3, num_decoder_layers=3,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=3, num_experts=4, expert_capacity=LENGTH,
        tie_word_embeddings=False)),
}


def scatter(model, generator):
  """Values of ordinary size everywhere, so that no gain is 1, no bias 0 and no router undecided."""
  for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
    if "inv_freq" in name:
      continue
    noise = torch.randn(tensor.shape, generator=generator)
    if "norm" in name:
      value = 1 + 0.3 * noise
    elif "correction_bias" in name or name.endswith(".bias"):
      value = 0.2 * noise
    elif "gate.weight" in name or "classifier" in name:
      value = noise  # routers
    else:
      value = noise * (1.0 if tensor.ndim < 2 or "embed" in name or "shared.weight" in name else
                       tensor.shape[-1] ** -0.5)
    tensor.data.copy_(value)


def main(folder):
  transformers.logging.set_verbosity_error()
  for seed, (name, (family, fields)) in enumerate(MODELS.items()):
    generator = torch.Generator().manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**fields)
    config._attn_implementation = "eager"
    head = "ForConditionalGeneration" if family == "SwitchTransformers" else "ForCausalLM"
    model = getattr(transformers, family + head)(config).float().eval()
    scatter(model, generator)
    model.tie_weights()
    if family == "SwitchTransformers":  # untied too, encoder and decoder read one table
      for stack in (model.encoder, model.decoder):
        stack.embed_tokens.weight.data.copy_(model.shared.weight)
    ids = torch.randint(3, VOCAB, (2, LENGTH), generator=generator)
    arrays = {"ids": ids.int()}
    with torch.no_grad():
      if head == "ForCausalLM":
        arrays["logits"] = model(input_ids=ids).logits
      else:
        targets = torch.randint(3, VOCAB, (2, LENGTH // 2), generator=generator)
        targets[:, 0] = 0
        mask = torch.ones_like(ids)
        mask[1, -5:] = 0
        arrays |= {"decoder_ids": targets.int(), "mask": mask.int()}
        arrays["logits"] = model(input_ids=ids, attention_mask=mask, decoder_input_ids=targets).logits
    path = pathlib.Path(folder) / name
    model.save_pretrained(path, safe_serialization=True)
    (path / "generation_config.json").unlink(missing_ok=True)
    save_file({key: value.contiguous() for key, value in arrays.items()}, path / "reference.safetensors")
    print(name, sum(p.numel() for p in model.parameters()), arrays["logits"].std().item())


if __name__ == "__main__":
  main(sys.argv[1])
