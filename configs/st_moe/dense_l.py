"""Dense-L: the dense model that ST-MoE-L is compared with, as costly per token.

Paper:    Zoph et al. 2022, ST-MoE (https://arxiv.org/abs/2202.08906): 0.8B parameters, 645B FLOPs per
          sequence, 27 layers
Command:  python -m sparse_experts train --config=configs/st_moe/dense_l.py --workdir=runs/st_moe_dense_l
          --config.data.dir=DIR --config.data.tokenizer=T5.model
Hardware: v5e:4x4, 16 chips
Minutes:  not run here
Expect:   negative log perplexity -1.474 after 100k steps of 2^20 tokens in the paper; not run here

27 layers in encoder and decoder compute to 873M parameters (840M with a tied head), which do not round to the
paper's 0.8B.
"""

from sparse_experts.config import t5_config


def get_config():
  config = t5_config()
  model = config.model
  model.num_layers = 27
  model.embed_dim, model.num_heads, model.head_dim, model.mlp_dim = 1024, 16, 64, 2816
  config.optimizer.schedule = "rsqrt"  # with a warm-up, unlike T5
  config.train.steps = 500_000
  config.train.accumulate = 8
  config.mesh.update({"data": 16, "fsdp": True})
  return config
