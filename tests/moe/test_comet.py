"""COMET: trees of any size against a recursion, exact zeros, one softmax over all trees."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_experts.errors import UserError
from sparse_experts.moe import Tokens, make_router
from sparse_experts.moe.routers.comet import paths

D, T = 6, 32
QUICK = {"xla_backend_optimization_level": 0}
MASK_GT = jnp.ones((1, T), bool)
every_size = pytest.mark.parametrize("E", [2, 3, 5, 8, 9])


@functools.cache
def router(E=8, **fields):
  return make_router("comet", D, E, rngs=nnx.Rngs(params=0), **fields)


@functools.cache
def compiled(E, k, gamma):
  return jax.jit(router(E, k=k, gamma=gamma).route, compiler_options=QUICK)


def draw(E, k=2, split=0.3, leaf=1.0):
  rng = np.random.default_rng(E)
  return (split * rng.normal(size=(1, T, k, E - 1)).astype(np.float32),
          leaf * rng.normal(size=(1, T, k, E)).astype(np.float32))


def route(split, leaf_GTKE, mask_GT=MASK_GT, gamma=1.0):
  return compiled(leaf_GTKE.shape[-1], leaf_GTKE.shape[-2], gamma)(split, leaf_GTKE, mask_GT)


def leaves(left, q=0, mass=1.0):
  """Leaf probabilities below node q from left to right; `left` in heap order."""
  if q >= len(left):
    return [mass]
  return leaves(left, 2 * q + 1, mass * left[q]) + leaves(left, 2 * q + 2, mass * (1 - left[q]))


def step(t):
  return np.where(t <= -0.5, 0.0, np.where(t >= 0.5, 1.0, -2 * t**3 + 1.5 * t + 0.5))


def slow(split, leaf_GTKE):
  """(p, gate) of the definition in float64; the closed form, so without the code's 1e-8."""
  left = step(split[0].astype(np.float64))
  p_TKE = np.array([[leaves(left_S) for left_S in left_KS] for left_KS in left])
  share_TKE = p_TKE * np.exp(leaf_GTKE[0].astype(np.float64))
  return p_TKE, share_TKE.sum(1) / share_TKE.sum((1, 2))[:, None]


@every_size
def test_gates_and_entropy_are_those_of_a_recursion(E):
  """Leaves from left to right, depths that differ by one included; padding, NaN here, counts nowhere."""
  split, leaf_GTKE = draw(E)
  p_TKE, gate_TE = slow(split, leaf_GTKE)
  found_p = paths(jnp.asarray(step(split[0]), jnp.float32))
  np.testing.assert_allclose(found_p, p_TKE, atol=1e-6)  # float32 products below 1
  np.testing.assert_allclose(found_p.sum(-1), 1, rtol=1e-6)
  split[0, 5] = np.nan
  routing = route(split, leaf_GTKE, MASK_GT.at[0, 5].set(False))
  real = [t for t in range(T) if t != 5]
  # 1e-8 next to p, and of p itself where it is nearly 0 a few 1e-8 times its share.
  np.testing.assert_allclose(np.asarray(routing.prob)[0, real], gate_TE[real], atol=2e-6)
  p_TKE = p_TKE[real]
  np.testing.assert_allclose(
      routing.losses["selection_entropy"], (-(p_TKE * np.log(p_TKE + 1e-6)).sum(), T - 1), rtol=1e-5)
  given = routing.gate[0].reshape(E, T).T
  np.testing.assert_array_equal(given, np.take_along_axis(
      np.asarray(routing.prob[0]), np.asarray(routing.expert[0]).reshape(E, T).T, axis=-1))


@every_size
def test_gates_are_a_distribution_with_its_closed_form(E):
  """Where all p are above 1e-3 the code's 1e-8 is at most 1e-5 of them."""
  split, leaf_GTKE = draw(E, split=0.1)
  p_TKE, gate_TE = slow(split, leaf_GTKE)
  assert p_TKE.min() > 1e-3
  routing = route(split, leaf_GTKE)
  np.testing.assert_allclose(routing.prob[0], gate_TE, rtol=2e-5)
  np.testing.assert_allclose(routing.prob.sum(-1), 1, rtol=1e-6)


def test_entropy_at_its_ends():
  """K log E at even splits of a full tree; -1e-6 K when all are hard, the log's 1e-6."""
  _, leaf_GTKE = draw(8, k=3)
  even = route(np.zeros((1, T, 3, 7), np.float32), leaf_GTKE)
  np.testing.assert_allclose(even.losses["selection_entropy"][0] / T, 3 * np.log(8), rtol=1e-5)
  hard = route(draw(8, k=3, split=1e4)[0], leaf_GTKE)
  np.testing.assert_allclose(hard.losses["selection_entropy"][0] / T, -3e-6, atol=1e-6)


