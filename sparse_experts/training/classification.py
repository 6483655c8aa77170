"""Loss and measures of images: each target class has a share of its image, all of it without mixup.

Pairs (sum, count) over images, as `objectives` has them over tokens.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sparse_experts.moe.routing import losses


def softmax(logits_BV: Array, target_BM: Array, share_BM: Array) -> Array:
  """Nats of each image: minus the mean of log p(target), by shares."""
  log_prob_BV = jax.nn.log_softmax(logits_BV)
  return -(share_BM * jnp.take_along_axis(log_prob_BV, target_BM, axis=1)).sum(-1)


def sigmoid(logits_BV: Array, target_BM: Array, share_BM: Array) -> Array:
  """Nats of each image: of every class by itself, is it there or not, summed over classes."""
  return jax.nn.softplus(logits_BV).sum(-1) - (
      share_BM * jnp.take_along_axis(logits_BV, target_BM, axis=1)).sum(-1)


LOSSES = {"softmax": softmax, "sigmoid": sigmoid}


@jax.named_scope("loss")
def image_losses(objective: str, logits_BV: Array, batch: dict[str, Array]) -> Array:
  return LOSSES[objective](logits_BV.astype(jnp.float32), batch["targets"], batch["shares"])


def train_sums(model: Any, params: Any, buffers: Any, batch: dict[str, Array], key: Array | None = None):
  """As `objectives.train_sums`. A router that learns from rewards gets its image's for every token."""
  logits_BV, routings = model.apply(params, buffers, batch, key=key)
  real_B = batch["weights"] > 0
  loss_B = image_losses(model.objective, logits_BV, batch)
  layers = {name: layer_sums(r, loss_B, real_B[:, None]) for name, r in routings.items()}
  return {"loss": over(loss_B, real_B), "layers": layers}


def layer_sums(routing: Any, loss_B: Array, mask_BL: Array) -> dict[str, Any]:
  """Losses, metrics and stats of a layer. A reward, of each token of the mask, is minus its row's loss."""
  rewards = {}
  if routing.log_prob is not None:
    reward_BL, mask_BL = (jnp.broadcast_to(a, routing.log_prob.shape) for a in (-loss_B[:, None], mask_BL))
    rewards = losses.reward(routing.log_prob, routing.value, reward_BL, mask_BL)
  return {"losses": routing.losses | rewards, "metrics": routing.metrics, "stats": routing.stats}


def eval_sums(model: Any, params: Any, buffers: Any, batch: dict[str, Array]) -> tuple[dict[str, Any], Any]:
  """(`loss`: over images, `accuracy`: those whose largest logit is their class's; routings)."""
  logits_BV, routings = model.apply(params, buffers, batch)
  real_B = batch["weights"] > 0
  loss_B = image_losses(model.objective, logits_BV, batch)
  target_B = jnp.take_along_axis(batch["targets"], batch["shares"].argmax(-1)[:, None], axis=1)[:, 0]
  return {"loss": over(loss_B, real_B), "image_loss": over(loss_B, real_B),
          "accuracy": over((logits_BV.argmax(-1) == target_B).astype(jnp.float32), real_B)}, routings


def over(x_B: Array, real_B: Array) -> tuple[Array, Array]:
  """(sum over real rows, their number)."""
  return jnp.where(real_B, x_B, 0.0).sum(), real_B.sum(dtype=jnp.float32)
