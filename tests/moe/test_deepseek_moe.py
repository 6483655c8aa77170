"""DeepSeekMoE: the balance over devices as the paper writes it, and its two ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_experts.errors import UserError
from sparse_experts.moe import make_router
from tests.oracle import choices, softmax

T, E, K = 10, 6, 2
LOGIT_GTE = jax.random.normal(jax.random.key(0), (2, T, E)) + jnp.linspace(1.0, -1.0, E)[None, None]
MASK_GT = np.ones((2, T), bool)
MASK_GT[1, 4:] = False


def route(devices):
  router = make_router("deepseek_moe", 4, E, k=K, devices=devices, rngs=nnx.Rngs(0))
  return jax.jit(router.route)(LOGIT_GTE, jnp.asarray(MASK_GT))


def test_balance_over_devices_as_written():
  """Σ f'_j P'_j: f'_j the mean of f_i = N / (K T) Σ_t 1, P'_j the sum of P_i, over a device; no padding."""
  expected = 0.0
  for g in range(2):
    real = np.flatnonzero(MASK_GT[g])
    f_E, p_E = np.zeros(E), np.zeros(E)
    for t in real:
      p = softmax(np.asarray(LOGIT_GTE[g, t], np.float64))
      p_E += p / len(real)
      f_E[choices(p, K)] += E / (K * len(real))
    expected += sum(f_E[j:j + 2].mean() * p_E[j:j + 2].sum() for j in range(0, E, 2))
  np.testing.assert_allclose(route(3).losses["device_balance"], (expected, 2), rtol=1e-5)


def test_one_expert_a_device_is_the_balance_of_experts_and_one_device_is_even():
  each = route(E).losses
  np.testing.assert_allclose(each["device_balance"], each["load_balance"], rtol=1e-6)
  np.testing.assert_allclose(route(1).losses["device_balance"], (2, 2), rtol=1e-6)


@pytest.mark.parametrize("devices", [0, 4])
def test_mistakes_are_named(devices):
  with pytest.raises(UserError, match=f"router.devices={devices} does not divide num_experts=6; choose"):
    route(devices)
