"""V-MoE-15B: 48 layers, every second MLP sparse.

Paper:    Riquelme et al. 2021, V-MoE (https://arxiv.org/abs/2106.05974), trained on JFT-300M: 32 experts,
          top-2, capacity 1.05, losses of importance and load of 0.005 each, summed over layers
Command:  python -m sparse_experts train --config=configs/v_moe/v_moe_15b.py --workdir=runs/v_moe_15b
          --config.data.source=SOURCE --config.data.image.classes=N
Hardware: v5p:8x8x8, 512 chips; not tried
Minutes:  not run here, 16,776 TPUv3-core-days in the paper
Expect:   14705.1M parameters as printed, 14691M as computed; ImageNet 90.35 after fine-tuning

JFT-300M is not public: name a source of your own. `:vit` is the dense model. `train.steps` is the default,
not the paper's. The released code starts all experts of a layer equal, which ours are not. Patches of 14 x 14
pixels and the learning rate are our guesses; the paper's stabilisation of this model is not known to us.
"""

from sparse_experts.config import check_variant, v_moe_config, v_moe_variant

VARIANTS = ("vit",)


def get_config(arg=None):
  check_variant(arg, VARIANTS)
  config = v_moe_config(layers=48, dim=1408, mlp_dim=6400, heads=16, patch_size=14)
  config.optimizer.learning_rate = 1e-4
  return v_moe_variant(config, arg)
