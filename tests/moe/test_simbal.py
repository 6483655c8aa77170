"""SimBal: its loss and gradient by hand, an orthonormal start, and that it reads no tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_experts.errors import UserError
from sparse_experts.moe import Tokens, make_router
from sparse_experts.moe.routers.simbal import orthogonality
from tests.moe.golden_2026 import LOGIT_GTE, MASK_GT, TOP_2, sets

W_DE = jnp.array([[1.0, 0.5], [0.0, 1.0], [0.5, 0.0]])


def router(d=4, E=4, **fields):
  return make_router("simbal", d, E, rngs=nnx.Rngs(0), **fields)


def test_golden_loss_and_gradient():
  value, slope_DE = jax.value_and_grad(orthogonality)(W_DE)
  np.testing.assert_allclose(value, 1.5, rtol=1e-6)
  np.testing.assert_allclose(slope_DE, [[3, 3], [2, 2], [1, 1]], rtol=1e-6)


def test_it_starts_orthonormal():
  assert orthogonality(router(d=16, E=8).w[...]) < 1e-4  # 64 sums of 16 float32 products
  assert router(d=4, E=8).w[...].shape == (4, 8)  # rows instead


def test_the_loss_is_of_the_weights_alone():
  """Two groups, and one of padding: sum over count is the figure; no load-balancing loss is left."""
  given = router(d=4, E=2)
  given.w[...] = jnp.concatenate([W_DE, jnp.zeros((1, 2))])
  x_GTD, mask_GT = jnp.concatenate([LOGIT_GTE] * 3), jnp.arange(3)[:, None] < jnp.full((1, 8), 2)
  routing = given(x_GTD, Tokens(mask=mask_GT), None)
  np.testing.assert_allclose(routing.losses["orthogonality"], (3.0, 2.0), rtol=1e-6)
  assert set(routing.losses) == set(given.loss_weights) == {"orthogonality", "z"}


def test_the_choice_is_top_k():
  given = router()
  given.w[...] = jnp.eye(4)
  assert sets(given(LOGIT_GTE, Tokens(mask=MASK_GT), None)) == TOP_2


@pytest.mark.parametrize("fields, message", [
    (dict(k=5), "router.k=5 is not between 1 and num_experts=4"),
    (dict(gate="renormalized_after_drops"), "router.gate='renormalized_after_drops' is unknown"),
])
def test_mistakes_are_named(fields, message):
  with pytest.raises(UserError, match=message):
    router(**fields)
