"""Checks a config before anything heavy is imported; each mistake is one UserError with a way out.

What needs devices (is the mesh larger than the machine?) or data is checked where those are at hand.
"""

import math
from collections.abc import Sequence

from ml_collections import ConfigDict

from sparse_experts.config import LAYERS, ROUTERS, default_config, paths, row_tokens
from sparse_experts.errors import UserError, nearest

# Names as in the tables next to the implementations, which import jax; a test compares the two.
CHOICES = {
  "init_optimizer": ("fresh", "step", "moments"),
  "model.name": ("decoder", "seq2seq", "vit", "limoe"),
  "model.pool": ("token", "mean"),
  "model.attention.name": ("multi_head", "latent"),
  "model.attention.qk_norm": ("none", "whole", "head"),
  "model.activation": ("relu", "gelu", "geglu", "swiglu"),
  "model.expert_activation": ("relu", "gelu", "geglu", "swiglu"),
  "model.dtype": ("float32", "bfloat16"),
  "model.dispatch": ("einsum", "scatter", "ragged"),
  "model.backend": ("slots", "ragged_dot", "megablox"),
  "model.capacity_rule": ("flaxformer", "lingvo", "maxtext", "megablocks", "mesh", "vmoe", "vmoe_paper"),
  "model.router.name": (*ROUTERS, *LAYERS),
  "model.moe_place": ("ffn", "attention", "both"),
  "model.router.choose": ("largest", "sampled"),
  "model.router.gate": ("raw", "renormalized", "renormalized_after_drops"),
  "model.router.order": ("choice", "token", "batch_priority"),
  "model.router.balance_count": ("first", "multi_hot", "assignments"),
  "data.objective": ("causal", "span_corruption", "softmax", "sigmoid", "contrastive"),
  "optimizer.name": ("adamw", "adafactor"),
  "optimizer.schedule": ("cosine", "linear", "rsqrt", "rsqrt_held", "constant"),
  "train.layer_losses": ("mean", "sum"),
}
OPEN_CHOICES = ("model.router.name",)  # package.module:Class is welcome too
TILED = ("megablox",)  # backends that may be followed by tiles, :MxKxN, which `moe.megablox` reads

# Smallest value of each number; floats among them must be finite.
AT_LEAST = {
  1: ("model.num_layers", "model.embed_dim", "model.mlp_dim", "model.num_heads", "model.head_dim",
      "model.attention.num_kv_heads", "model.attention.q_rank", "model.attention.kv_rank",
      "model.attention.value_dim", "model.rope.factor", "model.rope.original_length", "model.rope.theta",
      "model.moe_every", "model.expert_dim", "model.gating_dropout.machines",
      "model.gating_dropout.replicas", "model.group_size", "model.router.k", "train.batch_size",
      "train.accumulate", "train.log_every", "train.eval_every", "train.checkpoint_every",
      "train.keep_checkpoints", "eval.batch_size", "eval.train_windows", "eval.min_bytes", "mesh.data",
      "mesh.expert", "mesh.model", "mesh.dcn.data", "mesh.dcn.expert", "mesh.dcn.model", "data.mean_span",
      "model.patch_size", "data.image.size"),
  2: ("data.length", "data.target_length", "data.image.classes", "model.attention.rope_dim"),
  0: ("model.norm_eps", "model.rope.mscale", "model.rope.mscale_all_dim", "model.rope.beta_fast",
      "model.rope.beta_slow",
      "model.num_experts", "model.depth_capacity", "model.shared_experts", "model.gating_dropout.rate",
      "model.capacity_factor", "model.eval_capacity_factor", "model.min_capacity",
      "model.expert_init_scale", "model.exchange_rows_factor", "model.router.skip_threshold",
      "model.router.load_balance_weight", "model.router.z_weight", "optimizer.learning_rate",
      "optimizer.warmup_steps", "optimizer.weight_decay", "optimizer.clip_norm", "train.steps", "train.seed",
      "seed.init", "seed.data", "seed.noise", "train.input_timeout", "model.representation_dim",
      "data.image.shift", "data.image.randaugment_layers", "data.image.randaugment_magnitude",
      "data.image.mixup", "data.image.crop_area"),
  -1000: ("model.head_bias",),
}
SHARES = ("model.dropout", "model.expert_dropout", "model.router.jitter", "model.router.input_dropout",
          "data.noise_density", "data.valid_share", "optimizer.b1", "optimizer.b2")  # at least 0 and below 1
