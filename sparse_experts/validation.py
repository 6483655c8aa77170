"""Checks a config before anything heavy is imported; each mistake is one UserError with a way out.

What needs devices (is the mesh larger than the machine?) or data is checked where those are at hand.
"""

import math
from collections.abc import Sequence

from sparse_experts import tasks
from sparse_experts.config import FACTOR_KEYS, LAYERS, ConfigDict, get, paths, routing_field, sparse_indices
from sparse_experts.config.schema import KEYS, check_values
from sparse_experts.errors import UserError

GATED = ("geglu", "geglu_exact", "swiglu")  # activations with a gate
_OWN_BLOCKS = ("rope", "attention", "norm_eps", "context_length")
UNUSED = {  # keys and sections of `model` that the model of that name does not use
    "decoder": (), "seq2seq": ("rope",), "vit": _OWN_BLOCKS, "limoe": _OWN_BLOCKS}


def validate(config: ConfigDict) -> None:
  """Raises UserError for the first thing in the config that cannot work."""
  check_values(config)
  _check_start(config)
  tasks.check(config)
  _check_passes(config)
  _check_unused(config.model)
  _check_blocks(config.model)
  _check_slots("model.", config.model)
  _check_slots("model.decoder.", config.model.decoder)
  _check_mesh(config)
  stacks = tasks.task_of(config).stack_tokens()
  for stack, (length_key, length) in stacks.items():
    prefix = "model.decoder." if stack == "decoder" and len(stacks) > 1 else "model."
    _check_sparse(config, prefix, length_key, length)


def _check_start(config):
  wanted = {"init_take": "run to take from", "init_upcycle": "dense run to copy FFNs from",
            "init_optimizer": "run to go on from"}
  for key, what in wanted.items():
    if config[key] != KEYS[key].default and not config.init_from:
      raise UserError(f"{key}={config[key]!r} is set, but init_from names no {what}; set it")
  _check_distill(config)


def _check_passes(config):
  """Refuses objectives of the training loss where a task has no distribution over values."""
  task = tasks.task_of(config)
  for key in ("train.consistency", "train.label_smoothing"):
    if get(config, key) and not task.has_softmax:
      raise UserError(f"{key}={get(config, key):g} is of a softmax over values, and data.objective="
                      f"'{config.data.objective}' has none; leave it out")


def _check_distill(config):
  teacher = config.distill.teacher
  for key in ("distill.weight", "distill.copy"):
    if get(config, key) != KEYS[key].default and not teacher:
      raise UserError(f"{key}={get(config, key)} is set, but distill.teacher names no run to learn from; set "
                      "it")
  if not teacher:
    return
  task = tasks.task_of(config)
  if not task.token_targets:
    raise UserError(f"distill.teacher={teacher}: a run on {task.items} cannot be distilled, only one on "
                    "tokens; choose data.objective=causal, span_corruption or text_classification")
  if config.init_from and config.distill.copy:
    raise UserError(f"init_from={config.init_from} and distill.copy=True both say what to start from; set "
                    "distill.copy=false, or leave init_from out")


def _check_unused(model):
  """Refuses keys of another architecture, which would change nothing."""
  overrides = [key for key in paths(model.decoder) if get(model.decoder, key) is not None]
  if model.name != "seq2seq" and overrides:
    raise UserError(f"model.decoder.{overrides[0]} is set, but model.name='{model.name}' has one stack only; "
                    f"set model.{overrides[0]} instead")
  for key in paths(model):
    if key.startswith(UNUSED[model.name]) and get(model, key) != KEYS[f"model.{key}"].value:
      raise UserError(f"model.{key}={get(model, key)} is set, but model.name='{model.name}' does not use it; "
                      "leave it out, or choose model.name=decoder")
  if model.layer_bias and model.name != "decoder":
    raise UserError(f"model.layer_bias=True is for model.name='decoder'; in a {model.name} all layers of a "
                    "stack share one bias: leave it")
  if model.depth_layers and model.name != "seq2seq":
    raise UserError(f"model.depth_layers={model.depth_layers}: Mixture-of-Depths sees later tokens, which a "
                    "causal decoder refuses, and a vit has none; leave it (), or choose model.name='seq2seq',"
                    " whose encoder takes it")
  if model.shared_gate and not model.shared_experts:
    raise UserError("model.shared_gate=True is set, but model.shared_experts=0; set that, or leave it")
  if model.shared_dim is not None and not model.shared_experts:
    raise UserError(f"model.shared_dim={model.shared_dim} is set, but model.shared_experts=0; set that, or "
                    "leave it")
  ternary = {key: value for key, value in model.ternary.items() if value is not None}
  if model.expert_weights != "ternary" and ternary:
    key, value = next(iter(ternary.items()))
    raise UserError(f"model.ternary.{key}={value} is set, but model.expert_weights='{model.expert_weights}'; "
                    "set model.expert_weights=ternary, or leave it")
  if model.expert_weights == "ternary" and model.ffn_bias:
    raise UserError("model.expert_weights='ternary' has no biases, but model.ffn_bias=True; leave one "
                    "of them out")
  if model.expert_weights == "ternary" and model.num_experts and model.moe_place != "ffn":
    raise UserError("model.expert_weights='ternary' is of the experts of sparse FFNs, but model.moe_place="
                    f"'{model.moe_place}' has experts in the attention; leave one of them out")
  if model.moe_projections != "both" and model.moe_heads == 1:
    raise UserError(f"model.moe_projections='{model.moe_projections}' is set, but model.moe_heads=1 cuts no "
                    "token; set that, or leave it")
  if model.moe_heads > 1 and model.moe_place != "ffn":
    raise UserError(f"model.moe_heads={model.moe_heads} cuts the tokens of sparse FFNs, but model.moe_place="
                    f"'{model.moe_place}' has experts in the attention; leave one of them out")
  if model.extra_ffn and model.moe_place == "attention":
    raise UserError("model.extra_ffn=True follows sparse FFNs, of which model.moe_place='attention' has none;"
                    " choose moe_place='ffn' or 'both', or leave it")


