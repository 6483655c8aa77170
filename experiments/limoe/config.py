"""The tower of `configs/limoe/pairs.py`, narrower, with fewer words: 5 or 6 of them beside 64 patches.

Texts are a fourteenth of the tokens, so one expert of 8 for all of them costs the balance losses nothing.
`:classic` has no entropy losses, `:local` the texts' local one alone.
"""

from sparse_experts.config import check_variant, default_config, image_tokens

VARIANTS = ("classic", "local")


def get_config(arg=None):
  check_variant(arg, VARIANTS)
  config = default_config()
  config.data.update(dict(
      objective="contrastive", source="experiments.limoe.short:source", tokenizer="words", length=6,
      valid_share=0.1))
  config.data.image.update(dict(size=32, shift=2))
  model = config.model
  model.update(dict(
      name="limoe", patch_size=4, pool="mean", num_layers=4, embed_dim=32, num_heads=2, head_dim=16,
      mlp_dim=64, activation="gelu", num_experts=8, moe_layers=(1, 3), expert_init_scale=1.0,
      capacity_rule="vmoe_paper", capacity_factor=1.05, eval_capacity_factor=1.05))
  model.router.name = "limoe"
  if arg:  # weights of images and texts
    with model.router.unlocked():
      model.router.global_weights = (0.0, 0.0)
      model.router.local_weights = {"classic": (0.0, 0.0), "local": (0.0, 1e-2)}[arg]
  model.group_size = 8 * (image_tokens(config) + config.data.length)
  config.optimizer.update(dict(learning_rate=3e-3, warmup_steps=50, b2=0.999, weight_decay=0.1))
  config.train.update(dict(steps=400, batch_size=32, layer_losses="sum", eval_every=400, checkpoint_every=400,
                           log_every=100))
  config.eval.update(dict(batch_size=32, train_windows=320))
  return config
