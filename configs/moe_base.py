"""MoE-Base: Switch-Base's rival, T5-Base with top-2 routing as GShard's over 128 experts; three capacities.

Paper:    Fedus et al. 2021, Switch Transformers (https://arxiv.org/abs/2101.03961): table of MoE against
          Switch at 128 experts and equal hardware; top-2 as in GShard (https://arxiv.org/abs/2006.16668)
Command:  python -m sparse_experts train --config=configs/moe_base.py --workdir=runs/moe_base
          --config.data.dir=DIR --config.data.tokenizer=T5.model
Hardware: v5e:4x4, 16 chips: eight experts of each layer on each
Minutes:  not run here
Expect:   negative log perplexity after 100k steps -1.547 at capacity 2.0, -1.559 at 1.25 (`:cf1_25`), -1.572
          at 1.0 (`:cf1`); not run here

Capacity counts slots per token, not per choice: at 2.0 an even load fits. Routing is Mesh TensorFlow's top-2,
the code of the paper: both gates divided by their sum, then the second expert used with probability gate /
0.2 (drawn in evaluation too there, here in training only). Batches are the full runs' 2^20 tokens; the
benchmark's are not known to us.
"""

from sparse_experts.config import check_variant, t5_config

VARIANTS = ("cf1_25", "cf1")


def get_config(arg=None):
  check_variant(arg, VARIANTS)
  config = t5_config()
  model = config.model
  model.num_layers = 12
  model.embed_dim, model.num_heads, model.head_dim, model.mlp_dim = 768, 12, 64, 2048
  model.num_experts = 128
  model.moe_every = 2
  model.router.k = 2
  model.router.gate = "renormalized"
  model.router.order = "choice"
  model.router.skip_threshold = 0.2
  model.router.balance_count = "first"
  model.router.load_balance_weight = 1e-2
  model.expert_init_scale = 0.1
  model.capacity_rule = "mesh"
  model.capacity_factor, model.eval_capacity_factor = {None: 2.0, "cf1_25": 1.25, "cf1": 1.0}[arg], 2.0
  model.group_size = 8192  # 128 groups of 2048 x 512 encoder tokens
  model.decoder.group_size = 1824  # 128 groups of 2048 x 114 decoder tokens

  config.train.steps = 100_000
  config.train.layer_losses = "sum"
  config.train.accumulate = 4
  config.mesh.update({"expert": 16})
  return config
