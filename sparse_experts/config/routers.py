"""The names that `model.router.name` takes, known without jax."""

# model.router.name -> where its class is, below sparse_experts.moe.routers; imported when it is needed.
ROUTERS = {
  "top_k": "top_k:TopKRouter",
  "expert_choice": "expert_choice:ExpertChoiceRouter",
  "hash": "hash:HashRouter",
  "random": "random:RandomRouter",
  "task": "task:TaskRouter",
  "noisy_top_k": "noisy_top_k:NoisyTopKRouter",
  "hierarchical": "hierarchical:HierarchicalRouter",
  "v_moe": "v_moe:VMoERouter",
  "limoe": "limoe:LIMoERouter",
  "deepseek_moe": "deepseek_moe:DeepSeekMoERouter",
  "deepseek_v3": "deepseek_v3:DeepSeekV3Router",
  "cosine": "cosine:CosineRouter",
  "base": "balanced:BaseRouter",
  "sinkhorn": "balanced:SinkhornRouter",
  "dynmoe": "dynmoe:DynMoERouter",
  "no_token_left_behind": "no_token_left_behind:NoTokenLeftBehindRouter",
  "reinforce": "reinforce:ReinforceRouter",
  "dselect_k": "dselect_k:DSelectKRouter",
  "comet": "comet:CometRouter",
  "top_p": "top_p:TopPRouter",
  "sparse_mixer": "sparse_mixer:SparseMixerRouter",
  "sigma_moe": "sigma_moe:SigmaMoERouter",
  "quantile": "quantile:QuantileRouter",
  "expert_threshold": "expert_threshold:ExpertThresholdRouter",
  "token_rounding": "token_rounding:TokenRoundingRouter",
  "simbal": "simbal:SimBalRouter",
  "permuted": "permuted:PermutedRouter",
  "frozen": "frozen:FrozenRouter",
}
# Named in the same place: layers that assign no token, below sparse_experts.moe.mixtures.
LAYERS = {"soft_moe": "soft_moe:SoftMoELayer", "smear": "smear:SmearLayer"}
