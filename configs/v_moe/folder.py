"""A small V-MoE on a folder of your own images, a sub-folder for each class.

Paper:    Riquelme et al. 2021, V-MoE (https://arxiv.org/abs/2106.05974): top-2 of the noisy softmax,
          importance and load losses of 0.005 each, capacity 1.05 in groups of 8 images, every second MLP
          sparse
Command:  python -m sparse_experts train --config=configs/v_moe/folder.py --workdir=runs/folder
          --config.data.source=files:PATH --config.data.image.size=64 --config.model.patch_size=8
Hardware: two CPU cores
Minutes:  about 6, from 20 steps of 32 images of 64 pixels, a second of CPU each; not measured whole
Expect:   it depends on your images: compare with `configs/v_moe/folder.py:dense`, its dense twin, over a few
          seeds

The group size follows from the size of the images and of the patches, whichever the command line sets. The
size has to be a multiple of the patches'. A fifth of each class is held out, unless `train` and `valid` (or
`test`) lie in the folder.
"""

from sparse_experts.config import check_variant, default_config, dense_twin

VARIANTS = ("dense",)


def get_config(arg=None):
  check_variant(arg, VARIANTS)
  config = default_config()

  data = config.data
  data.source = "files:images"
  data.objective = "softmax"
  data.image.size = 64
  data.image.crop_area, data.image.flip, data.image.mixup = 0.5, True, 0.2
  data.valid_share = 0.2

  model = config.model
  model.name = "vit"
  model.patch_size = 8
  model.pool = "token"
  model.num_layers = 4
  model.embed_dim, model.num_heads, model.head_dim = 128, 4, 32
  model.mlp_dim = 256
  model.activation = "gelu"
  model.num_experts = 8
  model.moe_layers = (1, 3)
  model.expert_init_scale = 1.0
  model.router.name = "v_moe"
  model.router.k = 2
  model.capacity_rule = "vmoe"
  model.capacity_factor, model.eval_capacity_factor = 1.05, 1.05
  edge = data.image.get_ref("size") // model.get_ref("patch_size")  # patches; follows what overrides set
  model.group_size = 8 * (edge * edge + 1)

  optimizer = config.optimizer
  optimizer.learning_rate, optimizer.warmup_steps = 1e-3, 50
  optimizer.b2, optimizer.weight_decay = 0.999, 0.1
  train = config.train
  train.steps, train.batch_size = 300, 64
  train.layer_losses = "sum"
  train.eval_every, train.checkpoint_every, train.log_every = 100, 100, 20
  config.eval.batch_size, config.eval.train_windows = 64, 256
  return dense_twin(config) if arg == "dense" else config
