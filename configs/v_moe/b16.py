"""V-MoE-B/16, every second MLP sparse, and ViT-B/16.

Paper:    Riquelme et al. 2021, V-MoE (https://arxiv.org/abs/2106.05974), trained on JFT-300M: 32 experts,
          top-2, capacity 1.05, losses of importance and load of 0.005 each, summed over layers
Command:  python -m sparse_experts train --config=configs/v_moe/b16.py --workdir=runs/b16
          --config.data.source=SOURCE --config.data.image.classes=N
Hardware: v5e:4x4, 16 chips; not tried
Minutes:  not run here, 201.4 TPUv3-core-days in the paper
Expect:   979.0M parameters, JFT precision@1 49.31 in the paper; ViT-B/16 100.5M, 44.58

JFT-300M is not public: name a source of your own. `:vit` is the dense model, `:last_2` the one with only the
last 2 of its sparse layers. `train.steps` is the default, not the paper's. The released code starts all
experts of a layer equal, which ours are not.
"""

from sparse_experts.config import check_variant, v_moe_config, v_moe_variant

VARIANTS = ("vit", "last_2")


def get_config(arg=None):
  check_variant(arg, VARIANTS)
  config = v_moe_config(layers=12, dim=768, mlp_dim=3072, heads=12, patch_size=16)
  config.optimizer.learning_rate = 8e-4
  return v_moe_variant(config, arg)
