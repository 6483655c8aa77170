"""Reads and writes foreign config.json files; lists the keys of our config that outputs depend on."""

import inspect
from collections.abc import Mapping
from typing import Any

from sparse_experts.config import NOT_IN_OUTPUTS, ConfigDict, get, paths, sparse_indices
from sparse_experts.errors import UserError
from sparse_experts.models.blocks import ATTENTIONS
from sparse_experts.moe import ROUTERS

_REQUIRED = object()
_YARN = ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
# Constructor arguments outside the table of keys on which no dropless output depends either.
_TRAINING = ("router.bias_rate", "router.sequence_balance_weight", "attention.dropout", "attention.norm_eps")


class Fields:
  """A foreign config.json: `fields("hidden_size")`; errors name the field that is missing or unsupported."""

  def __init__(self, content: dict[str, Any], path: str):
    self.content, self.path = content, path

  def __call__(self, name: str, default: Any = _REQUIRED) -> Any:
    """The value, or the default where it is absent or null."""
    value = self.content.get(name)
    if value is None and default is _REQUIRED:
      raise UserError(f"{self.path} lacks '{name}'; restore the file")
    return default if value is None else value

  def count(self, name: str, default: Any = _REQUIRED) -> int:
    value = self(name, default)
    if type(value) is not int or value < 1:
      raise UserError(f"{self.path}: '{name}' is {value!r}, no whole number above 0; restore the file")
    return value

  def only(self, **wanted: Any) -> None:
    """Refuses a field with another value than the supported one."""
    for name, value in wanted.items():
      if self.content.get(name) not in (value, None):
        raise UserError(f"{self.path}: {name}={self.content[name]!r} is not supported, only {value!r} is")

  def read(self, table: Mapping[str, tuple]) -> dict[str, Any]:
    """{our key: value} of fields that are one of our keys as they stand.

    table: field -> (our key, default, if it may be absent); whole numbers unless the default says otherwise.
    """
    found = {}
    for name, (ours, *default) in table.items():
      kind = type(default[0]) if default else int
      found[ours] = self.count(name, *default) if kind is int else kind(self(name, *default))
    return found

  def rope(self, theta: float = 10_000.0) -> dict[str, Any]:
    """The keys of `config.model.rope`, from the fields of transformers 4 or 5."""
    new, old = self("rope_parameters", {}), self("rope_scaling", {})
    given = {**old, **new}
    rope = {"rope.theta": float(new.get("rope_theta", self("rope_theta", theta)))}
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
      return rope
    if kind != "yarn":
      raise UserError(f"{self.path}: rope type '{kind}' is not supported, only 'default' and 'yarn' are")
    for name, value in (("attention_factor", None), ("truncate", True)):
      if given.get(name, value) != value:
        raise UserError(f"{self.path}: {name}={given[name]!r} of YaRN is not supported; leave it out")
    if "factor" not in given or "original_max_position_embeddings" not in given:
      raise UserError(f"{self.path}: YaRN needs factor and original_max_position_embeddings; restore it")
    rope |= {f"rope.{name}": float(given[name]) for name in _YARN if given.get(name) is not None}
    return rope | {"rope.original_length": int(given["original_max_position_embeddings"])}


def rope_fields(given: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of transformers 4, which 5 reads too, of {our key: value}."""
  yarn = {name: given[f"rope.{name}"] for name in _YARN} | {
      "type": "yarn", "rope_type": "yarn", "original_max_position_embeddings": given["rope.original_length"]}
  return {"rope_theta": given["rope.theta"], "rope_scaling": yarn if given["rope.factor"] > 1 else None}


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
  values |= {"moe_layers": layers, "expert_dim": m.mlp_dim if m.expert_dim is None else m.expert_dim,
             "expert_activation": m.expert_activation or m.activation}
  if values.get("router.gate"):
    values["router.gate"] = values["router.gate"].removesuffix("_after_drops")
  matters = {
      "moe_every": False, "decoder.moe_every": False, "decoder.moe_layers": False,
      "mlp_dim": any(len(sparse) < m.num_layers for sparse in layers.values()),
      "depth_capacity": bool(m.depth_layers),
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
