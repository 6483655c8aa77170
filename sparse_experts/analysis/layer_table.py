"""A model's layers as a table: experts, slots, what a token depends on, parameters and FLOPs."""

from typing import Any

from ml_collections import ConfigDict

from sparse_experts.analysis.table import short
from sparse_experts.models import build, counts

COLUMNS = ("layer", "kind", "hidden", "experts", "k", "slots train", "slots eval", "FFN sees", "params",
           "active", "FLOPs/token")


def describe(config: ConfigDict, vocab_size: int, target_length: int | None) -> dict[str, Any]:
  """`models.counts.describe` with the slots and the causality of each sparse layer."""
  found = counts.describe(config, vocab_size, target_length)
  train, evaluation = (build(config, vocab_size, phase).sparse_layers for phase in ("train", "eval_capacity"))
  for layer in found["layers"]:
    for name in (layer["name"], f"{layer['name']}/attention"):
      if sparse := train.get(name):
        layer |= {"group_size": sparse.group_size, "capacity": sparse.capacity,
                  "causality": sparse.causality, "eval_capacity": evaluation[name].capacity}
  return found


def rows(found: dict[str, Any]) -> list[tuple]:
  """COLUMNS of each layer of `describe`'s."""
  return list(map(_row, found["layers"]))


def _row(layer: dict[str, Any]) -> tuple:
  sparse: tuple = ("", "", "", "", "")
  if "experts" in layer:
    slots = (f"{c} of {layer['group_size']}" if c else "dropless" for c in (
        layer["capacity"], layer["eval_capacity"]))
    sparse = (layer["experts"], layer["k"], *slots, layer["causality"])
  return (layer["name"], layer["kind"], layer["hidden"], *sparse, short(layer["params"]),
          short(layer["params_active"]), short(layer["flops_per_token"]))
