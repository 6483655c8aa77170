"""Switch routing against its dense twin on the smoke config: the same data, FLOPs and steps."""

from sparse_experts.sweeps.sweep import Arm, Sweep


def get_sweep():
  return Sweep(
      arms={"dense": Arm("configs/smoke.py:dense"), "switch": Arm("configs/smoke.py")},
      seeds=range(5),
      baseline="dense")
