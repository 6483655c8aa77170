"""Loss and measures of pairs: each image is told its text among all of the batch, and each text its image.

Pairs (sum, count) over pairs, as `objectives` has them over tokens; so a batch is never cut up.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sparse_experts.training import classification


@jax.named_scope("loss")
def pair_losses(logits_BC: Array, real_B: Array) -> Array:
  """Nats of each pair, the mean of -log p(its text | image) and -log p(its image | text).

  `logits_BC`: of image B with text C, a pair being on the diagonal; rows that are not `real_B` are no
  candidates, and their own figure means nothing. Radford et al. 2021 (CLIP), figure 3.
  """
  own = lambda logits_BC: jnp.diagonal(jax.nn.log_softmax(jnp.where(real_B[None], logits_BC, -jnp.inf)))
  return -0.5 * (own(logits_BC) + own(logits_BC.T))


def train_sums(model: Any, params: Any, buffers: Any, batch: dict[str, Array], key: Array | None = None):
  """As `objectives.train_sums`. A router that learns from rewards gets its pair's for every token."""
  logits_BC, routings = model.apply(params, buffers, batch, key=key)
  real_B = batch["weights"] > 0
  loss_B = pair_losses(logits_BC, real_B)
  mask_BL = model.mask(batch)
  layers = {name: classification.layer_sums(r, loss_B, mask_BL) for name, r in routings.items()}
  return {"loss": classification.over(loss_B, real_B), "layers": layers}


def eval_sums(model: Any, params: Any, buffers: Any, batch: dict[str, Array]) -> tuple[dict[str, Any], Any]:
  """(`loss`, and shares of pairs whose own is the likeliest of the batch, in both directions; routings)."""
  logits_BC, routings = model.apply(params, buffers, batch)
  real_B = batch["weights"] > 0
  loss = classification.over(pair_losses(logits_BC, real_B), real_B)

  def found(logits_BC: Array) -> tuple[Array, Array]:
    best_B = jnp.where(real_B[None], logits_BC, -jnp.inf).argmax(-1)
    return classification.over((best_B == jnp.arange(len(best_B))).astype(jnp.float32), real_B)

  return {"loss": loss, "pair_loss": loss, "image_to_text": found(logits_BC),
          "text_to_image": found(logits_BC.T)}, routings
