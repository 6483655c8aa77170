"""What is minimised: the task's loss and the sparse layers' auxiliary losses, of sums over the batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sparse_experts.errors import UserError
from sparse_experts.models import Model
from sparse_experts.moe.routing import Loss, Statistic
from sparse_experts.tasks.sums import Pair

# How the losses of layers add up; `pooled` is `sum` of stacks, each of which is as one layer.
LAYER_LOSSES: dict[str, Callable[[list], Any]] = {"mean": lambda losses: sum(losses) / len(losses),
                                                  "sum": sum, "pooled": sum}


def whole(sums: Any) -> Any:
  """What a part of a batch must know of all of it: {"loss": count, "layers": {layer: {loss: count}}}.

  Counts depend on the batch's masks only, so no pass through the model is needed for them. In place of a
  `Statistic`'s count stands the statistic, which needs one.
  """
  layers = {name: {k: loss if isinstance(loss, Statistic) else loss[1] for k, loss in s["losses"].items()}
            for name, s in sums["layers"].items()}
  return jax.lax.stop_gradient({"loss": sums["loss"][1], "layers": layers})


def total(sums: Any, over: Any, loss_weights: dict[str, dict[str, float]], layer_losses: str) -> Pair:
  """(objective, its auxiliary part): the task's loss / count + layers' sum_j weight_j * sum_j / count_j.

  `over` is `whole` of the *whole* batch: summed over its micro-batches, the objectives and the gradients of
  `sums` are then those of one batch.
  """
  losses = {layer: {loss: (of["losses"][loss], over["layers"][layer][loss]) for loss in loss_weights[layer]}
            for layer, of in sums["layers"].items()}
  if layer_losses == "pooled":
    losses, loss_weights = _pooled(losses), {_stack(layer): of for layer, of in loss_weights.items()}
  layers = [sum(weight * _part(*losses[layer][loss]) for loss, weight in weights.items())
            for layer, weights in loss_weights.items()]
  aux = LAYER_LOSSES[layer_losses](layers) if layers else jnp.zeros(())
  return _part(sums["loss"], over["loss"]) + aux, aux


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
