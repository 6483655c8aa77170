"""Noise of a router's input has the values that its formula draws."""

import jax
import jax.numpy as jnp
import numpy as np

from sparse_experts.moe.routing import noise

KEY = jax.random.key(3)
X_GTD = jax.random.normal(jax.random.key(4), (2, 16, 8), jnp.bfloat16)


def test_jitter_to_the_bit():
  """Value and gradient, of the noise that one draw of x's shape gives."""
  drawn_GTD = jax.random.uniform(KEY, X_GTD.shape, minval=0.9, maxval=1.1)
  found, pull = jax.vjp(jax.jit(lambda x: noise.jitter(x, 0.1, KEY)), X_GTD)
  np.testing.assert_array_equal(found, X_GTD.astype(jnp.float32) * drawn_GTD)
  np.testing.assert_array_equal(pull(jnp.ones_like(found))[0], drawn_GTD.astype(jnp.bfloat16))
  assert found.dtype == jnp.float32 and 0.9 <= drawn_GTD.min() < drawn_GTD.max() < 1.1


def test_dropout_keeps_the_mean_of_what_stays():
  found = jax.jit(lambda x: noise.dropout(x, 0.25, KEY))(jnp.ones((4, 64, 64)))
  assert set(np.unique(found).tolist()) == {0.0, np.float32(1 / 0.75).item()}
  np.testing.assert_allclose((found == 0).mean(), 0.25, atol=0.01)  # 3 deviations of 16,384 draws
