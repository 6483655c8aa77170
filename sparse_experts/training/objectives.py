"""What is minimised: the task's loss and the sparse layers' auxiliary losses, of pairs (sum, count)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sparse_experts.models import Model
from sparse_experts.tasks.sums import Pair

LAYER_LOSSES: dict[str, Callable[[list], Any]] = {"mean": lambda losses: sum(losses) / len(losses),
                                                  "sum": sum}


def counts(sums: Any) -> Any:
  """The denominators of the objective: {"loss": count, "layers": {layer: {loss: count}}}.

  They depend on the batch's masks only, never on parameters, so they are known before any gradient.
  """
  layers = {name: {k: n for k, (_, n) in s["losses"].items()} for name, s in sums["layers"].items()}
  return jax.lax.stop_gradient({"loss": sums["loss"][1], "layers": layers})


def total(sums: Any, over: Any, loss_weights: dict[str, dict[str, float]], layer_losses: str) -> Pair:
  """(objective, its auxiliary part): the task's loss / count + layers' sum_j weight_j * sum_j / count_j.

  `over` holds the counts of the *whole* batch: summed over its micro-batches, the objectives and the
  gradients of `sums` are then those of one batch.
  """
  ratio = lambda s, n: s / jnp.maximum(n, 1.0)
  layers = [sum(weight * ratio(sums["layers"][layer]["losses"][loss][0], over["layers"][layer][loss])
                for loss, weight in weights.items()) for layer, weights in loss_weights.items()]
  aux = LAYER_LOSSES[layer_losses](layers) if layers else jnp.zeros(())
  return ratio(sums["loss"][0], over["loss"]) + aux, aux


def loss_weights(model: Model) -> dict[str, dict[str, float]]:
  """{layer: {loss: weight}} of the losses that count."""
  return {name: {loss: weight for loss, weight in layer.loss_weights.items() if weight}
          for name, layer in model.sparse_layers.items()}
