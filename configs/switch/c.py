"""Switch-C: 1.6 trillion parameters, every FFN sparse with 2048 experts; paper's shape and the released one.

Paper:    Fedus et al. 2021, Switch Transformers (https://arxiv.org/abs/2101.03961): 1571B parameters, 890B
          FLOPs per sequence, 15+15 layers, d 2080, d_ff 6144 without gate, 32 heads of 64, 2048 experts
Command:  python -m sparse_experts train --config=configs/switch/c.py --workdir=runs/switch_c
          --config.data.dir=DIR --config.data.tokenizer=T5.model
Hardware: v5p:8x8x8, 512 chips: four experts of each layer on each
Minutes:  not run here
Expect:   negative log perplexity -1.096 after 250k steps and -1.043 after 500k in the paper; not run here

`:released` is the public checkpoint's shape: 30 heads. The paper does not print what the run's capacity was:
both have the released 1.0 in training and 2.0 in evaluation, at least 2 slots. Embedding and head are untied.
"""

from sparse_experts.config import check_variant, default_config

VARIANTS = ("released",)


def get_config(arg=None):
  check_variant(arg, VARIANTS)
  config = default_config()

  model = config.model
  model.name = "seq2seq"
  model.num_layers = 15
  model.embed_dim, model.num_heads, model.head_dim = 2080, 32, 64
  model.mlp_dim = 6144
  model.activation = "relu"
  model.tied_head = False
  model.num_experts = 2048
  model.moe_every = 1
  model.router.k = 1
  model.router.gate = "raw"
  model.router.balance_count = "first"
  model.router.load_balance_weight = 1e-2
  model.router.jitter = 1e-2
  model.capacity_rule = "mesh"
  model.capacity_factor, model.eval_capacity_factor, model.min_capacity = 1.0, 2.0, 2
  model.group_size = 2048  # 512 groups of 2048 x 512 encoder tokens
  model.decoder.group_size = 456  # 512 groups of 2048 x 114 decoder tokens
  model.dispatch = "scatter"
  model.dtype, model.remat = "bfloat16", True

  data = config.data
  data.source, data.tokenizer = "tfds:c4/en", "vocabulary:32128"
  data.objective, data.length, data.target_length = "span_corruption", 512, 114
  data.noise_density, data.mean_span = 0.15, 3.0

  optimizer = config.optimizer
  optimizer.name, optimizer.schedule = "adafactor", "rsqrt"
  optimizer.learning_rate, optimizer.warmup_steps = 1e-2, 10_000
  optimizer.weight_decay = optimizer.clip_norm = 0.0

  train = config.train
  train.steps, train.batch_size = 550_000, 2048  # 2^20 encoder tokens
  train.layer_losses = "sum"

  config.mesh.update({"data": 1, "expert": 512, "model": 1, "fsdp": True})
  if arg == "released":
    model.num_heads = 30
    model.router.jitter = 0.0
    model.capacity_rule = "flaxformer"
    train.layer_losses = "mean"
  return config
