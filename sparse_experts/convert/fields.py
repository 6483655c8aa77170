"""Reads and writes foreign config.json files; lists the keys of our config that outputs depend on."""

import inspect
from collections.abc import Mapping
from typing import Any

from sparse_experts.config import NOT_IN_OUTPUTS, ConfigDict, get, paths, sparse_indices
from sparse_experts.convert.eight_bits import Rule
from sparse_experts.convert.published import QUANTIZATION, ROPE, Table
from sparse_experts.errors import UserError
from sparse_experts.models.blocks import ATTENTIONS
from sparse_experts.models.layers import shared_width
from sparse_experts.moe import ROUTERS

# Activations of transformers, by our name of an FFN's: first what we write, then others of the same function.
_TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python_tanh", "gelu_accurate")
PLAIN = {"relu": ("relu",), "gelu": _TANH, "gelu_exact": ("gelu", "gelu_python")}
GATED = {"swiglu": ("silu", "swish"), "geglu": PLAIN["gelu"], "geglu_exact": PLAIN["gelu_exact"]}
_YARN = ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
# Constructor arguments outside the table of keys on which no dropless output depends either.
_TRAINING = ("router.bias_rate", "router.sequence_balance_weight", "attention.dropout", "attention.norm_eps")


class Fields:
  """A foreign config.json by its family's table: `fields("hidden_size")` is the value, or the default.

  Raises UserError, one line, for a field whose value is not of the table's type. path: what messages call it.
  """

  def __init__(self, content: dict[str, Any], path: str, table: Table, aliases: Mapping[str, str] = {}):
    self.path, self.table = path, table
    self.content = content = dict(content)
    for alias, name in aliases.items():
      value = content.pop(alias, None)
      if value is not None and content.setdefault(name, value) != value:
        raise UserError(f"{path}: {name}={content[name]!r}, but {alias}={value!r} is another name of it; "
                        "leave out the one that is not meant")
    for name, field in table.items():
      if name in content and not field.takes(content[name]):
        raise UserError(f"{path}: {name}={content[name]!r:.80} is not {field.words}; restore the file")

  def __call__(self, name: str) -> Any:
    field = self.table[name]
    value = self.content.get(name, field.default)
    return float(value) if field.type == "a number" and value is not None else value

  def only(self, **wanted: Any) -> None:
    """Refuses a field with another value than the supported one."""
    for name, value in wanted.items():
      if self(name) != value:
        raise UserError(f"{self.path}: {name}={self(name)!r} is not supported, only {value!r} is")

  def read(self, names: Mapping[str, str]) -> dict[str, Any]:
    """{our key: value} of {field: our key}."""
    return {ours: self(name) for name, ours in names.items()}

  def activation(self, name: str, known: Mapping[str, tuple[str, ...]]) -> str:
    """Our name of the field's activation, one of PLAIN or GATED."""
    for ours, theirs in known.items():
      if self(name) in theirs:
        return ours
    wanted = ", ".join(theirs[0] for theirs in known.values())
    raise UserError(f"{self.path}: {name}={self(name)!r} is not supported, only {wanted} are")

  def section(self, name: str, table: Table) -> "Fields":
    """The fields of an object in this one."""
    return Fields(self(name) or {}, f"{self.path}: {name}", table)

  def rope(self) -> dict[str, Any]:
    """The keys of `config.model.rope`.

    As transformers 5: an object `rope_scaling` counts instead of `rope_parameters`; its `rope_theta` counts
    before the one beside it.
    """
    self.only(partial_rotary_factor=1.0)
    given = self.section("rope_scaling" if self("rope_scaling") else "rope_parameters", ROPE)
    for name, value in given.content.items():
      if isinstance(value, dict):
        raise UserError(f"{given.path}.{name}: positions of each kind of layer are not supported, only the "
                        "same of all")
    given.only(partial_rotary_factor=1.0)
    rope = {"rope.theta": given("rope_theta") or self("rope_theta")}
    kind = given("rope_type") or given("type")
    if kind == "default":
      return rope
    if kind != "yarn":
      raise UserError(f"{given.path}: rope type '{kind}' is not supported, only 'default' and 'yarn' are")
    given.only(attention_factor=None, truncate=True)
    if "factor" not in given.content:
      raise UserError(f"{given.path}: YaRN needs a factor; restore the file")
    original, extended = given("original_max_position_embeddings"), self("max_position_embeddings")
    original = original or extended
    yarn = {name: given(name) for name in _YARN}
    yarn |= {"factor": yarn["factor"] or extended / original,
             "mscale": yarn["mscale"] or 0.0, "mscale_all_dim": yarn["mscale_all_dim"] or 0.0,
             "beta_fast": yarn["beta_fast"] or 32.0, "beta_slow": yarn["beta_slow"] or 1.0}
    return rope | {f"rope.{name}": value for name, value in yarn.items()} | {"rope.original_length": original}

  def scales(self) -> Rule:
    """How 8-bit matrices are scaled."""
    given = self.section("quantization_config", QUANTIZATION)
    given.only(quant_method="fp8", fmt="e4m3")
    block = given("weight_block_size")
    return Rule(None if block is None else (block[0], block[1]), stated=bool(given.content))