def _check_blocks(model):
  """Widths and places that the blocks of that model cannot have."""
  if model.name in ("vit", "limoe"):
    _check_vision(model)
  sparse = sparse_indices(model.num_layers, model.moe_every, model.moe_layers) if model.num_experts else ()
  for layer in model.depth_layers:
    outside = not 0 <= layer < model.num_layers
    if outside or layer in sparse:
      why = f"is not among 0 to {model.num_layers - 1}" if outside else "is sparse"
      raise UserError(f"model.depth_layers={_show(model.depth_layers)} names layer {layer}, which {why}; "
                      "name dense layers")
  if model.name == "decoder" and model.head_dim % 2 and model.attention.name == "multi_head":
    raise UserError(f"model.head_dim={model.head_dim} is odd, rotary positions need pairs; "
                    f"choose {model.head_dim + 1}")
  if model.name == "seq2seq" or model.layer_bias:
    number, far = model.relative_bias.num_buckets, model.relative_bias.max_distance
    least = 4 if model.name == "seq2seq" else 2  # an encoder has half of them for each direction
    if number < least or far <= number // least:
      raise UserError(f"model.relative_bias.num_buckets={number}, max_distance={far}: T5's bias needs at "
                      f"least {least} buckets, and a distance above 1/{least} of their number; raise them")
  if model.moe_place != "ffn" and model.num_experts:
    for name, value in model.attention.items():
      if value not in (None, "multi_head"):
        raise UserError(f"model.attention.{name} is set, but model.moe_place='{model.moe_place}' has experts "
                        "make queries, keys and values; leave it out, or choose model.moe_place=ffn")


def _check_slots(prefix, section):
  """Refuses two statements of how many slots there are."""
  factors = {name: section[name] for name in FACTOR_KEYS if section[name] is not None}
  if section.capacity_slots is not None and factors:
    shown = " and ".join(f"{prefix}{name}={value}" for name, value in factors.items())
    unset = " ".join(f"--config.{prefix}{name}=none" for name in factors)
    raise UserError(f"{prefix}capacity_slots={section.capacity_slots} and {shown} both say how many slots an "
                    f"expert has; leave one out, with --config.{prefix}capacity_slots=none or {unset}")


def _check_vision(model):
  if model.activation in GATED or model.moe_place != "ffn":
    raise UserError(f"model.activation='{model.activation}', model.moe_place='{model.moe_place}': a "
                    f"{model.name} has MLPs with biases, not gated, and experts in their place; choose gelu "
                    "or relu, and ffn")
  for name in ("extra_ffn", "multiplicative_bias", "expert_activation", "shared_experts"):
    if model[name]:
      raise UserError(f"model.{name}={model[name]} is set, but the MLPs of a {model.name} and its experts "
                      "are alike; leave it out")
  if model.num_experts and model.router.name == "smear":
    raise UserError("model.router.name='smear' merges experts without biases, and a "
                    f"{model.name}'s have some; choose another")
  if model.num_experts and model.name == "limoe" and model.router.name == "soft_moe":
    raise UserError("model.router.name='soft_moe' mixes the tokens of an image with those of its text, which "
                    "are to be compared; choose a router")


