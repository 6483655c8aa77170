"""sigma-MoE: the losses and outputs of the authors' code, selection dropout, the first weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_experts.errors import UserError
from sparse_experts.moe import make_router
from sparse_experts.moe.routing import as_pair
from tests.moe.golden_2026 import DOWN_EFD, GATE_EFD, LOGIT_GTE, MASK_GT, PRINTED, TOP_2, sets, taken


def router(E=4, d=4, **fields):
  return make_router("sigma_moe", d, E, rngs=nnx.Rngs(0), **fields)


def route(logit_GTE=LOGIT_GTE, mask_GT=MASK_GT, key=None, **fields):
  return jax.jit(router(**fields).route)(logit_GTE, mask_GT, key)


def loss(logit_GTE, **fields):
  routing = route(logit_GTE, jnp.ones(logit_GTE.shape[:2], bool), **fields)
  return as_pair(routing.losses["negative_entropy"])[0]


def test_golden_loss_and_its_gradient():
  np.testing.assert_allclose(loss(LOGIT_GTE), -1.332101, atol=PRINTED)
  slope_GTE = jax.grad(loss)(LOGIT_GTE)
  np.testing.assert_allclose(slope_GTE[0, 0], [0.015905, -0.005996, -0.002649, -0.007260], atol=PRINTED)


def test_golden_two_uses_share_one_mean():
  """Sums of two parts of a batch, or of two layers that are pooled, are one P; the mean of two is another."""
  first, second = (route(logit_GTE).losses["negative_entropy"] for logit_GTE in (
      LOGIT_GTE, LOGIT_GTE[..., ::-1]))
  np.testing.assert_allclose(jax.tree.map(jnp.add, first, second).pair()[0], -1.373303, atol=PRINTED)
  both = jnp.concatenate([LOGIT_GTE, LOGIT_GTE[..., ::-1]])
  np.testing.assert_allclose(loss(both), -1.373303, atol=PRINTED)
  np.testing.assert_allclose(loss(both, scope="group") / 2, -1.332101, atol=PRINTED)


def test_golden_output():
  routing = route()
  assert sets(routing) == TOP_2
  gate_TE, _ = taken(routing)
  np.testing.assert_allclose(gate_TE[0, :2], 1 / (1 + np.exp([-2.0, -0.5])), rtol=1e-6)
  x_TD = np.asarray(LOGIT_GTE[0], np.float64)
  hidden_ETF = np.maximum(np.einsum("td,efd->etf", x_TD, GATE_EFD[:4]), 0)
  y_TD = np.einsum("te,etf,efd->td", gate_TE, hidden_ETF, DOWN_EFD[:4])
  np.testing.assert_allclose(y_TD[0], [0, 1.618394, -2.427591, -0.809197], atol=PRINTED)
  np.testing.assert_array_equal(y_TD[3], 0)


def test_dropout_of_the_selection_is_of_training_only():
  """Half of the experts cannot be chosen; who stays is chosen by score, and none twice."""
  logit_GTE = jnp.broadcast_to(LOGIT_GTE, (100, 8, 4))
  mask_GT = jnp.ones((100, 8), bool)
  dropped = route(logit_GTE, mask_GT, jax.random.key(0), selection_dropout=0.5)
  np.testing.assert_array_equal(route(logit_GTE, mask_GT, selection_dropout=0.5).valid, True)
  # Binomial(4, 1/2), at most 2: (4 * 1 + 11 * 2) / 16; five deviations of 800 tokens are below 0.12.
  np.testing.assert_allclose(dropped.metrics["experts_per_token"][0] / 800, 26 / 16, atol=0.12)
  for group in range(0, 100, 25):
    pairs = list(zip(*(np.asarray(a[group])[np.asarray(dropped.valid[group])].tolist()
                       for a in (dropped.token, dropped.expert)), strict=True))
    assert len(set(pairs)) == len(pairs)


def test_large_logits_are_still_told_apart():
  logit_GTE = jnp.array([[[30.0, 40.0, 50.0, 60.0]]])
  assert route(logit_GTE, MASK_GT[:, :1]).expert.tolist() == [[3, 2]]


def test_columns_start_with_one_norm_and_the_matrix_with_its_deviation():
  w_DE = np.asarray(router(E=16, d=64, init_scale=0.5).w[...])
  norm_E = np.linalg.norm(w_DE, axis=0)
  np.testing.assert_allclose(norm_E, norm_E[0], rtol=1e-5)
  np.testing.assert_allclose(w_DE.std(), 0.5 / 8, rtol=0.1)  # of 1,024 draws: 4.5 deviations


@pytest.mark.parametrize("fields, message", [
    (dict(k=5), "router.k=5 is not between 1 and num_experts=4"),
    (dict(selection_dropout=1.0), "router.selection_dropout=1.0 is out of range; choose from 0 to below 1"),
    (dict(init_scale=0.0), "router.init_scale=0.0 is out of range; choose a number above 0"),
    (dict(scope="token"), "router.scope='token' is unknown"),
])
def test_mistakes_are_named(fields, message):
  with pytest.raises(UserError, match=message):
    router(**fields)
