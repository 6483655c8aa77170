"""Examples that only knowledge of their cluster can classify: signals and centres hidden among four patches.

Letters: N examples, L = 4 patches of an example, W = 50 numbers of a patch, D = L·W, S = 4 clusters.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

L, W, S = 4, 50, 4
D = L * W


@dataclasses.dataclass(frozen=True)
class Setting:
  """Ranges of the uniform factors, deviation of the random patch, and the seed the data are drawn from."""

  alpha: tuple[float, float]  # of the feature, the signal of the example's cluster
  beta: tuple[float, float]  # of the centre, which tells the cluster
  gamma: tuple[float, float]  # of the feature noise, the signal of another cluster
  sigma: float
  seed: int


SETTINGS = {
    1: Setting((0.5, 2), (1, 2), (0.5, 3), 1, 12),
    2: Setting((0.5, 2), (1, 2), (0.5, 3), 2, 11),
    3: Setting((0.5, 2), (1, 2), (0.5, 2), 1, 11),
    4: Setting((0.5, 2), (1, 2), (0.5, 2), 2, 11),
}


class Examples(NamedTuple):
  x_ND: Array
  label_N: Array  # int32, 0 or 1
  cluster_N: Array  # int32, which no model sees


def directions(key: Array) -> tuple[Array, Array]:
  """(signal_SW, centre_SW): 2·S orthonormal vectors."""
  q, r = jnp.linalg.qr(jax.random.normal(key, (W, 2 * S)))
  vector = (q * jnp.sign(jnp.diagonal(r))[None]).T  # with these signs QR is what Gram-Schmidt makes
  return vector[:S], vector[S:]


def draw(key: Array, setting: Setting, signal_SW: Array, centre_SW: Array, n: int):
  """(patch_NLW in the order feature, centre, feature noise, random; sign_N in {-1, 1}; cluster_N).

  Chen et al. 2022, definition of the data; ranges from the authors' notebooks.
  """
  keys = iter(jax.random.split(key, 8))
  sign = lambda: jax.random.rademacher(next(keys), (n,), jnp.float32)
  factor = lambda between: jax.random.uniform(next(keys), (n, 1), minval=between[0], maxval=between[1])
  sign_N, noise_sign_N = sign(), sign()
  cluster_N = jax.random.randint(next(keys), (n,), 0, S)
  other_N = (cluster_N + jax.random.randint(next(keys), (n,), 1, S)) % S
  patches = (
      sign_N[:, None] * factor(setting.alpha) * signal_SW[cluster_N],
      factor(setting.beta) * centre_SW[cluster_N],
      noise_sign_N[:, None] * factor(setting.gamma) * signal_SW[other_N],
      setting.sigma / W**0.5 * jax.random.normal(next(keys), (n, W)),
  )
  return jnp.stack(patches, 1), sign_N, cluster_N


def examples(setting: Setting, n: int) -> tuple[Examples, Examples]:
  """n examples to train on and n to test on, of the same signals and centres."""
  direction_key, draw_key, order_key = jax.random.split(jax.random.key(setting.seed), 3)
  patch_NLW, sign_N, cluster_N = draw(draw_key, setting, *directions(direction_key), 2 * n)
  order_NL = jnp.argsort(jax.random.uniform(order_key, (2 * n, L)), axis=1)
  x_ND = 10 * jnp.take_along_axis(patch_NLW, order_NL[..., None], axis=1).reshape(2 * n, D)
  everything = Examples(x_ND, (sign_N > 0).astype(jnp.int32), cluster_N)
  return Examples(*(a[:n] for a in everything)), Examples(*(a[n:] for a in everything))
