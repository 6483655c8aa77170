"""T5.1.1-XXL, the dense encoder-decoder that Switch's xxl models are compared with.

Paper:    Raffel et al. 2019, T5 (https://arxiv.org/abs/1910.10683); shape and numbers as in Fedus et al.
          2021, Switch Transformers (https://arxiv.org/abs/2101.03961): 11B parameters, 6.3T FLOPs per
          sequence
Command:  python -m sparse_experts train --config=configs/t5/xxl.py --workdir=runs/t5_xxl
          --config.data.dir=DIR --config.data.tokenizer=T5.model
Hardware: v5p:4x4x4, 64 chips
Minutes:  not run here
Expect:   negative log perplexity -1.147 after 250k steps, -1.095 after 500k in the paper; not run here

Embedding and head are untied, as in T5.1.1.
"""

from sparse_experts.config import t5_config


def get_config():
  config = t5_config()
  model = config.model
  model.num_layers = 24
  model.embed_dim, model.num_heads, model.head_dim, model.mlp_dim = 4096, 64, 64, 10240
  config.train.steps = 550_000
  config.mesh.update({"data": 64, "fsdp": True})
  return config
