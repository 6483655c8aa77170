"""What the published configs share: the pre-training of T5 and of V-MoE, their variants, the dense twin."""

import math
from collections.abc import Sequence

from ml_collections import ConfigDict

from sparse_experts.config.derived import image_tokens
from sparse_experts.config.dotted import replaced
from sparse_experts.config.schema import default_config
from sparse_experts.errors import UserError, nearest


def t5_config() -> ConfigDict:
  """T5.1.1's pre-training, dense and without widths: what the published encoder-decoders start from; locked.

  Raffel et al. 2019: span corruption of C4, Adafactor with rate 1 / sqrt(max(step, 10^4)). A step has 2^20
  encoder tokens, as in Switch and ST-MoE. T5's vocabulary is not ours to give: its size stands for it.
  """
  c = default_config().unlock()
  c.model.update(dict(
      name="seq2seq", num_experts=0, activation="geglu", tied_head=False, dropout=0.0, dtype="bfloat16",
      remat=True, dispatch="scatter"))
  c.data.update(dict(
      source="tfds:c4/en", tokenizer="vocabulary:32128", objective="span_corruption", length=512,
      target_length=114, noise_density=0.15, mean_span=3.0))
  c.optimizer.update(dict(
      name="adafactor", schedule="rsqrt_held", learning_rate=1e-2, warmup_steps=10_000, weight_decay=0.0,
      clip_norm=0.0))
  c.train.update(dict(batch_size=2048, eval_every=10_000, checkpoint_every=1000, log_every=100))
  return c.lock()


def v_moe_config(layers: int, dim: int, mlp_dim: int, heads: int, patch_size: int, pool: str = "token",
                 classes: int = 18_291) -> ConfigDict:
  """V-MoE of that size as it was pre-trained on JFT-300M, every second layer sparse; locked.

  Riquelme et al. 2021 and its released code: a sigmoid for each class, a tanh layer before the head, whose
  bias starts at -log of the number of classes, Adam with linear warm-up and decay, groups of 8 images.
  """
  c = default_config().unlock()
  c.model.update(dict(
      name="vit", num_layers=layers, embed_dim=dim, mlp_dim=mlp_dim, num_heads=heads, head_dim=dim // heads,
      activation="gelu", dtype="bfloat16", remat=True, patch_size=patch_size, pool=pool,
      representation_dim=dim, head_bias=-math.log(classes), num_experts=32, moe_every=2,
      expert_init_scale=1.0, capacity_rule="vmoe", capacity_factor=1.05, eval_capacity_factor=1.05,
      dispatch="scatter"))
  c.model.router.update(dict(name="v_moe", k=2, order="choice"))
  c.data.update(dict(source="tfds:jft", objective="sigmoid"))
  c.data.image.update(dict(size=224, classes=classes, crop_area=0.05, flip=True))
  c.model.group_size = 8 * image_tokens(c)
  c.optimizer.update(dict(name="adamw", schedule="linear", warmup_steps=10_000, weight_decay=0.1))
  c.optimizer.update(dict(b1=0.9, b2=0.999, clip_norm=0.0))
  c.train.update(dict(
      batch_size=4096, layer_losses="sum", eval_every=10_000, checkpoint_every=1000, log_every=100))
  return c.lock()


def v_moe_variant(config: ConfigDict, arg: str | None) -> ConfigDict:
  """`config`, or with the last n of its sparse layers alone (`last_n`), or without experts (`vit`)."""
  if arg and arg.startswith("last_"):
    config.model.moe_layers = tuple(range(1, config.model.num_layers, 2))[-int(arg[5:]):]
  if arg == "vit":  # its MLPs are all as wide, unlike those of the dense twin
    config.model.num_experts, config.model.router.k = 0, 1
  return config


def dense_twin(config: ConfigDict) -> ConfigDict:
  """`config` without routers: one FFN as wide as the experts, shared ones too, that worked on a token."""
  return replaced(config, {"model.num_experts": 0, "model.decoder.num_experts": None})


def check_variant(arg: str | None, known: Sequence[str]) -> None:
  """Refuses a FILE:ARG whose ARG the config file does not know."""
  if arg and arg not in known:
    raise UserError(f"config variant ':{arg}' is unknown{nearest(arg, known)}")
