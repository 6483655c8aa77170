"""What is minimised: the task's loss and the sparse layers' auxiliary losses, of pairs (sum, count)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sparse_experts.config import ConfigDict
from sparse_experts.models import Model
from sparse_experts.tasks.sums import Pair

# How losses of layers add up: the divisor of their sum, for so many layers.
LAYER_LOSSES: dict[str, Callable[[int], int]] = {"mean": lambda layers: layers, "sum": lambda layers: 1}


def counts(sums: Any) -> Any:
  """The denominators of the objective: {"loss": count, "layers": {layer: {loss: count}}}.

  They depend on the batch's masks only, never on parameters, so they are known before any gradient.
  """
  layers = {name: {k: n for k, (_, n) in s["losses"].items()} for name, s in sums["layers"].items()}
  return jax.lax.stop_gradient({"loss": sums["loss"][1], "layers": layers})


def total(sums: Any, over: Any, loss_weights: dict[str, dict[str, float]],
          layer_losses: dict[str, str]) -> Pair:
  """(objective, its auxiliary part): the task's loss / count + layers' sum_j weight_j * sum_j / count_j.

  layer_losses: {layer: `sum` or `mean`}; a mean is over the layers that are averaged.

  `over` holds the counts of the *whole* batch: summed over its micro-batches, the objectives and the
  gradients of `sums` are then those of one batch.
  """
  ratio = lambda s, n: s / jnp.maximum(n, 1.0)
  layers = {layer: sum(weight * ratio(sums["layers"][layer]["losses"][loss][0], over["layers"][layer][loss])
                       for loss, weight in weights.items()) for layer, weights in loss_weights.items()}
  parts = [sum(layers[layer] for layer in names) / LAYER_LOSSES[how](len(names))
           for how, names in by_sum(layer_losses).items()]
  aux = sum(parts) if parts else jnp.zeros(())
  return ratio(sums["loss"][0], over["loss"]) + aux, aux


def by_sum(layer_losses: dict[str, str]) -> dict[str, list[str]]:
  """{`sum` or `mean`: the layers whose losses add up so}."""
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


def loss_weights(model: Model) -> dict[str, dict[str, float]]:
  """{layer: {loss: weight}} of the losses that count."""
  return {name: {loss: weight for loss, weight in layer.loss_weights.items() if weight}
          for name, layer in model.sparse_layers.items()}
