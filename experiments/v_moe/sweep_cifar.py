"""Dense, V-MoE and Soft MoE at equal FLOPs; name the images: --config.data.source=files:PATH."""

from sparse_experts.sweeps.sweep import Arm, Sweep

CONFIG = "experiments/v_moe/config_cifar.py"


def get_sweep():
  return Sweep(
      arms={"dense": Arm(f"{CONFIG}:dense"), "v_moe": Arm(CONFIG), "soft_moe": Arm(f"{CONFIG}:soft_moe")},
      seeds=range(5),
      baseline="dense")
