"""V-MoE-B/32, every second MLP sparse, and ViT-B/32.

Paper:    Riquelme et al. 2021, V-MoE (https://arxiv.org/abs/2106.05974), trained on JFT-300M: 32 experts,
          top-2, capacity 1.05, losses of importance and load of 0.005 each, summed over layers
Command:  python -m sparse_experts train --config=configs/v_moe/b32.py --workdir=runs/b32
          --config.data.source=SOURCE --config.data.image.classes=N
Hardware: v5e:4x4, 16 chips; not tried
Minutes:  not run here
Expect:   no published figure of it is known to us

JFT-300M is not public: name a source of your own. `:vit` is the dense model, `:last_2` the one with only the
last 2 of its sparse layers. `train.steps` is the default, not the paper's. The released code starts all
experts of a layer equal, which ours are not.
"""

from sparse_experts.config import check_variant, v_moe_config, v_moe_variant

VARIANTS = ("vit", "last_2")


def get_config(arg=None):
  check_variant(arg, VARIANTS)
  config = v_moe_config(layers=12, dim=768, mlp_dim=3072, heads=12, patch_size=32)
  config.optimizer.learning_rate = 8e-4
  return v_moe_variant(config, arg)
