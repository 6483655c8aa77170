"""Switch-Base: T5-Base with every other FFN sparse, 128 experts; the released shape; distillation's teachers.

Paper:    Fedus et al. 2021, Switch Transformers (https://arxiv.org/abs/2101.03961): 7B parameters, 124B FLOPs
          per sequence; top-1, raw probability as gate, input jitter, balance loss 0.01
Command:  python -m sparse_experts train --config=configs/switch/base.py --workdir=runs/switch_base
          --config.data.dir=DIR --config.data.tokenizer=T5.model
Hardware: v5e:4x4, 16 chips: eight experts of each layer on each
Minutes:  not run here
Expect:   negative log perplexity -1.370 after 250k steps, -1.306 after 500k in the paper; at capacity 1.25
          and batches of its benchmark -1.553 after 100k; not run here

Parameters: 7.44B untied. `:released` is the public checkpoint's shape, 7.41B: ReLU with d_ff 3072 (as many
weights as GEGLU with 2048), tied head, no jitter, and the conventions of the code it was trained with. `:e16`
to `:e256` are the teachers of section 4.2's distillation, printed 1.1, 2.0, 3.8, 7.4 (128 experts: no
variant) and 14.7B.
"""

from sparse_experts.config import check_variant, t5_config

VARIANTS = ("released", "e16", "e32", "e64", "e256")


def get_config(arg=None):
  check_variant(arg, VARIANTS)
  config = t5_config()
  model = config.model
  model.num_layers = 12
  model.embed_dim, model.num_heads, model.head_dim, model.mlp_dim = 768, 12, 64, 2048
  model.num_experts = 128
  model.moe_every = 2
  model.router.k = 1
  model.router.gate = "raw"
  model.router.jitter = 1e-2
  model.router.balance_count = "first"
  model.router.load_balance_weight = 1e-2
  model.expert_init_scale = 0.1
  model.capacity_rule = "mesh"
  model.capacity_factor, model.eval_capacity_factor = 1.25, 2.0
  model.group_size = 8192  # 128 groups of 2048 x 512 encoder tokens
  model.decoder.group_size = 1824  # 128 groups of 2048 x 114 decoder tokens

  config.train.steps = 550_000
  config.train.layer_losses = "sum"
  config.train.accumulate = 4
  config.mesh.update({"expert": 16})
  if arg == "released":
    model.router.jitter = 0.0
    model.capacity_rule = "flaxformer"
    config.train.layer_losses = "mean"
    model.activation, model.mlp_dim, model.tied_head = "relu", 3072, True
  elif arg:
    model.num_experts = int(arg[1:])
  return config
