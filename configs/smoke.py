"""A byte-level language model with Switch routing, small enough for a laptop.

Paper:    Fedus et al. 2021, Switch Transformers (https://arxiv.org/abs/2101.03961): top-1 routing with the
          raw probability as gate, input jitter 0.01, capacity 1.25, balance loss 0.01, expert init scale 0.1
Command:  python -m sparse_experts train --config=configs/smoke.py --workdir=runs/smoke
Hardware: two CPU cores
Minutes:  2.0, compiling and the final evaluation included
Expect:   1.946, 1.908 and 1.902 nats per byte for seeds 0, 1 and 2 on the library of Python 3.11.7, which is
          1.37 (standard deviation 0.02) below the unigram entropy of the same targets; random experts cost
          0.036 more (seed 0, `evaluate`); no expert is dead

`configs/smoke.py:dense` is its dense twin: no router, the same active parameters less the router's, the
same data in the same order, and the same initial values wherever a parameter has the same name.
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
  model.num_experts = 8
  model.moe_every = 2  # layers 1 and 3
  model.expert_dim = 256
  model.router.k = 1
  model.router.jitter = 0.01
  model.capacity_factor, model.eval_capacity_factor = 1.25, 2.0
  model.group_size = 512  # 8 groups a batch: up to 8 devices over data x expert

  config.data.source, config.data.length = "embedded", 256
  config.optimizer.learning_rate = 3e-3
  config.train.steps, config.train.batch_size = 200, 16
  config.train.layer_losses = "mean"
  return dense_twin(config) if arg == "dense" else config
