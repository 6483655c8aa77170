"""V-MoE-L/16, every second MLP sparse, and ViT-L/16.

Paper:    Riquelme et al. 2021, V-MoE (https://arxiv.org/abs/2106.05974), trained on JFT-300M: 32 experts,
          top-2, capacity 1.05, losses of importance and load of 0.005 each, summed over layers
Command:  python -m sparse_experts train --config=configs/v_moe/l16.py --workdir=runs/l16
          --config.data.source=SOURCE --config.data.image.classes=N
Hardware: v5p:4x4x4, 64 chips; not tried
Minutes:  not run here, 1,206 TPUv3-core-days in the paper
Expect:   3446.0M parameters, JFT precision@1 57.65 in the paper; Last-2 56.76; ViT-L/16 323.1M, 53.40

JFT-300M is not public: name a source of your own. `:vit` is the dense model, `:last_2` the one with only the
last 2 of its sparse layers. `train.steps` is the default, not the paper's. The released code starts all
experts of a layer equal, which ours are not. Last-2 computes to 843.6M parameters, against 845.8M printed.
"""

from sparse_experts.config import check_variant, v_moe_config, v_moe_variant

VARIANTS = ("vit", "last_2")


def get_config(arg=None):
  check_variant(arg, VARIANTS)
  config = v_moe_config(layers=24, dim=1024, mlp_dim=4096, heads=16, patch_size=16)
  config.optimizer.learning_rate = 4e-4
  return v_moe_variant(config, arg)
