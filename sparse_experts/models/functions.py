"""Functions of arrays that all models are made of: initial weights, products, norms, dropout."""

import math

import jax
import jax.numpy as jnp


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
  """Zeroes entries with probability `rate` and scales the rest; no key, no dropout."""
  if key is None or rate == 0.0:
    return x
  keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
  return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def normal(key: jax.Array, shape: tuple[int, ...], variance: float) -> jax.Array:
  return jax.random.normal(key, shape, jnp.float32) * math.sqrt(variance)


def initial(init: str, key: jax.Array, shape: tuple[int, ...], variance: float, inputs: int = 1) -> jax.Array:
  """A weight whose first `inputs` axes are summed over: `normal` of that variance, or `xavier`'s uniform."""
  if init == "normal":
    return normal(key, shape, variance)
  axes = tuple(range(len(shape)))
  return {"xavier": jax.nn.initializers.xavier_uniform}[init](axes[:inputs], axes[inputs:])(key, shape)


def matmul(x_BLD: jax.Array, w_DF: jax.Array) -> jax.Array:
  """x w over rows of all of B and L, w cast to x's dtype.

  One matrix, not a stack of B: XLA:CPU is 3 times slower at the gradient of the latter.
  """
  B, L, D = x_BLD.shape
  return (x_BLD.reshape(B * L, D) @ w_DF.astype(x_BLD.dtype)).reshape(B, L, -1)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
  """x / sqrt(mean of x^2 over the axes of `scale`, the last ones, + eps) * scale, in float32."""
  y = x.astype(jnp.float32)
  y *= jax.lax.rsqrt(jnp.mean(y * y, axis=tuple(range(-scale.ndim, 0)), keepdims=True) + eps)
  return (y * scale.reshape((1,) * (x.ndim - scale.ndim) + scale.shape)).astype(x.dtype)
