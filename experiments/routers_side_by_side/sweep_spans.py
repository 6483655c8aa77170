"""Six families of routing in an encoder, beside its dense twin, on masked spans of bytes."""

from sparse_experts.sweeps.sweep import Arm, Sweep

CONFIG = "experiments/routers_side_by_side/config_spans.py"


def get_sweep():
  router = lambda name: Arm(CONFIG, {"model.router.name": name})
  return Sweep(
      arms={
          "switch": router("top_k"),  # token choice
          "expert_choice": router("expert_choice"),
          "base": router("base"),  # global assignment
          "hash": router("hash"),  # fixed
          "reinforce": router("reinforce"),  # policy gradient
          "dselect_k": router("dselect_k"),  # differentiable and sparse
          "dense": Arm(CONFIG + ":dense"),
      },
      seeds=range(5), baseline="switch", learning_rates=(3e-3, 1e-2))
