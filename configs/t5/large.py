"""T5.1.1-Large, the dense encoder-decoder that Switch's large models are compared with.

Paper:    Raffel et al. 2019, T5 (https://arxiv.org/abs/1910.10683); shape and numbers as in Fedus et al.
          2021, Switch Transformers (https://arxiv.org/abs/2101.03961): 0.7B parameters, 425B FLOPs per
          sequence
Command:  python -m sparse_experts train --config=configs/t5/large.py --workdir=runs/t5_large
          --config.data.dir=DIR --config.data.tokenizer=T5.model
Hardware: v5e:4x4, 16 chips
Minutes:  not run here
Expect:   negative log perplexity -1.402 after 250k steps, -1.350 after 500k in the paper; not run here

Its shape computes to 783M parameters (751M with a tied head); the paper prints 0.7B, which neither rounds to.
"""

from sparse_experts.config import t5_config


def get_config():
  config = t5_config()
  model = config.model
  model.num_layers = 24
  model.embed_dim, model.num_heads, model.head_dim, model.mlp_dim = 1024, 16, 64, 2816
  config.train.steps = 550_000
  config.train.accumulate = 8
  config.mesh.update({"data": 16, "fsdp": True})
  return config
