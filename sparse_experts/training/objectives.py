"""What is minimised and what is measured, as sums and counts that add up over micro-batches and devices.

Everything here is a pair (sum, count), divided once: a mean of means would change with the mesh, with
accumulation and with padding.
"""

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from sparse_experts.moe.routing import losses
from sparse_experts.training import classification, contrastive

Pair = tuple[Array, Array]
LAYER_LOSSES = {"mean": lambda losses: sum(losses) / len(losses), "sum": sum}


@jax.named_scope("loss")
def cross_entropy(logits_BLV: Array, targets_BL: Array) -> Array:
  """Nats of each target, in float32."""
  return optax.softmax_cross_entropy_with_integer_labels(logits_BLV.astype(jnp.float32), targets_BL)


def _masked_sum(x_BL: Array, mask_BL: Array) -> Array:
  return jnp.sum(jnp.where(mask_BL, x_BL, 0.0))  # where, not a product: padding may hold NaN


def _of_images(batch: dict[str, Array]) -> ModuleType | None:
  """What is minimised and measured of images, None for text alone."""
  if "images" not in batch:
    return None
  return contrastive if "texts" in batch else classification


def train_sums(model: Any, params: Any, buffers: Any, batch: dict[str, Array], key: Array | None = None):
  """{"loss": cross-entropy pair, "layers": {layer: {"losses": pairs, "metrics": pairs, "stats": sums}}}."""
  if (of := _of_images(batch)) is not None:
    return of.train_sums(model, params, buffers, batch, key)
  logits_BLV, routings = model.apply(params, buffers, batch, key=key)
  weight_BL = batch["weights"]
  ce_BL = cross_entropy(logits_BLV, batch["targets"]) * weight_BL
  layers = {name: {"losses": r.losses | reward_losses(name, r, ce_BL, batch), "metrics": r.metrics,
                   "stats": r.stats} for name, r in routings.items()}
  return {"loss": (_masked_sum(ce_BL, weight_BL > 0), jnp.sum(weight_BL)), "layers": layers}


def reward_losses(layer: str, routing: Any, ce_BL: Array, batch: dict[str, Array]) -> dict[str, Pair]:
  """`moe.losses.reward`'s, for a router that learns from rewards: minus the loss that followed its choice.

  In a decoder that is the token's own. An encoder's token has none: its reward is the mean over the targets
  of its sequence, and where there are no targets it is left out.
  """
  if routing.log_prob is None:
    return {}
  real_BL = batch["weights"] > 0
  if layer.startswith("encoder"):
    same_BSL = (batch["encoder_segments"][:, :, None] == batch["segments"][:, None, :]) & real_BL[:, None, :]
    number_BS = same_BSL.sum(-1, dtype=jnp.float32)
    mean_BS = jnp.where(same_BSL, ce_BL[:, None, :], 0.0).sum(-1) / jnp.maximum(number_BS, 1.0)
    return losses.reward(routing.log_prob, routing.value, -mean_BS, number_BS > 0)
  return losses.reward(routing.log_prob, routing.value, -ce_BL, real_BL)


def counts(sums: Any) -> Any:
  """The denominators of the objective: {"loss": count, "layers": {layer: {loss: count}}}.

  They depend on the batch's masks only, never on parameters, so they are known before any gradient.
  """
  layers = {name: {k: n for k, (_, n) in s["losses"].items()} for name, s in sums["layers"].items()}
  return jax.lax.stop_gradient({"loss": sums["loss"][1], "layers": layers})


def total(sums: Any, over: Any, loss_weights: dict[str, dict[str, float]], layer_losses: str) -> Pair:
  """(objective, its auxiliary part): cross-entropy / count + layers' sum_j weight_j * sum_j / count_j.

  `over` holds the counts of the *whole* batch: summed over its micro-batches, the objectives and the
  gradients of `sums` are then those of one batch.
  """
  ratio = lambda s, n: s / jnp.maximum(n, 1.0)
  aux = [
      sum(weight * ratio(sums["layers"][layer]["losses"][loss][0], over["layers"][layer][loss])
          for loss, weight in weights.items())
      for layer, weights in loss_weights.items()]
  aux = LAYER_LOSSES[layer_losses](aux) if aux else jnp.zeros(())
  return ratio(sums["loss"][0], over["loss"]) + aux, aux


def loss_weights(model: Any) -> dict[str, dict[str, float]]:
  """{layer: {loss: weight}} of the losses that count."""
  weights = {name: dict(info.loss_weights) for name, info in model.sparse_layers.items()}
  return {name: {k: w for k, w in ws.items() if w} for name, ws in weights.items()}


def eval_sums(model: Any, params: Any, buffers: Any, batch: dict[str, Array]) -> dict[str, Pair]:
  """Flat pairs of one batch without noise; see `evaluate.report` for the figures made of them.

  `text`: cross-entropy over targets that stand for bytes, per target; `bytes`: the same sum, per byte;
  `marks`: over sentinels and ends of documents; `loss`: over everything that is trained on. Of images see
  `classification.eval_sums`, of images with texts `contrastive.eval_sums`.
  """
  if (of := _of_images(batch)) is not None:
    pairs, routings = of.eval_sums(model, params, buffers, batch)
    return pairs | flat_routings(routings)
  logits_BLV, routings = model.apply(params, buffers, batch)
  ce_BL = cross_entropy(logits_BLV, batch["targets"])
  weight_BL, bytes_BL = batch["weights"], batch["target_bytes"]
  trained_BL = weight_BL > 0
  text_BL, mark_BL = trained_BL & (bytes_BL > 0), trained_BL & (bytes_BL == 0)
  count = lambda mask_BL: jnp.sum(mask_BL.astype(jnp.float32))
  text = _masked_sum(ce_BL, text_BL)
  pairs = {
      "loss": (_masked_sum(ce_BL * weight_BL, trained_BL), jnp.sum(weight_BL)),
      "text": (text, count(text_BL)),
      "bytes": (text, _masked_sum(bytes_BL.astype(jnp.float32), text_BL)),
      "marks": (_masked_sum(ce_BL, mark_BL), count(mark_BL)),
  }
  return pairs | flat_routings(routings)


def flat_routings(routings: dict[str, Any]) -> dict[str, Pair]:
  return flat_layers({n: {"losses": r.losses, "metrics": r.metrics} for n, r in routings.items()})


def flat_layers(layers: dict[str, Any]) -> dict[str, Pair]:
  """{layer: {"losses": .., "metrics": ..}} -> {"router/<layer>/<name>": pair}."""
  return {f"router/{layer}/{name}": pair
          for layer, s in layers.items() for part in ("losses", "metrics") for name, pair in s[part].items()}