NOT_ZERO = ("data.noise_density", "data.valid_share")
VISION = {"vit": "image tokens", "limoe": "image and text tokens"}  # models of images -> what a row holds


def validate(config: ConfigDict) -> None:
  """Raises UserError for the first thing in the config that cannot work."""
  _check_values(config)
  model, mesh = config.model, config.mesh
  if config.init_take != "*" and not config.init_from:
    raise UserError(f"init_take='{config.init_take}' is set, but init_from names no run to take from; set it")
  if config.init_upcycle and not config.init_from:
    raise UserError("init_upcycle=True is set, but init_from names no dense run to copy FFNs from; set it")
  if config.init_optimizer != "fresh" and not config.init_from:
    raise UserError(f"init_optimizer='{config.init_optimizer}' is set, but init_from names no run to go on "
                    "from; set it")
  shards = mesh.data * mesh.expert
  _check_objective(config)
  _divides("train.batch_size", config.train.batch_size, "train.accumulate", config.train.accumulate)
  rows = config.train.batch_size // config.train.accumulate
  if rows % shards:
    raise UserError(f"train.batch_size={config.train.batch_size} does not divide over train.accumulate="
                    f"{config.train.accumulate} x mesh.data={mesh.data} x mesh.expert={mesh.expert}; choose "
                    f"{_multiples(config.train.batch_size, shards * config.train.accumulate)}")
  for axis in mesh.dcn:
    if mesh[axis] % mesh.dcn[axis]:
      raise UserError(f"mesh.dcn.{axis}={mesh.dcn[axis]} slices do not divide mesh.{axis}={mesh[axis]}, which"
                      f" counts the devices of all; choose {_either(sorted(_divisors(mesh[axis])))}")
  for key in ("num_heads", "mlp_dim"):
    _divides(f"model.{key}", model[key], "mesh.model", mesh.model)
  if (heads := model.attention.num_kv_heads) is not None:
    _divides("model.num_heads", model.num_heads, "model.attention.num_kv_heads", heads)
    _divides("model.attention.num_kv_heads", heads, "mesh.model", mesh.model)
  if mesh.fsdp and model.embed_dim % shards:
    raise UserError(f"model.embed_dim={model.embed_dim} does not divide over mesh.data={mesh.data} x mesh."
                    f"expert={mesh.expert}, as mesh.fsdp=True asks; choose "
                    f"{_multiples(model.embed_dim, shards)}, or mesh.fsdp=False")
  if model.name in VISION:
    _check_image(config)
    if model.name == "limoe":
      _check_pairs(config)
    _check_sparse(config, "model.", rows, VISION[model.name], causal=False)
  elif model.name == "decoder":
    _check_sparse(config, "model.", rows, "data.length", causal=True)
  else:
    _check_sparse(config, "model.", rows, "data.length", causal=False)
    _check_sparse(config, "model.decoder.", rows, "data.target_length", causal=True)


def routing_field(config: ConfigDict, prefix: str, name: str):
  """(full key, value) of a routing field of a stack: the decoder's where it is set, else the encoder's."""
  for where in dict.fromkeys((prefix, "model.")):
    value = _get(config, where + name)
    if value is not None:
      return where + name, value
  return "model." + name, None


