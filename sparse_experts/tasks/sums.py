"""Losses of tokens, images and pairs, as sums and counts that add up over micro-batches and devices.

Everything here that is summed is a pair (sum, count), divided once: a mean of means would change with the
mesh, with accumulation and with padding.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from sparse_experts.moe.routing import Pair, as_pair, losses

over = losses.over_tokens  # (values, mask) -> (sum where the mask is true, how many those are)


@jax.named_scope("loss")
def cross_entropy(logits_BLV: Array, targets_BL: Array) -> Array:
  """Nats of each target, in float32."""
  return optax.softmax_cross_entropy_with_integer_labels(logits_BLV.astype(jnp.float32), targets_BL)


@jax.named_scope("loss")
def soft_cross_entropy(logits_BLV: Array, teacher_BLV: Array) -> Array:
  """-Σ_v p(v) log q(v) of each target, p the teacher's softmax, without gradient, and q the logits' own."""
  prob_BLV = jax.lax.stop_gradient(jax.nn.softmax(teacher_BLV.astype(jnp.float32)))
  return -(prob_BLV * jax.nn.log_softmax(logits_BLV.astype(jnp.float32))).sum(-1)


@jax.named_scope("loss")
def softmax(logits_BV: Array, target_BM: Array, share_BM: Array) -> Array:
  """Nats of each image, whose classes M have a share each: minus the mean of log p(class), by shares."""
  log_prob_BV = jax.nn.log_softmax(logits_BV.astype(jnp.float32))
  return -(share_BM * jnp.take_along_axis(log_prob_BV, target_BM, axis=1)).sum(-1)


@jax.named_scope("loss")
def sigmoid(logits_BV: Array, target_BM: Array, share_BM: Array) -> Array:
  """Nats of each image: of every class by itself, is it there or not, summed over classes."""
  logits_BV = logits_BV.astype(jnp.float32)
  return jax.nn.softplus(logits_BV).sum(-1) - (
      share_BM * jnp.take_along_axis(logits_BV, target_BM, axis=1)).sum(-1)


CLASS_LOSSES = {"softmax": softmax, "sigmoid": sigmoid}  # by data.objective


@jax.named_scope("loss")
def contrastive(logits_BC: Array, real_B: Array) -> Array:
  """Nats of each pair, the mean of -log p(its text | image) and -log p(its image | text).

  `logits_BC`: of image B with text C, a pair being on the diagonal; rows that are not `real_B` are no
  candidates, and their own figure means nothing. Radford et al. 2021 (CLIP), figure 3.
  """
  own = lambda logits_BC: jnp.diagonal(jax.nn.log_softmax(jnp.where(real_B[None], logits_BC, -jnp.inf)))
  return -0.5 * (own(logits_BC) + own(logits_BC.T))


def own_is_best(logits_BC: Array, real_B: Array) -> Pair:
  """(real rows whose own candidate, on the diagonal, is the likeliest of the real ones; real rows)."""
  best_B = jnp.where(real_B[None], logits_BC, -jnp.inf).argmax(-1)
  return over((best_B == jnp.arange(len(best_B))).astype(jnp.float32), real_B)


def forecast(prob_V: Array, target: Array) -> tuple[Array, Array, Array]:
  """(probability of the likeliest value, whether it is the target, Brier score) over the last axis.

  Brier score: Σ_v (p_v - [v is the target])² over all values (Brier 1950), 0 to 2 where p adds up to 1.
  """
  of_target = jnp.take_along_axis(prob_V, target[..., None], axis=-1)[..., 0]
  return prob_V.max(-1), prob_V.argmax(-1) == target, (prob_V**2).sum(-1) - 2 * of_target + 1


def largest(target_BM: Array, share_BM: Array) -> Array:
  """The class of each image; of one with several that with the largest share."""
  return jnp.take_along_axis(target_BM, share_BM.argmax(-1)[:, None], axis=1)[:, 0]


def layer_sums(routings: dict[str, Any], rewards: Callable[[str, Any], dict[str, Pair]] = lambda *_: {},
               ) -> dict[str, Any]:
  """{layer: {"losses": of a `Routing`, "metrics": pairs, "stats": sums}} of {sparse layer: its routing}.

  rewards: (layer, routing) -> the losses that the choices of a router which learns from rewards have earned.
  """
  return {name: {"losses": r.losses | rewards(name, r), "metrics": r.metrics, "stats": r.stats}
          for name, r in routings.items()}


def flat(layers: dict[str, Any]) -> dict[str, Pair]:
  """{"router/<layer>/<name>": pair} of the losses and metrics in `layer_sums`."""
  return {f"router/{layer}/{name}": as_pair(pair) for layer, sums in layers.items()
          for part in ("losses", "metrics") for name, pair in sums[part].items()}


def row_rewards(routing: Any, loss_B: Array, mask_BL: Array) -> dict[str, Pair]:
  """`moe.losses.reward`'s, for a router that learns from rewards: a token's is minus its row's loss."""
  if routing.log_prob is None:
    return {}
  reward_BL, mask_BL = (jnp.broadcast_to(a, routing.log_prob.shape) for a in (-loss_B[:, None], mask_BL))
  return losses.reward(routing.log_prob, routing.value, reward_BL, mask_BL)


def token_rewards(layer: str, routing: Any, ce_BL: Array, batch: dict[str, Array]) -> dict[str, Pair]:
  """`moe.losses.reward`'s, for a router that learns from rewards: a token's is minus the loss that followed.

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
