"""Handwritten digits, dense against sparse: ten runs of about a minute each on two idle cores."""

from sparse_experts.sweeps.sweep import Arm, Sweep

CONFIG = "configs/v_moe/digits.py"


def get_sweep():
  return Sweep(
      arms={"dense": Arm(f"{CONFIG}:dense"), "sparse": Arm(CONFIG)}, seeds=range(5), baseline="dense",
      seeds_together=1)
