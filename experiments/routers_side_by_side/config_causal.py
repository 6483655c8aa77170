"""A byte-level language model small enough to train seventy of: two layers, the second one sparse.

Command:  python -m sparse_experts train --config=experiments/routers_side_by_side/config_causal.py
          --config.data.source=files:DIR --workdir=DIR
"""

from sparse_experts.config import check_variant, default_config, dense_twin

VARIANTS = ("dense",)


def get_config(arg=None):
  check_variant(arg, VARIANTS)
  config = default_config()

  model = config.model
  model.name = "decoder"
  model.num_layers = 2
  model.embed_dim, model.num_heads, model.head_dim = 64, 2, 32
  model.mlp_dim = model.expert_dim = 128
  model.num_experts, model.moe_every = 8, 2
  model.capacity_factor = model.eval_capacity_factor = 0.0  # dropless, as the figure that is reported
  model.group_size = 128  # a row

  config.data.length = 128
  config.eval.min_bytes, config.eval.train_windows = 300_000, 64
  config.train.steps, config.train.batch_size = 200, 16
  config.train.eval_every = config.train.checkpoint_every = 200
  return dense_twin(config) if arg == "dense" else config