def _check_values(config):
  for prefix in ("model.", "model.decoder."):
    for key, names in CHOICES.items():
      if prefix == "model." or (key.startswith("model.") and _has(config, _in(key, prefix))):
        _check_choice(_in(key, prefix), _get(config, _in(key, prefix)), names, key in OPEN_CHOICES)
    for low, keys in AT_LEAST.items():
      for key in keys:
        if prefix == "model." or (key.startswith("model.") and _has(config, _in(key, prefix))):
          _check_low(_in(key, prefix), _get(config, _in(key, prefix)), low)
  for key in SHARES:
    value, zero = _get(config, key), key not in NOT_ZERO
    if value is not None and not (0 <= value < 1 and (zero or value > 0)):
      raise UserError(f"{key}={value} is out of range; choose from {0 if zero else 'above 0'} to below 1")


def _check_choice(key, value, names, is_open):
  if value is not None and value.split(":")[0] in TILED:
    value = value.split(":")[0]
  if value is not None and value not in names and not (is_open and ":" in value):
    way_out = nearest(value, names) + (" or give package.module:Class" if is_open else "")
    raise UserError(f"{key}='{value}' is unknown{way_out}")


def _check_low(key, value, low):
  if value is not None and not low <= value < math.inf:
    raise UserError(f"{key}={value} is out of range; choose {low} or more")


def _check_objective(config):
  model, objective = config.model, config.data.objective
  fitting = {"decoder": ["causal"], "seq2seq": ["span_corruption"], "vit": ["softmax", "sigmoid"],
             "limoe": ["contrastive"]}
  wanted = fitting[model.name]
  if objective not in wanted:
    raise UserError(f"data.objective='{objective}' does not fit model.name='{model.name}'; "
                    f"choose data.objective={_either(wanted)} or another model")
  if config.data.tokenizer == "words" and model.name != "limoe":
    raise UserError("data.tokenizer='words' loses the spaces of a text, so it is for model.name='limoe' only;"
                    " choose bytes or sentencepiece:SIZE")
  if model.name != "seq2seq":
    overrides = [key for key in _set_paths(model.decoder, "") if key]
    if overrides:
      raise UserError(f"model.decoder.{overrides[0]} is set, but model.name='{model.name}' has one stack "
                      f"only; set model.{overrides[0]} instead")
  unused = [] if model.name == "decoder" else ["rope"] + ["attention", "norm_eps"] * (model.name in VISION)
  changed = [key for key in paths(model) if key.startswith(tuple(unused))
             and _get(model, key) != _get(default_config().model, key)] if unused else []
  if changed:
    raise UserError(f"model.{changed[0]}={_get(model, changed[0])} is set, but model.name='{model.name}' does"
                    " not use it; leave it out, or choose model.name=decoder")
  if model.name == "decoder" and model.head_dim % 2 and model.attention.name == "multi_head":
    raise UserError(f"model.head_dim={model.head_dim} is odd, rotary positions need pairs; "
                    f"choose {model.head_dim + 1}")


def _check_sparse(config, prefix, rows, length_key, causal):
  """One stack's sparse layers: experts, choices, groups."""
  mesh = config.mesh
  experts_key, experts = routing_field(config, prefix, "num_experts")
  layers_key, layers = routing_field(config, prefix, "moe_layers")
  every_key, every = routing_field(config, prefix, "moe_every")
  for layer in layers:
    if not 0 <= layer < config.model.num_layers:
      raise UserError(f"{layers_key}={_show(layers)} names layer {layer}; layers are 0 to "
                      f"{config.model.num_layers - 1}")
  if not experts:
    return
  if not layers and every > config.model.num_layers:
    raise UserError(f"{every_key}={every} leaves no sparse layer among model.num_layers="
                    f"{config.model.num_layers}; choose 1 to {config.model.num_layers}, or "
                    f"{experts_key}=0 for a dense model")
  k_key, k = routing_field(config, prefix, "router.k")
  if (k or 1) > experts:
    raise UserError(f"{k_key}={k} is more than {experts_key}={experts}; choose k from 1 to {experts}")
  if experts % mesh.expert:
    raise UserError(f"{experts_key}={experts} does not divide over mesh axis 'expert'={mesh.expert}; choose "
                    f"{_multiples(experts, mesh.expert)}, or shrink the axis")
  if config.model.expert_dim:
    _divides("model.expert_dim", config.model.expert_dim, "mesh.model", mesh.model)
  order_key, order = routing_field(config, prefix, "router.order")
  if causal and order == "batch_priority":
    raise UserError(f"{order_key}='batch_priority' lets later tokens take the slots of earlier ones, which a "
                    f"causal decoder refuses; set {prefix}router.order to choice or token")
  listed = routing_field(config, prefix, "router.name")[1] not in LAYERS  # those mix rows, not groups
  length = row_tokens(config) if config.model.name in VISION else _get(config, length_key)
  if listed and length is not None:
    _check_groups(config, routing_field(config, prefix, "group_size"), rows, length_key, length)


