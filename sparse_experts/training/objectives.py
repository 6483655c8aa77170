"""What is minimised: the task's loss and the sparse layers' auxiliary losses, of sums over the batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sparse_experts.models import Model
from sparse_experts.moe.routing import Loss, Statistic
from sparse_experts.tasks.sums import Pair

LAYER_LOSSES: dict[str, Callable[[list], Any]] = {"mean": lambda losses: sum(losses) / len(losses),
                                                  "sum": sum}


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
  layers = [sum(weight * _part(sums["layers"][layer]["losses"][loss], over["layers"][layer][loss])
                for loss, weight in weights.items()) for layer, weights in loss_weights.items()]
  aux = LAYER_LOSSES[layer_losses](layers) if layers else jnp.zeros(())
  return _part(sums["loss"], over["loss"]) + aux, aux


def _part(loss: Loss, over: Any) -> Array:
  """What a part of the batch adds to the loss of all of it."""
  if isinstance(loss, Statistic):
    return loss.part_of(over)
  return loss[0] / jnp.maximum(over, 1.0)


def loss_weights(model: Model) -> dict[str, dict[str, float]]:
  """{layer: {loss: weight}} of the losses that count."""
  return {name: {loss: weight for loss, weight in layer.loss_weights.items() if weight}
          for name, layer in model.sparse_layers.items()}
