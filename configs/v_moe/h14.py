"""V-MoE-H/14, every second MLP sparse, and ViT-H/14.

Paper:    Riquelme et al. 2021, V-MoE (https://arxiv.org/abs/2106.05974), trained on JFT-300M: 32 experts,
          top-2, capacity 1.05, losses of importance and load of 0.005 each, summed over layers
Command:  python -m sparse_experts train --config=configs/v_moe/h14.py --workdir=runs/h14
          --config.data.source=SOURCE --config.data.image.classes=N
Hardware: v5p:4x4x4, 64 chips; not tried
Minutes:  not run here, 2,736 TPUv3-core-days for Last-5 in the paper
Expect:   7160.8M parameters, JFT precision@1 60.62 in the paper; Last-5 2688.6M, 60.12; ViT-H/14
          655.8M, 56.68

JFT-300M is not public: name a source of your own. `:vit` is the dense model, `:last_5` the one with only the
last 5 of its sparse layers. `train.steps` is the default, not the paper's. The released code starts all
experts of a layer equal, which ours are not.
"""

from sparse_experts.config import check_variant, v_moe_config, v_moe_variant

VARIANTS = ("vit", "last_5")


def get_config(arg=None):
  check_variant(arg, VARIANTS)
  config = v_moe_config(layers=32, dim=1280, mlp_dim=5120, heads=16, patch_size=14)
  config.optimizer.learning_rate = 3e-4
  config.optimizer.clip_norm = 10.0  # of the sizes only H
  return v_moe_variant(config, arg)
