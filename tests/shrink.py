"""The same kind of run in seconds: small widths, few tokens, every choice kept."""

import copy

from ml_collections import ConfigDict

from sparse_experts.config import image_tokens


def shrink(config: ConfigDict) -> ConfigDict:
  """A copy of `config` with the same names, rules and sparse kinds of layers, on 4 rows of 32 tokens."""
  config = copy.deepcopy(config).unlock()
  model, data, train = config.model, config.data, config.train
  model.num_layers, model.moe_every, model.moe_layers = 2, 2, ()
  model.decoder.moe_every = model.decoder.moe_layers = None
  model.embed_dim, model.num_heads, model.head_dim, model.mlp_dim = 16, 2, 8, 32
  if model.expert_dim:
    model.expert_dim = 16
  most = max(model.router.k or 1, model.decoder.router.k or 1, 4)
  model.num_experts = min(model.num_experts, most)
  if model.decoder.num_experts:
    model.decoder.num_experts = min(model.decoder.num_experts, most)
  data.length, data.target_length = 32, 16 if data.objective == "span_corruption" else None
  data.source, data.tokenizer = "embedded", "bytes"
  model.group_size = 64  # 2 groups of the encoder's or the only stack's tokens
  if model.name == "vit":
    data.image.size, data.image.classes, model.patch_size = 8, None, 4
    model.representation_dim = min(model.representation_dim, 16)
    model.group_size = 2 * image_tokens(config)
  if model.name == "limoe":
    data.image.size, data.length, data.tokenizer = 8, 12, "words"
    model.group_size = 2 * (image_tokens(config) + data.length)
  model.decoder.group_size = 32 if model.name == "seq2seq" else None  # 2 groups of 4 x 16 targets
  train.batch_size, train.accumulate, train.steps = 4, 1, 2
  config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, 1)  # else a step may be below rounding
  config.eval.batch_size, config.eval.train_windows, config.eval.min_bytes = 4, 4, 100
  config.mesh.update({"data": 1, "expert": 1, "model": 1, "fsdp": False})
  return config.lock()
