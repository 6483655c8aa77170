"""Figures of one arm and seed on the stream whose best routing is known, for claims that need no language.

An arm of a claim file: `router` (a name, or "dense"), `rate`, and where they differ from the stream's own
setting `arguments` of the router, `layer` and `eval_layer` (of MoELayer, while training and measuring),
`steps`, `experts`, `expert_dim`. `experiments/routers_side_by_side` describes the stream.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from typing import Any

from jax import Array

from experiments.routers_side_by_side.train import Net, Program, Setting
from sparse_experts.data.testbeds.stream import Batch, World
from sparse_experts.models.template import Template, Tree

FIELDS = {"router", "rate", "arguments", "layer", "eval_layer", "steps", "experts", "expert_dim"}
_OF_SETTING = ("steps", "experts", "expert_dim")
QUICK_STEPS = 20


class Bench(Program):
  """A program that may be measured with another layer than it trains with, and tells the router's logits."""

  def __init__(self, setting: Setting, name: str, arguments: Mapping[str, Any], layer: Mapping[str, Any],
               eval_layer: Mapping[str, Any]):
    super().__init__(setting, name, dict(arguments), layer)
    self.measured = Template(functools.partial(Net, setting, name, dict(arguments), layer=eval_layer))

  def _measures(self, params: Tree, buffers: Tree, world: World, batch: Batch) -> dict[str, Array]:
    trained, self.template = self.template, self.measured
    found = super()._measures(params, buffers, world, batch)
    _, routing = self.measured.bind(params, buffers)(world.vectors(batch), batch.tokens)
    self.template = trained
    if routing is not None and "z" in routing.losses:
      found |= {"logits": routing.losses["z"][0] / routing.losses["z"][1]}
    return found


def loss(arm: Mapping[str, Any], seed: int, quick: bool) -> float | None:
  """Nats per target on groups that no run trains on."""
  return _figure("loss", arm, seed, quick)


def load_cv(arm: Mapping[str, Any], seed: int, quick: bool) -> float | None:
  """Deviation of the experts' loads over their mean: 0 when even, sqrt(E - 1) when one expert has all."""
  return _figure("load_cv", arm, seed, quick)


def logits(arm: Mapping[str, Any], seed: int, quick: bool) -> float | None:
  """Mean square of the log-sum-exp of the router's logits: the z-loss, with or without weight."""
  return _figure("logits", arm, seed, quick)


def _figure(name: str, arm: Mapping[str, Any], seed: int, quick: bool) -> float | None:
  value = _run(json.dumps(arm, sort_keys=True), seed, quick)[name]
  return value if math.isfinite(value) else None


@functools.lru_cache(maxsize=64)
def _run(arm: str, seed: int, quick: bool) -> dict[str, float]:
  return _program(arm, quick).run(json.loads(arm)["rate"], seed)


@functools.lru_cache(maxsize=8)
def _program(arm: str, quick: bool) -> Bench:
  given = json.loads(arm)
  if wrong := given.keys() - FIELDS:
    raise ValueError(f"an arm has {sorted(wrong)}; known: {sorted(FIELDS)}")
  setting = dataclasses.replace(Setting(), **{key: given[key] for key in _OF_SETTING if key in given})
  if quick:
    setting = dataclasses.replace(setting, steps=QUICK_STEPS, eval_groups=4)
  layer = given.get("layer", {})
  return Bench(setting, given["router"], given.get("arguments", {}), layer, given.get("eval_layer", layer))


