"""RL-R: draws follow the policy, and rewards reach the policy and its baseline only."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparse_experts.moe import Tokens, make_router
from sparse_experts.moe.routing import losses

D, E = 4, 3


def router(**arguments):
  return make_router("reinforce", D, E, rngs=nnx.Rngs(params=0), **arguments)


def tokens(shape):
  return Tokens(mask=jnp.ones(shape, bool))


def test_it_draws_from_its_policy_with_a_key_and_takes_the_best_without():
  logit_GTE = jnp.broadcast_to(jnp.log(jnp.array([0.5, 0.3, 0.2])), (1, 20_000, E))
  mask_GT = jnp.ones(logit_GTE.shape[:2], bool)
  drawn = router().route(logit_GTE, mask_GT, key=jax.random.key(0))
  share_E = drawn.metrics["load"][0] / 20_000
  np.testing.assert_allclose(share_E, [0.5, 0.3, 0.2], atol=0.015)  # 4 deviations of 20,000 draws
  assert (router().route(logit_GTE, mask_GT).expert == 0).all()
  assert (drawn.gate == 1).all()


def test_rewards_by_hand():
  log_prob, value, reward = jnp.array([[-1.0, -2.0, jnp.nan]]), jnp.array([[0.5, 1.0, 0.0]]), jnp.array(
      [[0.0, 4.0, 0.0]])
  mask = jnp.array([[True, True, False]])
  found = losses.reward(log_prob, value, reward, mask)
  # policy: -(0 - 0.5)(-1) - (4 - 1)(-2); baseline: 0.5^2 / 2, and |1 - 4| - 0.5.
  np.testing.assert_allclose(found["policy"], (-0.5 + 6.0, 2))
  np.testing.assert_allclose(found["baseline"], (0.125 + 2.5, 2))
  slope = jax.grad(lambda v: losses.reward(log_prob, v, reward, mask)["policy"][0])(value)
  assert not slope.any()  # the advantage is without gradient


def test_rewards_do_not_reach_the_vectors():
  given = router()
  x_GTD = jax.random.normal(jax.random.key(0), (1, 5, D))

  def objective(params, x_GTD):
    routing = nnx.merge(graphdef, params)(x_GTD, tokens((1, 5)), None, jax.random.key(1))
    return (routing.log_prob.sum() + routing.value.sum())

  graphdef, params = nnx.split(given)
  of_params, of_x = jax.grad(objective, (0, 1))(params, x_GTD)
  assert not of_x.any()
  assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(of_params))


def test_it_learns_which_expert_is_rewarded():
  """Tokens on one side do well with expert 2, others with expert 0."""
  given = router(load_balance_weight=0.0)
  graphdef, params = nnx.split(given)
  x_GTD = jax.random.normal(jax.random.key(0), (1, 256, D))
  best_GT = jnp.where(x_GTD[..., 0] > 0, 2, 0)

  @jax.jit
  def step(params, key):
    def objective(params):
      routing = nnx.merge(graphdef, params)(x_GTD, tokens((1, 256)), None, key)
      reward_GT = jnp.where(routing.expert == best_GT, 0.0, -1.0)
      found = losses.reward(routing.log_prob, routing.value, reward_GT, jnp.ones((1, 256), bool))
      return sum(total / count for total, count in found.values())
    return jax.tree.map(lambda p, g: p - 1.0 * g, params, jax.grad(objective)(params))

  for i in range(150):
    params = step(params, jax.random.key(i))
  routing = nnx.merge(graphdef, params)(x_GTD, tokens((1, 256)), None)
  assert (routing.expert == best_GT).mean() > 0.95