def rope_fields(given: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of transformers 4, which 5 reads too, of {our key: value}."""
  yarn = {name: given[f"rope.{name}"] for name in _YARN} | {
      "type": "yarn", "rope_type": "yarn", "original_max_position_embeddings": given["rope.original_length"]}
  return {"rope_theta": given["rope.theta"], "rope_scaling": yarn if given["rope.factor"] > 1 else None}


def balance_coefficient(given: Mapping[str, Any]) -> float:
  """`router_aux_loss_coef` of {our key: value}: theirs weighs a loss that counts all choices of a token."""
  weight = given["router.load_balance_weight"]
  if weight is None:
    weight = inspect.signature(ROUTERS["top_k"].__init__).parameters["load_balance_weight"].default
  return weight / given["router.k"] if given["router.balance_count"] == "assignments" else weight


def sparse_layers(m: ConfigDict, stack: str = "decoder") -> tuple[int, ...]:
  """The sparse layers of a stack."""
  own = m.decoder if m.name == "seq2seq" and stack == "decoder" else m
  field = lambda name: m[name] if own[name] is None else own[name]
  if not field("num_experts"):
    return ()
  return sparse_indices(m.num_layers, field("moe_every"), tuple(field("moe_layers")))


def outputs_depend_on(config: ConfigDict) -> dict[str, Any]:
  """Key -> value of what the outputs of given weights depend on, dropless, with defaults written out."""
  m = config.model
  is_free = lambda key: f"model.{key}" in NOT_IN_OUTPUTS or key.removeprefix("decoder.") in _TRAINING
  values = {key: get(m, key) for key in paths(m) if not is_free(key)}
  for section, classes in (("attention", ATTENTIONS), ("router", ROUTERS)):
    if m[section].name in classes:
      make = classes[m[section].name].__init__
      for name, parameter in inspect.signature(make).parameters.items():
        key = f"{section}.{name}"
        has_default = parameter.default is not parameter.empty and not is_free(key)
        if values.get(key) is None and has_default and parameter.default is not None:
          values[key] = parameter.default
  stacks = ("encoder", "decoder") if m.name == "seq2seq" else ("decoder",)
  layers = {stack: sparse_layers(m, stack) for stack in stacks}
  expert_dim = m.mlp_dim if m.expert_dim is None else m.expert_dim
  values |= {"moe_layers": layers, "expert_dim": expert_dim,
             "expert_activation": m.expert_activation or m.activation,
             "shared_dim": shared_width(m, expert_dim)}
  if values.get("router.gate"):
    values["router.gate"] = values["router.gate"].removesuffix("_after_drops")
  matters = {
      "moe_every": False, "shared_experts": False, "decoder.moe_every": False, "decoder.moe_layers": False,
      "mlp_dim": any(len(sparse) < m.num_layers for sparse in layers.values()),
      "depth_capacity": bool(m.depth_layers),
      "relative_bias.num_buckets": m.name == "seq2seq" or m.layer_bias,
      "relative_bias.max_distance": m.name == "seq2seq" or m.layer_bias,
      "attention.num_kv_heads": values.get("attention.num_kv_heads") not in (None, m.num_heads),
      "rope.theta": m.name == "decoder"}
  has_yarn = m.name != "seq2seq" and m.rope.factor > 1

  def depends(key, value):
    section = key.partition(".")[0]
    if section == "decoder" and value in (None, values.get(key.removeprefix("decoder."))):
      return False
    if section in ("attention", "router") and value is None:
      return False
    return matters.get(key, section != "rope" or has_yarn)

  values = {key: value for key, value in values.items() if depends(key, value)}
  if config.given.router:
    values["router.name"] = f"an instance of {config.given.router}"
  return values
