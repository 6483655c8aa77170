"""Another router than the config file's acts by its own conventions, unless the command line sets them."""

from collections.abc import Collection
from typing import Any

from ml_collections import ConfigDict

from sparse_experts.config import FACTOR_KEYS, LAYERS, get, routing_field
from sparse_experts.config.schema import KEYS

_CAPACITY = (*FACTOR_KEYS, "capacity_slots")
_OVER_LAYERS = {"sum": "losses summed over layers", "mean": "losses averaged over layers"}


def apply(config: ConfigDict, before: ConfigDict, given: Collection[str]) -> list[str]:
  """Unsets in `config` what its file set for another router; returns a line for each stack that says what.

  before: the config of the file alone. given: the keys that were then set.
  That is capacity, loss coefficients (`router.*_weight`), and how losses add up over layers. A capacity of 0,
  dropless, is of no router and stays.
  """
  stacks = ["model.", "model.decoder."] if config.model.name == "seq2seq" else ["model."]
  names = {stack: [routing_field(c, stack, "router.name")[1] for c in (before, config)] for stack in stacks}
  changed = [stack for stack in stacks if names[stack][0] != names[stack][1]]
  values: dict[str, Any] = {}
  lines = []
  for stack in changed:
    old, new = names[stack]
    KEYS["model.router.name"].check(new)
    capacity = _set(before, given, [stack + name for name in _CAPACITY])
    weights = _set(before, given, [f"{stack}router.{name}" for name in get(before, stack + "router")
                                   if name.endswith(("_weight", "_weights"))])
    layers = _set(before, given, ["train.layer_losses"] if stack == "model." else [])
    values |= dict.fromkeys({**capacity, **weights, **layers})
    inherited = {}
    if "model." not in changed and not any(stack + name in given for name in _CAPACITY):
      inherited = {stack + name: value for name in _CAPACITY if (value := get(before, f"model.{name}"))}
    if not (capacity or weights or layers or inherited):
      continue
    own = _own(config, stack, new)
    if inherited:  # by the decoder, whose encoder keeps it
      values |= {stack + name: getattr(own, name) for name in FACTOR_KEYS}
    lines.append(_line(inherited | capacity, weights, layers, old, new, own))
  kept = changed == ["model."] != stacks and not any(f"model.decoder.{name}" in given for name in _CAPACITY)
  if kept:  # a decoder whose router stays keeps the capacity that it had from the encoder
    values |= {f"model.decoder.{name}": get(before, f"model.{name}") for name in _CAPACITY
               if f"model.{name}" in values and get(before, f"model.decoder.{name}") is None}
  with config.unlocked():
    config.update_from_flattened_dict(values)
  return lines


def _set(before, given, keys):
  """{key: value} of those that the file set, 0 aside, and the command line did not."""
  return {key: value for key in keys if key not in given and (value := get(before, key))}


def _own(config, stack, name):
  from sparse_experts.moe.registry import find_router, router_k
  from sparse_experts.moe.routing import Convention

  if name in LAYERS:
    return Convention()
  arguments = {key: value for key, value in get(config, stack + "router").items() if value is not None}
  return find_router(name).convention(router_k(**arguments | {"name": name}))


def _line(capacity, weights, layers, old, new, own):
  dropped = capacity | weights | layers
  acts = [own.capacity] * bool(capacity) + ["its coefficients"] * bool(weights)
  acts += [_OVER_LAYERS[own.layer_losses]] * bool(layers)
  *most, last = (f"{key.removeprefix('model.')}={value}" for key, value in dropped.items())
  shown = f"{', '.join(most)} and {last}" if most else last
  keep = " ".join(f"--config.{key}={value}" for key, value in dropped.items())
  were, them = ("were", "them") if len(dropped) > 1 else ("was", "it")
  return (f"{shown} of the config file {were} for {old}; {new}'s own {'act' if were == 'were' else 'acts'}: "
          f"{', '.join(acts)}; to keep {them} set {keep}")
