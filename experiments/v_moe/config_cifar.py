"""A ViT of 8 layers and width 192 on 32 x 32 images, strongly augmented: dense, V-MoE or Soft MoE.

The three do the same work per token, within 1%: in two layers 2 of 16 experts of half the dense hidden width,
or 60 of a Soft MoE with a slot each, of the whole width, for 64 patches.
"""

from sparse_experts.config import check_variant, default_config, image_tokens

VARIANTS = ("dense", "soft_moe")


def get_config(arg=None):
  check_variant(arg, VARIANTS)
  config = default_config()
  config.data.objective = "softmax"
  config.data.image.update(dict(
      size=32, crop_area=0.3, flip=True, randaugment_layers=2, randaugment_magnitude=15.0, mixup=0.5))
  model = config.model
  model.update(dict(
      name="vit", num_layers=8, embed_dim=192, num_heads=6, head_dim=32, mlp_dim=768, activation="gelu",
      dtype="bfloat16", patch_size=4, pool="mean", num_experts=16, moe_layers=(5, 7), expert_dim=384,
      expert_init_scale=1.0, dispatch="scatter",  # on GPUs products of equal size are faster than ragged ones
      capacity_rule="vmoe", capacity_factor=1.05, eval_capacity_factor=1.05))
  model.router.update(dict(name="v_moe", k=2))
  if arg == "soft_moe":
    model.num_experts, model.expert_dim = 60, 768
    model.router.update(dict(name="soft_moe", k=None))
  if arg == "dense":
    model.num_experts = 0
  model.group_size = 8 * image_tokens(config)
  config.optimizer.update(dict(learning_rate=1e-3, warmup_steps=1000, weight_decay=0.1, b2=0.999))
  config.train.update(dict(steps=20_000, batch_size=256, layer_losses="sum", eval_every=1000,
                           checkpoint_every=1000, log_every=100))
  config.eval.batch_size, config.eval.train_windows = 256, 4000
  return config.lock()
