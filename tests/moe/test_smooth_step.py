"""The smooth-step: its values, ends that are exactly flat, and gradients that stay finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_experts.moe.routing.smooth_step import selection_entropy, smooth_step

GAMMAS = (0.01, 0.3, 0.7, 1.0, 10.0)
every_gamma = pytest.mark.parametrize("gamma", GAMMAS)
slope = jax.vmap(jax.grad(smooth_step), (0, None))


@every_gamma
def test_value_and_slope_inside(gamma):
  """Against the cubic and its derivative in float64."""
  t = np.linspace(-gamma / 2, gamma / 2, 1001)[1:-1].astype(np.float32)
  wide = t.astype(np.float64)
  cubic = -2 / gamma**3 * wide**3 + 3 / (2 * gamma) * wide + 0.5
  np.testing.assert_allclose(smooth_step(jnp.asarray(t), gamma), cubic, atol=3e-7)  # float32, near 1
  derivative = 3 / (2 * gamma) - 6 * wide**2 / gamma**3
  np.testing.assert_allclose(slope(jnp.asarray(t), gamma) * gamma, derivative * gamma, atol=2e-6)
  assert smooth_step(jnp.zeros(()), gamma) == 0.5
  np.testing.assert_allclose(slope(jnp.zeros(1), gamma), 1.5 / gamma, rtol=1e-6)


@every_gamma
def test_it_is_exactly_flat_outside(gamma):
  """The cubic of a clipped input is not: 3e-8 in place of 0 for gamma = 0.3, 6e-8 for 0.7."""
  half = np.float32(gamma / 2)
  outside = jnp.asarray([half, np.nextafter(half, np.float32(2 * gamma)), gamma, 1e20, np.inf], jnp.float32)
  for sign, value in ((1, 1.0), (-1, 0.0)):
    np.testing.assert_array_equal(smooth_step(sign * outside, gamma), value)
    np.testing.assert_array_equal(slope(sign * outside, gamma), 0.0)  # not NaN at 1e20 either

  end = -half
  clipped_cubic = np.float32(-2 / gamma**3) * end**3 + np.float32(3 / (2 * gamma)) * end + np.float32(0.5)
  if gamma in (0.3, 0.7):
    assert clipped_cubic != 0


@every_gamma
def test_it_stays_within_0_and_1(gamma):
  """So that neither it nor one minus it is a negative gate: every float near both ends."""
  end = np.float32(gamma / 2)
  near = end - np.arange(20_000, dtype=np.float32) * np.spacing(end)
  value = np.asarray(smooth_step(jnp.concatenate([jnp.asarray(near), -jnp.asarray(near)]), gamma))
  assert value.min() >= 0 and value.max() <= 1


def test_entropy_of_selections():
  """K log E when even, -1e-6 K when hard: the log's 1e-6; padding, NaN here, counts nowhere."""
  hard, even = jnp.eye(4)[jnp.array([1, 1])], jnp.full((2, 4), 0.25)
  prob_GTKE = jnp.stack([hard, even, jnp.full((2, 4), jnp.nan)])[None]
  for tokens, nats in (([True, False, False], -2e-6), ([False, True, False], 2 * np.log(4)),
                       ([True, True, False], 2 * np.log(4))):
    total, count = selection_entropy(prob_GTKE, jnp.array([tokens]))
    np.testing.assert_allclose(total, nats, atol=1e-5)  # the log's 1e-6, relative to p = 1/4, for each term
    assert count == sum(tokens)
