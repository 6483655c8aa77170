"""Noise of a router's input while training."""

import jax
import jax.numpy as jnp
from jax import Array


def jitter(x_GTD: Array, amount: float, key: Array) -> Array:
  """x · U(1 - amount, 1 + amount) in float32."""
  return x_GTD.astype(jnp.float32) * _once(
      jax.random.uniform(key, x_GTD.shape, minval=1 - amount, maxval=1 + amount))


def dropout(x_GTD: Array, rate: float, key: Array) -> Array:
  """x / (1 - rate) in float32, or 0 with probability `rate`."""
  stays_GTD = _once(jax.random.bernoulli(key, 1 - rate, x_GTD.shape))
  return jnp.where(stays_GTD, x_GTD.astype(jnp.float32) / (1 - rate), 0.0)


def _once(drawn_GTD: Array) -> Array:
  """The same numbers, in memory; without it a TPU's compiler draws again in each product that reads the noisy
  input: the scores and both of their gradients."""
  return jax.lax.optimization_barrier(drawn_GTD)
