"""An encoder-decoder on masked spans, small enough to train seventy of: routers in its encoder only.

An encoder sees the whole row, so any router may stand there, those that look at the whole group too.

Command:  python -m sparse_experts train --config=experiments/routers_side_by_side/config_spans.py
          --config.data.source=files:DIR --workdir=DIR
"""

from sparse_experts.config import check_variant, default_config, dense_twin

VARIANTS = ("dense",)


def get_config(arg=None):
  check_variant(arg, VARIANTS)
  config = default_config()

  model = config.model
  model.name = "seq2seq"
  model.num_layers = 2  # of each stack
  model.embed_dim, model.num_heads, model.head_dim = 64, 2, 32
  model.mlp_dim = model.expert_dim = 128
  model.num_experts, model.moe_every = 8, 2
  model.decoder.num_experts = 0
  model.decoder.router.k = 1  # its FFNs are alike, whatever k the encoder's router has
  model.capacity_factor = model.eval_capacity_factor = 0.0  # dropless, as the figure that is reported
  model.group_size = 128  # a row

  config.data.objective = "span_corruption"
  config.data.length, config.data.target_length = 128, 32
  config.data.noise_density, config.data.mean_span = 0.15, 10.0
  config.eval.min_bytes, config.eval.train_windows = 60_000, 64  # masked ones
  config.train.steps, config.train.batch_size = 200, 16
  config.train.eval_every = config.train.checkpoint_every = 200
  return dense_twin(config) if arg == "dense" else config
