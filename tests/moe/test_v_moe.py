"""Riquelme et al. 2021: the golden toy, what is of the noisy and what of the clean softmax, the order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_experts.errors import UserError
from sparse_experts.moe import Tokens, make_router
from sparse_experts.moe.routing import losses
from tests.moe.test_routers import LOGIT_GTE, MASK_GT, PRINTED, kept

ZERO = jnp.zeros_like(LOGIT_GTE)


def router(E=3, d=3, **fields):
  return make_router("v_moe", d, E, rngs=nnx.Rngs(0), **fields)


def route(noise_GTE=None, logit_GTE=LOGIT_GTE, mask_GT=MASK_GT, **fields):
  return jax.jit(router(**fields).route)(logit_GTE, mask_GT, noise_GTE)


def test_golden_losses_with_a_draw_of_zero():
  routing = route(ZERO)
  np.testing.assert_allclose(routing.losses["importance"], (0.195091, 1), atol=PRINTED)
  np.testing.assert_allclose(routing.losses["load_loss"], (0.236796, 1), atol=PRINTED)
  second_GT1 = jnp.sort(LOGIT_GTE, axis=-1)[..., 1:2]
  load_E = losses.chance(LOGIT_GTE, second_GT1, 1 / 3).mean((0, 1))
  np.testing.assert_allclose(load_E, [0.822037, 0.405982, 0.253427], atol=PRINTED)


def test_its_gshard_loss_is_of_the_noisy_choices_and_probabilities():
  """Without noise Switch's golden value; a draw that moves token 1 from expert 2 to 1."""
  np.testing.assert_allclose(route(ZERO).losses["load_balance"], (1.310886, 1), atol=PRINTED)
  noise_GTE = ZERO.at[0, 1, 1].set(2.5)
  prob_TE = np.exp(LOGIT_GTE + noise_GTE)[0] / np.exp(LOGIT_GTE + noise_GTE)[0].sum(-1, keepdims=True)
  expected = 3 * (np.array([4, 2, 0]) / 6 * prob_TE.mean(0)).sum()
  np.testing.assert_allclose(route(noise_GTE).losses["load_balance"], (expected, 1), rtol=1e-5)
  assert router(load_balance_weight=0.02).loss_weights["load_balance"] == 0.02


def test_padding_enters_no_loss():
  pad = lambda a, value: jnp.pad(a, ((0, 1), (0, 2)) + ((0, 0),) * (a.ndim - 2), constant_values=value)
  routing = route(pad(ZERO, 0.0), pad(LOGIT_GTE, 7.0), pad(MASK_GT, False))
  np.testing.assert_allclose(routing.losses["importance"], (0.195091, 1), atol=PRINTED)
  np.testing.assert_allclose(routing.losses["load_loss"], (0.236796, 1), atol=PRINTED)


def test_gates_are_the_noisy_probabilities_and_importance_the_clean_ones():
  """Token 1, from probabilities .245 .090 .665: not renormalised; noise lifts expert 1 to the top."""
  plain, noisy = route(), route(ZERO.at[0, 1, 1].set(2.5))
  np.testing.assert_allclose(plain.gate[0, [1, 7]], [0.665241, 0.244728], atol=PRINTED)
  assert noisy.expert[0, [1, 7]].tolist() == [1, 2]
  prob_E = np.exp([1.0, 2.5, 2.0]) / np.exp([1.0, 2.5, 2.0]).sum()
  np.testing.assert_allclose(noisy.gate[0, [1, 7]], prob_E[[1, 2]], rtol=1e-5)
  np.testing.assert_array_equal(noisy.losses["importance"][0], plain.losses["importance"][0])


def test_without_noise_load_is_a_count():
  """First and second choices: 6, 4 and 2 of 12; the mean is 4, the variance 8/3."""
  np.testing.assert_allclose(route().losses["load_loss"][0], 1 / 6, rtol=1e-5)


def test_noise_has_deviation_one_over_experts():
  E = 8
  given = router(E, noise=2.0)
  call = jax.jit(lambda key: given(jnp.ones((1, 2000, 3)), Tokens(mask=jnp.ones((1, 2000), bool)), None, key))
  logit_TE = [np.log(call(key).prob[0]) for key in (None, jax.random.key(0))]
  noise_TE = (logit_TE[1] - logit_TE[0])[:, 1:] - (logit_TE[1] - logit_TE[0])[:, :1]
  np.testing.assert_allclose(noise_TE.std(), 2**0.5 * 2 / E, rtol=0.05)  # 4 deviations of less than 0.011


def test_batch_priority_is_the_golden_order():
  routing = route(order="batch_priority")
  assert routing.token[0, :4].tolist() == [5, 0, 2, 1]
  assert sorted(kept(routing, 2)) == sorted(
      [(5, 0, 0), (0, 0, 0), (1, 0, 2), (4, 0, 1), (5, 1, 2), (0, 1, 1)])


def test_weights_are_the_papers():
  assert router().loss_weights == {"importance": 0.005, "load_loss": 0.005, "load_balance": 0.0}


@pytest.mark.parametrize("fields, message", [
    (dict(k=4), "router.k=4 is not between 1 and num_experts=3"),
    (dict(order="batch_first"), "router.order='batch_first' is unknown; did you mean 'batch_priority'"),
    (dict(noise=-1.0), "router.noise=-1.0 is negative; choose 0 or more"),
])
def test_mistakes_are_named(fields, message):
  with pytest.raises(UserError, match=message):
    router(**fields)
