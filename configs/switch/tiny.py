"""An encoder-decoder with Switch routing on span corruption of bytes: Switch-Base's recipe in small.

Paper:    Fedus et al. 2021, Switch Transformers (https://arxiv.org/abs/2101.03961), section 2: T5 with every
          other FFN sparse, top-1, jitter 0.01, capacity 1.25, span corruption of 15%, Adafactor with rsqrt
Command:  python -m sparse_experts train --config=configs/switch/tiny.py --workdir=runs/switch_tiny
Hardware: two CPU cores
Minutes:  4.2, compiling and the final evaluation included
Expect:   1.801 nats per byte of masked text (seed 0, one run), 1.49 below the unigram entropy of the same
          targets: 151,423 bytes, all that the validation windows mask

Differs from the paper where bytes and a laptop ask for it: mean span 20 bytes instead of 3 subwords, a
128-wide model, a higher learning rate with a shorter warm-up. `:dense` is the dense twin.
"""

from sparse_experts.config import check_variant, default_config, dense_twin

VARIANTS = ("dense",)


def get_config(arg=None):
  check_variant(arg, VARIANTS)
  config = default_config()

  model = config.model
  model.name = "seq2seq"
  model.num_layers = 2  # of the encoder and of the decoder
  model.embed_dim, model.num_heads, model.head_dim = 128, 4, 32
  model.mlp_dim = 256
  model.activation = "geglu"  # T5.1.1
  model.num_experts = 8
  model.moe_every = 2
  model.router.k = 1
  model.router.jitter = 0.01
  model.capacity_factor, model.eval_capacity_factor = 1.25, 2.0
  model.group_size = 512  # of 16 x 256 encoder tokens: 8 groups
  model.decoder.group_size = 128  # of 16 x 64 decoder tokens: 8 groups

  data = config.data
  data.objective = "span_corruption"
  data.length, data.target_length = 256, 64
  data.noise_density, data.mean_span = 0.15, 20.0

  optimizer = config.optimizer
  optimizer.name = "adafactor"
  optimizer.schedule = "rsqrt"
  optimizer.learning_rate, optimizer.warmup_steps = 3e-2, 100
  optimizer.weight_decay = 0.0
  config.train.steps, config.train.batch_size = 600, 16
  config.train.layer_losses = "mean"
  return dense_twin(config) if arg == "dense" else config
