"""T5.1.1-Base, the dense encoder-decoder that Switch's base models are compared with.

Paper:    Raffel et al. 2019, T5 (https://arxiv.org/abs/1910.10683); shape and numbers as in Fedus et al.
          2021, Switch Transformers (https://arxiv.org/abs/2101.03961): 0.2B parameters, 124B FLOPs per
          sequence
Command:  python -m sparse_experts train --config=configs/t5/base.py --workdir=runs/t5_base
          --config.data.dir=DIR --config.data.tokenizer=T5.model
Hardware: v5e:4x4, 16 chips
Minutes:  not run here
Expect:   negative log perplexity -1.599 after 250k steps, -1.556 after 500k in the paper; not run here

`:tied` shares embedding and head, which gives the 223M parameters of Switch's distilled student.
"""

from sparse_experts.config import check_variant, t5_config

VARIANTS = ("tied",)


def get_config(arg=None):
  check_variant(arg, VARIANTS)
  config = t5_config()
  model = config.model
  model.num_layers = 12
  model.embed_dim, model.num_heads, model.head_dim, model.mlp_dim = 768, 12, 64, 2048
  config.train.steps = 550_000
  config.train.accumulate = 4
  if arg == "tied":
    model.tied_head = True
  config.mesh.data = 16
  return config
