"""A LIMoE on generated pairs of an image and its caption, small enough for a laptop.

Paper:    Mustafa et al. 2022, LIMoE (https://arxiv.org/abs/2206.02770): one tower for images and texts, top-1
          with batch priority, importance, load and z losses, and entropies of each modality
Command:  python -m sparse_experts train --config=configs/limoe/pairs.py --workdir=runs/pairs
Hardware: two CPU cores
Minutes:  2.2, with another run beside it
Expect:   76.1% of images find their caption among 64 and 76.1% of captions their image, of 896 that were not
          trained on, 0.562 nats per pair (seed 0, one run); after 500 steps without entropy losses
          (--config.train.steps=500 --config.model.router.local_weights=0,0
          --config.model.router.global_weights=0,0, seed 0) 80.4% and 79.4%

An image has 64 patches, its caption 9 or 10 words; pairs are told apart in sets of 64. Widths, data and
weights of losses are ours.
"""

from sparse_experts.config import default_config, image_tokens


def get_config():
  config = default_config()

  data = config.data
  data.objective = "contrastive"
  data.tokenizer, data.length = "words", 12
  data.image.size, data.image.shift = 32, 2
  data.valid_share = 0.1

  model = config.model
  model.name = "limoe"
  model.patch_size = 4
  model.pool = "mean"
  model.num_layers = 4
  model.embed_dim, model.num_heads, model.head_dim = 64, 4, 16
  model.mlp_dim = 128
  model.activation = "gelu"
  model.num_experts = 8
  model.moe_layers = (1, 3)
  model.expert_init_scale = 1.0
  model.router.name = "limoe"
  model.capacity_rule = "vmoe"
  model.capacity_factor, model.eval_capacity_factor = 1.05, 1.05
  model.group_size = 8 * (image_tokens(config) + config.data.length)

  optimizer = config.optimizer
  optimizer.learning_rate, optimizer.warmup_steps = 3e-3, 50
  optimizer.b2, optimizer.weight_decay = 0.999, 0.1
  train = config.train
  train.steps, train.batch_size = 300, 64
  train.layer_losses = "sum"
  train.eval_every, train.checkpoint_every, train.log_every = 150, 150, 50
  config.eval.batch_size, config.eval.train_windows = 64, 256
  return config