def _check_image(config):
  image = config.data.image
  if not 0 < image.crop_area <= 1:
    raise UserError(f"data.image.crop_area={image.crop_area} is out of range; choose above 0 to 1 (no crop)")
  if image.randaugment_magnitude > 30:
    raise UserError(f"data.image.randaugment_magnitude={image.randaugment_magnitude} is out of range; "
                    "choose 0 to 30")
  row_tokens(config)


def _check_pairs(config):
  """What compares the pairs of a batch needs all of them, and more than one."""
  for key in ("train.batch_size", "eval.batch_size"):
    if _get(config, key) < 2:
      raise UserError(f"{key}={_get(config, key)} leaves a pair none to be told from; choose 2 or more")
  if config.train.accumulate > 1:
    raise UserError(f"train.accumulate={config.train.accumulate} would compare the pairs of each micro-batch "
                    "only, which is another loss; choose 1, and more devices for a larger batch")
  _divides("eval.train_windows", config.eval.train_windows, "eval.batch_size", config.eval.batch_size)
  if config.data.image.mixup:
    raise UserError(f"data.image.mixup={config.data.image.mixup} blends classes, and pairs have none; choose"
                    " 0")


def _check_groups(config, group_size, rows, length_key, length):
  (key, size), mesh = group_size, config.mesh
  tokens, shards = rows * length, mesh.data * mesh.expert
  batch = f"{tokens} tokens of a batch ({rows} rows x {length_key}={length})"
  sizes = sorted(d for d in _divisors(tokens) if tokens // d % shards == 0)
  near = _either(sorted(sorted(sizes, key=lambda d: abs(math.log(d / size)))[:3]))
  if tokens % size:
    raise UserError(f"{key}={size} does not divide the {batch}; choose {near}")
  if tokens // size % shards:
    raise UserError(f"{key}={size} makes {tokens // size} groups of the {batch}, which do not divide over "
                    f"mesh.data={mesh.data} x mesh.expert={mesh.expert}; choose {near}")


def _divides(key, value, by_key, by):
  if value % by:
    raise UserError(f"{key}={value} does not divide by {by_key}={by}; choose {_multiples(value, by)}")


def _multiples(value: int, of: int) -> str:
  first = max(value // of, 1) * of
  return _either([first, first + of, first + 2 * of])


def _either(values: Sequence[int]) -> str:
  *most, last = map(str, values)
  return f"{', '.join(most)} or {last}" if most else last


def _divisors(n: int) -> set[int]:
  small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
  return {*small, *(n // d for d in small)}


def _show(layers) -> str:
  return ",".join(map(str, layers))


def _in(key, prefix):
  return prefix + key.removeprefix("model.") if key.startswith("model.") else key


def _has(config, key):
  for part in key.split("."):
    if part not in config:
      return False
    config = config[part]
  return True


def _get(config, key):
  for part in key.split("."):
    config = config[part]
  return config


def _set_paths(section, prefix):
  for name in section:
    value = section[name]
    if isinstance(value, ConfigDict):
      yield from _set_paths(value, f"{prefix}{name}.")
    elif value is not None:
      yield prefix + name
