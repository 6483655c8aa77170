"""What is minimised: the task's loss and the sparse layers' auxiliary losses, of sums over the batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sparse_experts.config import ConfigDict
from sparse_experts.errors import UserError
from sparse_experts.models import Model
from sparse_experts.moe.routing import Loss, Statistic
from sparse_experts.tasks.sums import Pair

# How losses of layers add up: the divisor of their sum, for so many layers. Of `pooled`, each stack is one.
LAYER_LOSSES: dict[str, Callable[[int], int]] = {
    "mean": lambda layers: layers, "sum": lambda layers: 1, "pooled": lambda layers: 1}


def whole(sums: Any) -> Any:
  """What a part of a batch must know of all of it: {"loss": count, "layers": {layer: {loss: count}}}.

  Counts depend on the batch's masks only, so no pass through the model is needed for them. In place of a
  `Statistic`'s count stands the statistic, which needs one.
  """
  layers = {name: {k: loss if isinstance(loss, Statistic) else loss[1] for k, loss in s["losses"].items()}
            for name, s in sums["layers"].items()}
  return jax.lax.stop_gradient({"loss": sums["loss"][1], "layers": layers})


def total(sums: Any, over: Any, loss_weights: dict[str, dict[str, float]],
          layer_losses: dict[str, str]) -> Pair:
  """(objective, its auxiliary part): the task's loss / count + layers' sum_j weight_j * sum_j / count_j.

  layer_losses: {layer: `sum`, `mean` or `pooled`}; a mean is over the layers that are averaged.

  `over` is `whole` of the *whole* batch: summed over its micro-batches, the objectives and the gradients of
  `sums` are then those of one batch.
  """
  aux = jnp.zeros(())
  for how, names in by_sum(layer_losses).items():
    weights = {name: loss_weights[name] for name in names}
    losses = {name: {loss: (sums["layers"][name]["losses"][loss], over["layers"][name][loss])
                     for loss in of} for name, of in weights.items()}
    if how == "pooled":
      losses, weights = _pooled(losses), {_stack(name): of for name, of in weights.items()}
    each = [sum(weight * _part(*losses[name][loss]) for loss, weight in of.items())
            for name, of in weights.items()]
    aux += sum(each) / LAYER_LOSSES[how](len(names))
  return _part(sums["loss"], over["loss"]) + aux, aux


def by_sum(layer_losses: dict[str, str]) -> dict[str, list[str]]:
  """{`sum`, `mean` or `pooled`: the layers whose losses add up so}."""
  found: dict[str, list[str]] = {}
  for layer, how in layer_losses.items():
    found.setdefault(how, []).append(layer)
  return found


def layer_losses(model: Model, config: ConfigDict) -> dict[str, str]:
  """{layer: how its losses add up with those of others}: as the config says, else as its router does."""
  return {name: config.train.layer_losses or layer.layer_losses
          for name, layer in model.sparse_layers.items()}


def coefficients(model: Model, config: ConfigDict) -> dict[str, dict[str, float]]:
  """{layer: {loss: the coefficient that acts}}, after the sum or mean over layers."""
  layers = layer_losses(model, config)
  divisor = {how: LAYER_LOSSES[how](len(names)) for how, names in by_sum(layers).items()}
  return {layer: {loss: weight / divisor[layers[layer]] for loss, weight in weights.items()}
          for layer, weights in loss_weights(model).items()}


def _pooled(losses: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
  """The losses of each stack's layers, as if the tokens of all were those of one layer."""
  stacks: dict[str, dict[str, Any]] = {}
  for layer, of in losses.items():
    before = stacks.get(_stack(layer))
    stacks[_stack(layer)] = of if before is None else jax.tree.map(jnp.add, before, of)
  return stacks


def _stack(layer: str) -> str:
  return layer.partition("/")[0]


def _part(loss: Loss, over: Any) -> Array:
  """What a part of the batch adds to the loss of all of it."""
  if isinstance(loss, Statistic):
    return loss.part_of(over)
  return loss[0] / jnp.maximum(over, 1.0)


def check_pooled(model: Model) -> None:
  """Refuses layers whose losses cannot be pooled: those of a group, and those of layers that differ."""
  weights: dict[str, Any] = {}
  for name, layer in model.sparse_layers.items():
    if not layer.loss_weights:
      continue
    scope = getattr(layer.router, "scope", None)
    if scope != "batch":
      way_out = "set model.router.scope=batch" if scope else "choose train.layer_losses=mean or sum"
      raise UserError("train.layer_losses=pooled computes a loss of the tokens of all layers together, but "
                      f"{type(layer.router).__name__} of {name} has losses of each routing group; {way_out}")
    own = layer.num_experts, layer.loss_weights
    if weights.setdefault(_stack(name), own) != own:
      raise UserError(f"train.layer_losses=pooled needs layers alike, but {name} has other experts or "
                      "coefficients than another of its stack; choose train.layer_losses=mean or sum")


def loss_weights(model: Model) -> dict[str, dict[str, float]]:
  """{layer: {loss: weight}} of the losses that count."""
  return {name: {loss: weight for loss, weight in layer.loss_weights.items() if weight}
          for name, layer in model.sparse_layers.items()}
