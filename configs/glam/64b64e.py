"""GLaM 64B/64E: a decoder of 1.2 trillion parameters, every other FFN sparse with 64 experts.

Paper:    Du et al. 2021, GLaM (https://arxiv.org/abs/2112.06905): 1.2T parameters, 96.6B active; top-2 with
          GShard's gating (https://arxiv.org/abs/2006.16668), balance loss 0.01
Command:  python -m sparse_experts train --config=configs/glam/64b64e.py --workdir=runs/glam_64b64e
          --config.data.source=files:DIR --config.data.tokenizer=PIECES_256K.model
Hardware: v5p:8x8x8, 512 chips: an expert of each layer on eight of them
Minutes:  not run here
Expect:   the paper reports 29 tasks (62.7 zero-shot, 65.5 one-shot), no loss; 600B tokens; not run here

Dense FFNs are GEGLU and experts GELU of two matrices, which gives the paper's totals. Each layer has a
relative position bias of its own; that it is T5's kind, in buckets, is an assumption. Of GShard, not of the
paper: capacity 2 (slots per token), the second expert used with probability 2 x gate. Rate, length and batch
are not checked at the source; group size and the mean of layers' losses are ours. Its data are not public.
"""

from sparse_experts.config import default_config


def get_config():
  config = default_config()
  model = config.model
  model.name = "decoder"
  model.num_layers = 64
  model.embed_dim, model.num_heads, model.head_dim, model.mlp_dim = 8192, 128, 128, 32768
  model.activation, model.expert_activation = "geglu", "gelu"
  model.layer_bias = True
  model.tied_head = True
  model.num_experts = 64
  model.moe_every = 2
  model.router.k = 2
  model.router.gate = "renormalized"
  model.router.order = "choice"
  model.router.skip_threshold = 0.5
  model.router.balance_count = "first"
  model.router.load_balance_weight = 1e-2
  model.capacity_rule = "lingvo"
  model.capacity_factor, model.eval_capacity_factor = 2.0, 2.0
  model.group_size = 2048
  model.dispatch = "scatter"
  model.dtype, model.remat = "bfloat16", True

  data, optimizer = config.data, config.optimizer
  data.tokenizer, data.length = "vocabulary:256000", 1024
  optimizer.name, optimizer.schedule = "adafactor", "rsqrt_held"
  optimizer.learning_rate, optimizer.warmup_steps = 1e-2, 10_000
  optimizer.weight_decay = optimizer.clip_norm = 0.0
  config.train.steps, config.train.batch_size = 572_000, 1024
  config.train.skip_nonfinite, config.train.layer_losses = True, "mean"
  config.train.log_every, config.train.eval_every, config.train.checkpoint_every = 100, 10_000, 1000
  config.mesh.update({"expert": 64, "model": 8, "fsdp": True})
  return config
