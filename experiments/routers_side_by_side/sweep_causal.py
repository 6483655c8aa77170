"""The families of routing that a causal model may use, beside its dense twin, on the next byte."""

from sparse_experts.sweeps.sweep import Arm, Sweep

CONFIG = "experiments/routers_side_by_side/config_causal.py"


def get_sweep():
  router = lambda name: Arm(CONFIG, {"model.router.name": name})
  return Sweep(
      arms={
          "switch": router("top_k"),  # token choice
          "hash": router("hash"),  # fixed
          "reinforce": router("reinforce"),  # policy gradient
          "dselect_k": router("dselect_k"),  # differentiable and sparse
          "dense": Arm(CONFIG + ":dense"),
      },
      seeds=range(5), baseline="switch", learning_rates=(3e-3, 1e-2))