def _check_mesh(config):
  model, mesh, rows, parts = config.model, config.mesh, config.train.batch_size, config.train.accumulate
  shards, over = mesh.data * mesh.expert, f"mesh.data={mesh.data} x mesh.expert={mesh.expert}"
  _divides("train.batch_size", rows, parts, f"by train.accumulate={parts}")
  _divides("train.batch_size", rows, parts * shards, f"over train.accumulate={parts} x {over}")
  for axis in mesh.dcn:
    if mesh[axis] % mesh.dcn[axis]:
      raise UserError(f"mesh.dcn.{axis}={mesh.dcn[axis]} slices do not divide mesh.{axis}={mesh[axis]}, which"
                      f" counts the devices of all; choose {_either(sorted(_divisors(mesh[axis])))}")
  for key in ("num_heads", "mlp_dim", "attention.num_kv_heads"):
    _divides(f"model.{key}", get(model, key) or 0, mesh.model, f"by mesh.model={mesh.model}")
  heads = model.attention.num_kv_heads or 1
  _divides("model.num_heads", model.num_heads, heads, f"by model.attention.num_kv_heads={heads}")
  if mesh.fsdp:
    _divides("model.embed_dim", model.embed_dim, shards, f"over {over}, as mesh.fsdp=True asks",
             ", or mesh.fsdp=False")


def _check_sparse(config, prefix, length_key, length):
  """One stack's sparse layers: experts, choices, groups."""
  causal = config.model.name == "decoder" or prefix == "model.decoder."
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
  _divides(experts_key, experts, mesh.expert, f"over mesh axis 'expert'={mesh.expert}",
           ", or shrink the axis")
  heads, width = config.model.moe_heads, config.model.embed_dim
  if width % heads:
    near = sorted(sorted(_divisors(width) - {1}, key=lambda d: abs(math.log(d / heads)))[:3])
    raise UserError(f"model.moe_heads={heads} does not divide model.embed_dim={width}; choose {_either(near)}"
                    ", or another width")
  for key in ("expert_dim", "shared_dim"):
    _divides(f"model.{key}", config.model[key] or 0, mesh.model, f"by mesh.model={mesh.model}")
  order_key, order = routing_field(config, prefix, "router.order")
  if causal and order == "batch_priority":
    raise UserError(f"{order_key}='batch_priority' lets later tokens take the slots of earlier ones, which a "
                    f"causal decoder refuses; set {prefix}router.order to choice or token")
  name_key, name = routing_field(config, prefix, "router.name")
  if name in LAYERS and not config.given.router:
    m = config.model
    if name == "smear" and m.ffn_bias:
      raise UserError(f"{name_key}='smear' merges experts without biases, but model.ffn_bias=True; choose "
                      "another, or leave it out")
    if name == "smear" and m.expert_weights == "ternary":
      raise UserError(f"{name_key}='smear' merges experts, whose sum is not ternary, but "
                      "model.expert_weights='ternary'; choose another, or leave it out")
    if m.shared_experts or m.gating_dropout.rate or m.moe_place != "ffn" or heads > 1:
      raise UserError(f"{name_key}='{name}' is a layer of its own, without model.shared_experts, moe_heads, "
                      "gating_dropout or moe_place='attention'; choose a router for those")
    return  # it mixes rows, not groups
  if length is not None:
    _check_groups(config, routing_field(config, prefix, "group_size"), length_key, length)


def _check_groups(config, group_size, length_key, length):
  (key, size), mesh = group_size, config.mesh
  rows = config.train.batch_size // config.train.accumulate
  tokens, shards = rows * length, mesh.data * mesh.expert
  batch = f"{tokens} tokens of a batch ({rows} rows x {length_key}={length})"
  sizes = sorted(d for d in _divisors(tokens) if tokens // d % shards == 0)
  near = _either(sorted(sorted(sizes, key=lambda d: abs(math.log(d / size)))[:3]))
  if tokens % size:
    raise UserError(f"{key}={size} does not divide the {batch}; choose {near}")
  if tokens // size % shards:
    raise UserError(f"{key}={size} makes {tokens // size} groups of the {batch}, which do not divide over "
                    f"mesh.data={mesh.data} x mesh.expert={mesh.expert}; choose {near}")


def _divides(key: str, value: int, by: int, words: str, way_out: str = "") -> None:
  if value % by:
    first = max(value // by, 1) * by
    raise UserError(f"{key}={value} does not divide {words}; choose "
                    f"{_either([first, first + by, first + 2 * by])}{way_out}")


def _either(values: Sequence[int]) -> str:
  *most, last = map(str, values)
  return f"{', '.join(most)} or {last}" if most else last


def _divisors(n: int) -> set[int]:
  small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
  return {*small, *(n // d for d in small)}


def _show(layers) -> str:
  return ",".join(map(str, layers))
