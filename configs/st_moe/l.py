"""ST-MoE-L: 24+24 layers, every fourth FFN sparse with 32 experts and followed by a dense one.

Paper:    Zoph et al. 2022, ST-MoE (https://arxiv.org/abs/2202.08906): 4.1B parameters, 645B FLOPs per
          sequence; top-2, second expert used with probability gate / 0.2, router z-loss 0.001, capacity 1.25
Command:  python -m sparse_experts train --config=configs/st_moe/l.py --workdir=runs/st_moe_l
          --config.data.dir=DIR --config.data.tokenizer=T5.model
Hardware: v5e:4x4, 16 chips: two experts of each layer on each
Minutes:  not run here
Expect:   negative log perplexity -1.361 after 100k steps of 2^20 tokens in the paper, dense model -1.474; not
          run here

The paper's table counts 27 layers: 24 of attention and FFN, of which six are sparse, and the work of six more
FFNs. Its expert biases multiply the hidden units. Gates are divided by their sum before the second expert's
draw.
"""

from sparse_experts.config import t5_config


def get_config():
  config = t5_config()
  model = config.model
  model.num_layers = 24
  model.embed_dim, model.num_heads, model.head_dim, model.mlp_dim = 1024, 16, 64, 2816
  model.num_experts = 32
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
  model.group_size = 2048  # 512 groups of 2048 x 512 encoder tokens
  model.decoder.group_size = 456  # 512 groups of 2048 x 114 decoder tokens

  config.optimizer.schedule = "rsqrt"  # with a warm-up, unlike T5
  config.train.steps = 500_000
  config.train.layer_losses = "sum"
  config.train.accumulate = 4
  config.mesh.update({"expert": 16, "fsdp": True})
  return config
