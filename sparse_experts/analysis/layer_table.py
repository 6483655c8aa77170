"""A model's layers as a table: experts, slots, losses, what a token depends on, parameters and FLOPs."""

from typing import Any

from ml_collections import ConfigDict

from sparse_experts.analysis.table import short
from sparse_experts.models import build, counts, even_load
from sparse_experts.training import objectives

COLUMNS = ("layer", "kind", "hidden", "experts", "k", "slots train", "slots eval", "FFN sees", "params",
           "active", "FLOPs/token")

_SUMS = {"sum": "summed over layers", "mean": "after the mean over layers",
         "pooled": "of the tokens of all layers of a stack together"}


def describe(config: ConfigDict, vocab_size: int, target_length: int | None) -> dict[str, Any]:
  """`models.counts.describe` with each sparse layer's slots, causality and `losses`: {loss: its coefficient}.

  `warning` says which layers cannot hold an even load; None if all can.
  """
  found = counts.describe(config, vocab_size, target_length)
  model = build(config, vocab_size, "train")
  train, evaluation = model.sparse_layers, build(config, vocab_size, "eval_capacity").sparse_layers
  sums, coefficients = objectives.layer_losses(model, config), objectives.coefficients(model, config)
  for layer in found["layers"]:
    for name in (layer["name"], f"{layer['name']}/attention"):
      if sparse := train.get(name):
        layer |= {"group_size": sparse.group_size, "capacity": sparse.capacity,
                  "causality": sparse.causality, "eval_capacity": evaluation[name].capacity,
                  "losses": coefficients[name], "layer_losses": sums[name]}
  return found | {"warning": even_load.warning(train)}


def losses(found: dict[str, Any]) -> list[str]:
  """The coefficients that act, in words: a line for all layers that have the same."""
  lines: dict[str, list[str]] = {}
  for layer in found["layers"]:
    if layer.get("losses"):
      each = ", ".join(f"{name} {weight:.3g}" for name, weight in layer["losses"].items())
      how = _SUMS[layer["layer_losses"]]
      lines.setdefault(f"{each}, {how}", []).append(layer["name"])
  return [f"{words}: {even_load.some(names)}" for words, names in lines.items()]


def rows(found: dict[str, Any]) -> list[tuple]:
  """COLUMNS of each layer of `describe`'s."""
  return list(map(_row, found["layers"]))


def _row(layer: dict[str, Any]) -> tuple:
  sparse: tuple = ("", "", "", "", "")
  if "experts" in layer:
    slots = (f"{c} of {layer['group_size'] * layer.get('heads', 1)}" if c else "dropless" for c in (
        layer["capacity"], layer["eval_capacity"]))
    sparse = (layer["experts"], layer["k"], *slots, layer["causality"])
  return (layer["name"], layer["kind"], layer["hidden"], *sparse, short(layer["params"]),
          short(layer["params_active"]), short(layer["flops_per_token"]))
