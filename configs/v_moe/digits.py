"""A V-MoE on scikit-learn's handwritten digits, small enough for a laptop.

Paper:    Riquelme et al. 2021, V-MoE (https://arxiv.org/abs/2106.05974): top-2 of the noisy softmax,
          gates as they are, importance and load losses of 0.005 each, capacity 1.05 in groups of 8 images,
          the last two of every second MLP sparse
Command:  python -m sparse_experts train --config=configs/v_moe/digits.py --workdir=runs/digits
Hardware: two CPU cores
Minutes:  3:05, its dense twin 2:13, compiling included, while another program had one of the two cores
          (187 and 132 seconds of CPU); on idle cores not measured
Expect:   97.2% of 359 held-out digits (95.8 to 98.3 over five seeds), its dense twin 97.4% (96.9 to 98.1)

Mixup was chosen from 0 and 0.3 by one run of each, 600 steps, on a fifth of the training images held out:
95.1% and 97.6% of 287, its dense twin 94.8% and 97.2%. The 1,200 steps were chosen for what two minutes
have room for, but after 600 had given 96.1%, its dense twin 96.7 and 95.0%, of the reported images.

`configs/v_moe/digits.py:dense` is its dense twin. The paper's sigmoid over 18,291 classes is a softmax over
10 here, its patches of 16 x 16 pixels are 2 x 2.
"""

from sparse_experts.config import check_variant, default_config, dense_twin, image_tokens

VARIANTS = ("dense",)


def get_config(arg=None):
  check_variant(arg, VARIANTS)
  config = default_config()

  data = config.data
  data.objective = "softmax"
  data.image.size = 8
  data.image.mixup = 0.3
  data.valid_share = 0.2

  model = config.model
  model.name = "vit"
  model.patch_size = 2
  model.pool = "token"
  model.num_layers = 4
  model.embed_dim, model.num_heads, model.head_dim = 64, 4, 16
  model.mlp_dim = 128
  model.activation = "gelu"
  model.num_experts = 8
  model.moe_layers = (1, 3)
  model.expert_init_scale = 1.0
  model.router.name = "v_moe"
  model.router.k = 2
  model.capacity_rule = "vmoe"
  model.capacity_factor, model.eval_capacity_factor = 1.05, 1.05
  model.group_size = 8 * image_tokens(config)

  optimizer = config.optimizer
  optimizer.learning_rate, optimizer.warmup_steps = 2e-3, 50
  optimizer.b2, optimizer.weight_decay = 0.999, 0.1
  train = config.train
  train.steps, train.batch_size = 1200, 64
  train.layer_losses = "sum"
  train.eval_every, train.checkpoint_every, train.log_every = 400, 400, 50
  config.eval.batch_size, config.eval.train_windows = 64, 400
  return dense_twin(config) if arg == "dense" else config
