"""ST-MoE's routing in small: top-2 with renormalised gates, a skipped second expert and the router z-loss.

Paper:    Zoph et al. 2022, ST-MoE (https://arxiv.org/abs/2202.08906), section 3: top-2 as in
          GShard (gates renormalised, second expert used with probability gate / 0.2), z-loss 0.001, balance
          loss 0.01, capacity 1.25 in training and 2.0 in evaluation (slots per token, not per choice: some
          second choices are dropped even when the load is even), Adafactor
Command:  python -m sparse_experts train --config=configs/st_moe/tiny.py --workdir=runs/st_moe_tiny
Hardware: two CPU cores
Minutes:  2.5, compiling and the final evaluation included
Expect:   1.679 nats per byte (seed 0, one run) on the library of Python 3.11.7, 1.61 below the unigram
          entropy of the same targets

A decoder-only byte model stands in for the paper's encoder-decoder. The twin of `:dense` has hidden
width k x expert_dim, so both do the same work per token but for the router.
"""

from sparse_experts.config import check_variant, default_config, dense_twin

VARIANTS = ("dense",)


def get_config(arg=None):
  check_variant(arg, VARIANTS)
  config = default_config()

  model = config.model
  model.name = "decoder"
  model.num_layers = 4
  model.embed_dim, model.num_heads, model.head_dim = 128, 2, 64
  model.mlp_dim = 256
  model.activation = "geglu"
  model.num_experts = 16
  model.moe_every = 4  # ST-MoE: every fourth FFN is sparse
  model.expert_dim = 128
  model.router.k = 2
  model.router.gate = "renormalized"
  model.router.skip_threshold = 0.2
  model.router.load_balance_weight = 1e-2
  model.router.z_weight = 1e-3
  model.capacity_rule = "flaxformer"
  model.capacity_factor, model.eval_capacity_factor = 1.25, 2.0
  model.group_size = 512

  optimizer = config.optimizer
  optimizer.name = "adafactor"
  optimizer.schedule = "rsqrt"
  optimizer.learning_rate, optimizer.warmup_steps = 3e-2, 100
  optimizer.weight_decay = 0.0
  config.train.steps, config.train.batch_size = 250, 16
  config.train.layer_losses = "mean"
  return dense_twin(config) if arg == "dense" else config
