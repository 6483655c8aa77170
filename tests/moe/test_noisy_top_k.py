"""Shazeer et al. 2017: the golden toy, the smooth load, and noise that breaks the tie of the zero start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.stats import norm

from sparse_experts.errors import UserError
from sparse_experts.moe import Tokens, make_router
from sparse_experts.moe.routers.noisy_top_k import chance
from sparse_experts.moe.routing import as_pair, losses
from tests.moe.test_routers import LOGIT_GTE, MASK_GT, PRINTED

ONE, ZERO = jnp.ones_like(LOGIT_GTE), jnp.zeros_like(LOGIT_GTE)


def router(E=3, k=2, d=4):
  return make_router("noisy_top_k", d, E, k=k, rngs=nnx.Rngs(0))


def route(k, *args):
  return jax.jit(router(k=k).route)(LOGIT_GTE, MASK_GT, *args)


def pair(routing, name):
  return as_pair(routing.losses[name])


def test_golden_gates_and_importance():
  routing = route(2)
  np.testing.assert_allclose(
      routing.gate[0, :6], [0.750260, 0.731059, 0.750260, 0.622459, 0.622459, 0.817574], atol=PRINTED)
  np.testing.assert_allclose(routing.gate[0, :6] + routing.gate[0, 6:], 1, rtol=1e-6)
  gate_E = np.zeros(3)
  np.add.at(gate_E, np.asarray(routing.expert[0]), np.asarray(routing.gate[0]))
  np.testing.assert_allclose(gate_E, [3.587036, 1.499480, 0.913484], atol=PRINTED)
  np.testing.assert_allclose(pair(routing, "importance"), (0.329143, 1), atol=PRINTED)


def test_golden_load_with_a_draw_of_zero():
  """Noise of deviation 1 that happens to be zero."""
  np.testing.assert_allclose(pair(route(2, ONE, ZERO), "load_loss"), (0.100298, 1), atol=PRINTED)
  # t0: the others' second largest is 0 for the chosen, and 1 for expert 2.
  threshold_E = jnp.array([0.0, 0.0, 1.0])
  np.testing.assert_allclose(
      losses.chance(LOGIT_GTE[0, 0], threshold_E, 1.0), norm.cdf([2.1, 1.0, -1.0]), rtol=1e-5)


def test_padding_enters_no_loss():
  pad = lambda a, value: jnp.pad(a, ((0, 1), (0, 2)) + ((0, 0),) * (a.ndim - 2), constant_values=value)
  routing = jax.jit(router().route)(pad(LOGIT_GTE, 7.0), pad(MASK_GT, False), pad(ONE, 1.0), pad(ZERO, 0.0))
  np.testing.assert_allclose(pair(routing, "importance"), (0.329143, 1), atol=PRINTED)
  np.testing.assert_allclose(pair(routing, "load_loss"), (0.100298, 1), atol=PRINTED)


@pytest.mark.parametrize("scope", ["batch", "group"])
def test_even_routing_has_the_scope_s_loss(scope):
  """Sixteen groups, in which four times as few tokens would have four times the loss: variances of sums."""
  rng = np.random.default_rng(0)
  E, k, G, T = 8, 2, 16, 32
  logit_GTE = rng.normal(size=(G, T, E)).astype(np.float32)
  routing = make_router("noisy_top_k", 4, E, k=k, scope=scope, rngs=nnx.Rngs(0)).route(
      jnp.asarray(logit_GTE), jnp.ones((G, T), bool))
  gate_GTE = np.zeros((G, T, E))
  for g, t in np.ndindex(G, T):
    best = np.argsort(-logit_GTE[g, t])[:k]
    gate_GTE[g, t, best] = np.exp(logit_GTE[g, t, best]) / np.exp(logit_GTE[g, t, best]).sum()
  variation = lambda sum_E: sum_E.var() / sum_E.mean() ** 2
  for name, value_GTE in (("importance", gate_GTE), ("load_loss", gate_GTE > 0)):
    whole, each = variation(value_GTE.sum((0, 1))), sum(variation(v.sum(0)) for v in value_GTE)
    assert each / G > 5 * whole
    expected = (whole, 1) if scope == "batch" else (each, G)
    np.testing.assert_allclose(pair(routing, name), expected, rtol=1e-4)


def test_load_without_noise_is_a_count():
  """4, 1 and 1 first choices of 6: the mean is 2, the variance 2."""
  for k, args, value in [(1, (), 0.5), (3, (ONE, ZERO), 0.0)]:  # with k = E noise does not matter either
    np.testing.assert_allclose(pair(route(k, *args), "load_loss")[0], value, atol=1e-6)


def test_the_chance_is_how_often_fresh_noise_chooses():
  """Other experts' noise as drawn, one's own drawn anew, its deviation its own."""
  E, k, n = 4, 2, 20_000
  logit_E, noise_E, std_E = (np.asarray(a) for a in jax.random.normal(jax.random.key(3), (3, E)))
  std_E = np.abs(std_E) + 0.3
  chance_E = jax.jit(chance, static_argnums=3)(logit_E, logit_E + std_E * noise_E, std_E, k)
  for e in range(E):
    noise_NE = np.tile(noise_E, (n, 1))
    noise_NE[:, e] = np.random.default_rng(e).normal(size=n)
    noisy_NE = logit_E + std_E * noise_NE
    share = (np.argsort(-noisy_NE, axis=-1)[:, :k] == e).any(-1).mean()
    np.testing.assert_allclose(chance_E[e], share, atol=0.015)  # 4 deviations of a share of 20,000


def test_noise_alone_routes_a_fresh_router():
  """Zero weights: without noise all go to k experts; with it, evenly; the deviation is softplus(0) + 0.01."""
  x_GTD, tokens = jnp.ones((1, 2000, 4)), Tokens(mask=jnp.ones((1, 2000), bool))
  given = router(E=4, k=2)
  fresh = jax.jit(lambda key: given(x_GTD, tokens, None, key))
  assert set(np.asarray(fresh(None).expert[0]).tolist()) == {0, 1}
  routing = fresh(jax.random.key(0))
  np.testing.assert_allclose(routing.metrics["load"][0] / 4000, 0.25, atol=0.03)  # 4 deviations of 0.007
  logit = np.log(routing.prob[0])
  between = logit[:, 0] - logit[:, 1]
  np.testing.assert_allclose(between.std(), 2**0.5 * (np.log(2) + 0.01), rtol=0.07)  # 4 deviations of 0.016


def test_losses_move_what_they_should():
  """Load teaches the deviation too; both even out a router that prefers one expert."""
  given = router(E=4, k=2, d=1)
  given.w[...] = jnp.array([[1.0, 0.0, 0.0, 0.0]])
  graphdef, state = nnx.split(given)
  x_GTD, tokens = jnp.ones((1, 64, 1)), Tokens(mask=jnp.ones((1, 64), bool))

  def loss(state, name):
    return pair(nnx.merge(graphdef, state)(x_GTD, tokens, None, jax.random.key(0)), name)[0]

  slope = jax.jit(jax.grad(loss), static_argnums=1)
  importance, load = slope(state, "importance"), slope(state, "load_loss")
  assert importance["w"][...][0, 0] > 0 and load["w"][...][0, 0] > 0
  assert load["w_noise"][...].any()


def test_mistakes_are_named():
  with pytest.raises(UserError, match="router.k=4 is not between 1 and num_experts=3"):
    router(k=4)
  with pytest.raises(UserError, match="router.scope='all' is unknown"):
    make_router("noisy_top_k", 4, 3, scope="all", rngs=nnx.Rngs(0))
