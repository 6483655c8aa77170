"""ST-MoE-32B: 269 billion parameters, 24+24 layers, every fourth FFN sparse with 64 experts.

Paper:    Zoph et al. 2022, ST-MoE (https://arxiv.org/abs/2202.08906): 269B parameters, 20.2T FLOPs per
          sequence; top-2, second expert used with probability gate / 0.2, router z-loss 0.001, capacity 1.25
Command:  python -m sparse_experts train --config=configs/st_moe/st_moe_32b.py --workdir=runs/st_moe_32b
          --config.data.dir=DIR --config.data.tokenizer=T5.model
Hardware: v5p:4x4x4, 64 chips: one expert of each layer on each, the paper's advice
Minutes:  not run here
Expect:   the paper reports fine-tuned models (SuperGLUE 91.2); not run here

1.5T tokens of a mixture that is not public (0.17 of it C4, which stands for it here). `:released` has the
public code's conventions: raw gates, every second expert used, losses averaged over layers; it has no expert
biases that we know of.
"""

from sparse_experts.config import check_variant, t5_config

VARIANTS = ("released",)


def get_config(arg=None):
  check_variant(arg, VARIANTS)
  config = t5_config()
  model = config.model
  model.num_layers = 24
  model.embed_dim, model.num_heads, model.head_dim, model.mlp_dim = 5120, 64, 128, 20480
  model.num_experts = 64
  model.moe_every = 4  # layers 3, 7, ... 23
  model.extra_ffn = model.multiplicative_bias = True
  model.router.k = 2
  model.router.gate = "renormalized"
  model.router.skip_threshold = 0.2
  model.router.order = "choice"
  model.router.balance_count = "first"
  model.router.load_balance_weight, model.router.z_weight = 1e-2, 1e-3
  model.expert_init_scale = 0.1
  model.capacity_rule = "mesh"
  model.capacity_factor, model.eval_capacity_factor = 1.25, 2.0
  model.group_size = 4096  # 256 groups of 2048 x 512 encoder tokens
  model.decoder.group_size = 3648  # 64 groups of 2048 x 114 decoder tokens

  config.optimizer.schedule = "rsqrt"  # with a warm-up, unlike T5
  config.train.steps = 1_430_000  # of 2^20 tokens
  config.train.layer_losses = "sum"
  config.mesh.update({"expert": 64, "fsdp": True})
  if arg == "released":
    model.multiplicative_bias = False
    model.router.gate, model.router.skip_threshold = "raw", 0.0
    model.router.balance_count = "multi_hot"
    model.capacity_rule = "flaxformer"
    config.train.layer_losses = "mean"
  return config
