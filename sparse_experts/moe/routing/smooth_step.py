"""What DSelect-k and COMET share: a step with flat ends, initial weights, the entropy of selections."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sparse_experts.moe.routing import Pair, losses


def smooth_step(t: Array, gamma: float) -> Array:
  """0 up to -gamma/2, 1 from gamma/2 on, between them 1/2 + 3t/(2 gamma) - 2t³/gamma³; float32 like t.

  Outside, the value is exactly constant and the slope exactly 0, so a product with it can be exactly 0 and
  has no gradient there. Hazimeh et al. 2020 (the tree ensemble layer), 2021 (DSelect-k).
  """
  # The polynomial as u² (3 - 2u): unlike the terms above, it stays within [0, 1] in float32. t is clipped:
  # the slope at a large t would be NaN, also behind `where`.
  u = jnp.clip(t / gamma + 0.5, 0.0, 1.0)
  return jnp.where(t <= -gamma / 2, 0.0, jnp.where(t >= gamma / 2, 1.0, u * u * (3 - 2 * u)))


def uniform(rngs: nnx.Rngs, bound: float, *shape: int) -> nnx.Param:
  """Weights [D, ...], or biases, that start in U(-bound, bound)."""
  drawn = jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)
  return nnx.Param(drawn, axes=("embed", "router")[-len(shape):])


def selection_entropy(prob_GTKE: Array, mask_GT: Array) -> Pair:
  """Mean over tokens of Σ_k Σ_e -p log(p + 1e-6), at most K log E; -1e-6 K when all K selections are hard.

  prob_GTKE: probability of expert e in selection k (DSelect-k's selectors, COMET's trees).
  """
  entropy_GT = -(prob_GTKE * jnp.log(prob_GTKE + 1e-6)).sum((-2, -1))
  return losses.over_tokens(entropy_GT, mask_GT)