@every_size
def test_hard_splits_leave_at_most_k_experts(E):
  """Exactly one leaf of each tree; two trees may meet in one. The rest is exactly 0 and not valid."""
  split, leaf_GTKE = draw(E, split=1e4)
  p_TKE, gate_TE = slow(split, leaf_GTKE)
  routing = route(split, leaf_GTKE)
  np.testing.assert_array_equal(np.asarray(routing.prob[0]) > 0, p_TKE.sum(1) > 0)
  np.testing.assert_allclose(routing.prob[0], gate_TE, atol=1e-6)
  number = (p_TKE.sum(1) > 0).sum(-1)
  assert number.min() == 1 and number.max() == 2
  assert int(routing.metrics["experts_per_token"][0]) == number.sum() == int(routing.valid.sum())


def test_hard_splits_have_finite_gradients_and_learn_nothing():
  """Leaves that are reached still learn; also at splits of 1e20."""
  given = router(5)

  def total(split, leaf_GTKE):
    routing = given.route(split, leaf_GTKE, MASK_GT)
    return jnp.where(routing.valid, routing.gate**2, 0.0).sum() + routing.losses["selection_entropy"][0]

  gradient = jax.jit(jax.grad(total, (0, 1)), compiler_options=QUICK)
  for scale in (1e4, 1e20):
    split, leaf_GTKE = draw(5, split=scale)
    of_split, of_leaf = gradient(split, leaf_GTKE)
    assert not np.asarray(of_split).any() and np.isfinite(of_leaf).all() and np.asarray(of_leaf).any()


def test_one_expert_has_no_splits():
  given = router(1, k=1)
  assert set(nnx.to_pure_dict(nnx.state(given))) == {"w_leaf", "b_leaf"}
  routing = jax.jit(given.__call__)(jnp.ones((1, 2, D)), Tokens(mask=jnp.ones((1, 2), bool)), None)
  np.testing.assert_array_equal(routing.gate, 1)


def test_trees_and_splits_of_the_weights():
  """Bias and vector of split q of tree j, and of leaf i, stand where `route` reads them."""
  given = router(3, k=2)
  assert given.w_split.shape == (D, 4) and given.w_leaf.shape == (D, 6)
  graphdef, state = nnx.split(given)
  state = jax.tree.map(jnp.zeros_like, state)
  state["b_split"][...] = jnp.array([1.0, -1.0, -1.0, 1.0])  # leaves LL, LR, R: tree 0 to 1, tree 1 to 2
  state["w_leaf"][...] = state["w_leaf"][...].at[0, 1].set(2.0)  # leaf 1 of tree 0
  x_GTD = jnp.zeros((1, 1, D)).at[0, 0, 0].set(1.0)
  call = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x, Tokens(mask=jnp.ones((1, 1), bool)), None))
  np.testing.assert_allclose(call(state, x_GTD).prob[0, 0], [0, 1 / (1 + np.exp(-2)), 1 / (1 + np.exp(2))],
                             rtol=1e-5)
  state["b_split"][...] = jnp.zeros(4).at[0].set(1.0)
  state["w_split"][...] = state["w_split"][...].at[0, 2].set(-1.0)  # the root of tree 1
  share_E = np.array([0.5, 0.5 * np.exp(2), 1.0])  # split 1 of tree 0 is even
  np.testing.assert_allclose(call(state, x_GTD).prob[0, 0], share_E / share_E.sum(), rtol=1e-5)


def test_first_weights():
  """Splits within gamma / 100, leaves within 0.05, both spread."""
  for gamma in (1.0, 10.0):
    given = router(16, k=4, gamma=gamma)
    for drawn, bound in ((given.w_split, gamma / 100), (given.b_split, gamma / 100), (given.w_leaf, 0.05),
                         (given.b_leaf, 0.05)):
      assert 0.9 * bound < np.abs(drawn[...]).max() <= bound and np.abs(drawn[...].mean()) < 0.25 * bound


def test_a_small_gamma_is_sharper():
  split, leaf_GTKE = draw(8)
  count = [int(route(split, leaf_GTKE, gamma=gamma).valid.sum()) for gamma in (1e-3, 1.0, 9.0)]
  assert count[0] < 2 * T < count[1] < count[2] == 8 * T


@pytest.mark.parametrize("fields, message", [
    (dict(k=9), "router.k=9 is not between 1 and num_experts=8"),
    (dict(gamma=-1.0), "router.gamma=-1.0 is out of range; choose a number above 0"),
    (dict(trees=2), "router.trees is set, but router.name='comet' takes no such argument"),
])
def test_mistakes_are_named(fields, message):
  with pytest.raises(UserError, match=message):
    router(**fields)
