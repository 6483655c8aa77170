"""LIMoE: the golden entropies, one pair of losses a modality, and what their gradients do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_experts.errors import UserError
from sparse_experts.moe import Tokens, make_router
from sparse_experts.moe.routers.limoe import global_entropy, local_entropy
from sparse_experts.moe.routing import as_pair
from tests.moe.test_routers import PRINTED
from tests.oracle import softmax

D, E = 4, 8
ONE = jnp.ones((1, 1), bool)


def router(num_experts=E, **fields):
  return make_router("limoe", D, num_experts, rngs=nnx.Rngs(0), **fields)


@pytest.mark.parametrize("experts, value", [(1, 1.386294), (3, 0.287682), (5, 0.0), (8, 0.0)])
def test_golden_global_entropy(experts, value):
  """At least 4 of 8 experts: uniform on fewer costs, on more does not, and has no gradient."""
  prob_GTE = (jnp.arange(E) < experts).astype(jnp.float32)[None, None] / experts
  loss = lambda prob: global_entropy(prob, ONE, 4, "group")[0]
  np.testing.assert_allclose(loss(prob_GTE), value, atol=PRINTED)
  assert bool(jax.grad(loss)(prob_GTE).any()) == (experts < 4)


@pytest.mark.parametrize("scope", ["batch", "group"])
def test_each_modality_has_its_own(scope):
  """By hand, in two groups: one lacks modality 1, both have padding, and task 2 enters nothing."""
  given = router(min_experts=8.0, scope=scope)
  x_GTD = jax.random.normal(jax.random.key(0), (2, 6, D))
  task_GT = np.array([[0, 0, 1, 1, 2, 1], [0, 0, 0, 0, 2, 1]])
  mask_GT = np.array([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 1, 0]], bool)
  tokens = Tokens(mask=jnp.asarray(mask_GT), task=jnp.asarray(task_GT, jnp.int32))
  routing = jax.jit(lambda x: given(x, tokens, None))(x_GTD)
  entropy = lambda p: -(p * np.log(p)).sum()
  for m in range(2):
    local, spread, groups, everywhere = 0.0, 0.0, 0, []
    for g in range(2):
      prob = [softmax(np.asarray(x_GTD[g, t] @ given.w[...], np.float64))
              for t in range(6) if mask_GT[g, t] and task_GT[g, t] == m]
      if prob:
        local += np.mean([entropy(p) for p in prob])
        spread += max(0.0, np.log(8) - entropy(np.mean(prob, axis=0)))
        groups += 1
        everywhere += prob
    assert spread > 0 and groups == 2 - m
    np.testing.assert_allclose(routing.losses[f"local_entropy_{m}"], (local, groups), rtol=1e-5)
    expected = (spread, groups) if scope == "group" else (
        max(0.0, np.log(8) - entropy(np.mean(everywhere, axis=0))), 1)
    np.testing.assert_allclose(as_pair(routing.losses[f"global_entropy_{m}"]), expected, rtol=1e-5)
  assert set(routing.losses) == set(given.loss_weights)


def test_a_collapsed_modality_spreads_and_its_tokens_get_sure():
  """Logits that follow the two gradients: all tokens start on one expert, and end each on one of several."""
  logit_GTE = (0.1 * jax.random.normal(jax.random.key(1), (1, 16, E))).at[..., 0].add(4.0)
  mask_GT = jnp.ones((1, 16), bool)

  def loss(logit_GTE):
    prob_GTE = jax.nn.softmax(logit_GTE, axis=-1)
    return global_entropy(prob_GTE, mask_GT, 4, "group")[0] + 0.5 * local_entropy(prob_GTE, mask_GT)[0]

  follow = lambda _, logit_GTE: logit_GTE - 20.0 * jax.grad(loss)(logit_GTE)
  prob_GTE = jax.nn.softmax(jax.jit(lambda x: jax.lax.fori_loop(0, 300, follow, x))(logit_GTE), axis=-1)
  assert global_entropy(prob_GTE, mask_GT, 4, "group")[0] < 0.05 and local_entropy(prob_GTE, mask_GT)[0] < 0.1
  assert len(set(prob_GTE.argmax(-1)[0].tolist())) >= 4


def test_weights_by_modality():
  weights = router(local_weights=(0.0, 0.1, 0.2), global_weights=(0.3, 0.4, 0.0), z_weight=0.5).loss_weights
  assert weights == {
      "importance": 5e-3, "load_loss": 5e-3, "load_balance": 0.0, "z": 0.5, "local_entropy_0": 0.0,
      "local_entropy_1": 0.1, "local_entropy_2": 0.2, "global_entropy_0": 0.3, "global_entropy_1": 0.4,
      "global_entropy_2": 0.0}


@pytest.mark.parametrize("fields, message", [
    (dict(local_weights=(0.1,)), "router.local_weights names 1 modalities, router.global_weights 2; give"),
    (dict(min_experts=9.0), "router.min_experts=9.0 is not between 1 and num_experts=8"),
    (dict(min_experts=0.5), "router.min_experts=0.5 is not between 1 and num_experts=8"),
])
def test_mistakes_are_named(fields, message):
  with pytest.raises(UserError, match=message):
    router(**fields)


def test_modalities_must_be_there():
  with pytest.raises(UserError, match="router 'limoe' needs tokens.task, the modality, which is None"):
    router()(jnp.zeros((1, 3, D)), Tokens(mask=jnp.ones((1, 3), bool)), None)
