"""What stands side by side: one line each. A new router is a line of ARMS."""

from typing import Any

ORACLE, RANDOM, SWITCH, DENSE = "true cluster", "random", "top_k", "dense"  # what others are measured by
RATES = (3e-3, 1e-2, 3e-2, 1e-1)  # tried by each arm, each with one run
TUNING_SEED = 1000  # reported nowhere
SEEDS = range(5)

# arm -> (name of a router or layer, its arguments). Defaults, where not set: a paper's own k and losses.
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    ORACLE: ("task", {}),
    RANDOM: ("random", dict(draw="token")),
    DENSE: (DENSE, {}),  # one FFN as wide as an expert, and no router
    SWITCH: ("top_k", {}),
    "top_k of 2": ("top_k", dict(k=2, gate="renormalized")),
    "no_token_left_behind": ("no_token_left_behind", {}),  # dropless it is top_k: what seeds alone make
    "hash": ("hash", {}),
    "noisy_top_k": ("noisy_top_k", {}),
    "hierarchical": ("hierarchical", {}),
    "v_moe": ("v_moe", {}),
    "limoe": ("limoe", dict(local_weights=(1e-2,) * 8, global_weights=(0.0,) * 8)),  # clusters as modalities
    "deepseek_moe": ("deepseek_moe", {}),
    "deepseek_v3": ("deepseek_v3", {}),
    "cosine": ("cosine", {}),
    "dynmoe": ("dynmoe", {}),
    "expert_choice": ("expert_choice", {}),
    "base": ("base", {}),
    "sinkhorn": ("sinkhorn", {}),
    "reinforce": ("reinforce", {}),
    "dselect_k": ("dselect_k", {}),
    "comet": ("comet", {}),
    "permuted": ("permuted", {}),
    "soft_moe": ("soft_moe", {}),
    "smear": ("smear", {}),
}
