"""Switch-C: 1.6 trillion parameters, every FFN sparse with 2048 experts; and the released shape.

Paper:    Fedus et al. 2021, Switch Transformers (https://arxiv.org/abs/2101.03961): 1571B parameters, 890B
          FLOPs per sequence; top-1, raw probability as gate, input jitter, balance loss 0.01
Command:  python -m sparse_experts train --config=configs/switch/c.py --workdir=runs/switch_c
          --config.data.dir=DIR --config.data.tokenizer=T5.model
Hardware: v5p:8x8x8, 512 chips: four experts of each layer on each
Minutes:  not run here
Expect:   negative log perplexity -1.096 after 250k steps, -1.043 after 500k in the paper; not run here

Parameters: 1571.4B. The capacity of the paper's run is not known to us: here as released. `:released`, the
public checkpoint's shape, has 30 heads where the paper prints 32, no jitter, and the conventions of the code
it was trained with. That code makes as many groups as there are experts at least, small ones, whose experts
have 2 slots: the FFNs then compute 8 times the rows that are routed, against 2 times here in the encoder.
"""

from sparse_experts.config import check_variant, t5_config

VARIANTS = ("released",)


def get_config(arg=None):
  check_variant(arg, VARIANTS)
  config = t5_config()
  model = config.model
  model.num_layers = 15
  model.embed_dim, model.num_heads, model.head_dim, model.mlp_dim = 2080, 32, 64, 6144
  model.activation = "relu"
  model.num_experts = 2048
  model.moe_every = 1
  model.router.k = 1
  model.router.gate = "raw"
  model.router.jitter = 1e-2
  model.router.balance_count = "first"
  model.router.load_balance_weight = 1e-2
  model.expert_init_scale = 0.1
  model.capacity_rule = "mesh"
  model.capacity_factor, model.eval_capacity_factor = 1.0, 2.0
  model.group_size = 2048  # 512 groups of 2048 x 512 encoder tokens
  model.decoder.group_size = 456  # 512 groups of 2048 x 114 decoder tokens

  config.train.steps = 550_000
  config.train.layer_losses = "sum"
  model.min_capacity = 2
  config.mesh.update({"expert": 512})  # 512 does not divide 2080, so no fsdp: 7 GB of dense weights on each
  if arg == "released":
    model.router.jitter = 0.0
    model.capacity_rule = "flaxformer"
    config.train.layer_losses = "mean"
    model.num_heads = 30
    model.group_size, model.decoder.group_size = 512, 114
  return config
